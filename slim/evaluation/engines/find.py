"""The engines by their names."""

from __future__ import annotations

from slim.evaluation.engines.engine import Engine
from slim.evaluation.engines.llama_cpp_engine import find_llama_cpp
from slim.evaluation.engines.vllm_engine import find_vllm

FINDERS = {"llama_cpp": find_llama_cpp, "vllm": find_vllm}


def find_engine(name: str, path: str | None) -> Engine:
    """Return an installed engine.

    Args:
        name: ``"llama_cpp"`` or ``"vllm"``.
        path: ``eval.engine_path``.

    Raises:
        SlimError: when it is not there, or too old.
    """
    return FINDERS[name](path)

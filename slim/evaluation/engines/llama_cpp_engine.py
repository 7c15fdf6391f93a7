"""llama.cpp: measures GGUF files, through whichever of its programs and bindings is there.

- the npm package node-llama-cpp, in the folder that ``eval.engine_path`` names;
- the Python package llama-cpp-python, in slim's environment or in the one that
  ``eval.engine_path`` names;
- the program llama-bench, on the PATH or in the folder that ``eval.engine_path`` names: speed and
  memory only.

A checkpoint that has no GGUF file and is not quantised is written as one for the time of the
measurement.
"""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, ClassVar

from slim.core.errors import SlimError
from slim.core.io import read_json
from slim.evaluation.engines.engine import (
    WORKERS,
    Engine,
    distribution_version,
    output_of,
    python_of,
)
from slim.gguf.metadata import GGUF_FILE, check_model

if TYPE_CHECKING:
    from slim.models.spec import ModelSpec

BENCH = "llama-bench"
NODE_PACKAGE = Path("node_modules") / "node-llama-cpp"
OLDEST_NODE_PACKAGE = 3
INSTALL = (
    "Install one: pip install llama-cpp-python, or mkdir ENGINE && cd ENGINE && npm install "
    "node-llama-cpp@3 --ignore-scripts, and give eval.engine_path=ENGINE."
)


class LlamaCpp(Engine):
    """llama.cpp, however it is reached."""

    name: ClassVar[str] = "llama_cpp"
    title: ClassVar[str] = "llama.cpp"

    def check(self, spec: ModelSpec) -> None:
        if spec.quantization is None:
            check_model(spec)
            return
        method = spec.quantization.get("quant_method")
        if method != "gguf":
            raise SlimError(
                f"eval.engine=llama_cpp reads GGUF, and {spec.name} is stored as {method}. "
                "Use quant.format=gguf or quant=gguf."
            )

    @contextmanager
    def model(self, folder: Path, file: Path | None) -> Iterator[Path]:
        if file is not None:
            yield file
        elif (folder / GGUF_FILE).is_file():
            yield folder / GGUF_FILE
        else:
            # local: loads numpy and torch
            from slim.gguf.export import export_gguf

            with TemporaryDirectory(prefix="slim-gguf-") as scratch:
                linked = Path(scratch)
                # the checkpoint's own folder is not ours to write into
                for path in folder.iterdir():
                    (linked / path.name).symlink_to(path.resolve())
                export_gguf(linked)
                yield linked / GGUF_FILE


class NodeLlamaCpp(LlamaCpp):
    """Through the npm package node-llama-cpp."""

    def command(self) -> list[str]:
        return ["node", str(WORKERS / "node_llama_cpp.mjs")]


class LlamaCppPython(LlamaCpp):
    """Through the Python package llama-cpp-python."""

    def command(self) -> list[str]:
        return [str(self.path), str(WORKERS / "llama_cpp_python_worker.py")]


class LlamaBench(LlamaCpp):
    """Through the program llama-bench, which gives no logits."""

    lacks = ("nll", "continuations")

    def command(self) -> list[str]:
        return [sys.executable, str(WORKERS / "llama_bench_worker.py")]


def find_llama_cpp(path: str | None) -> LlamaCpp:
    """Return the engine that is there.

    Args:
        path: ``eval.engine_path``; None: this environment's own package, then the PATH.

    Raises:
        SlimError: when there is none, or one that is too old.
    """
    if path is not None:
        return _in_folder(Path(path).expanduser())
    version = distribution_version(Path(sys.executable), "llama_cpp")
    if version is not None:
        return LlamaCppPython(Path(sys.executable), f"of llama-cpp-python {version}")
    program = shutil.which(BENCH)
    if program is not None:
        return _bench(Path(program))
    raise SlimError(f"eval.engine=llama_cpp: no llama.cpp is here. {INSTALL}")


def _in_folder(folder: Path) -> LlamaCpp:
    """Return the engine in a folder, or the program or interpreter itself."""
    if (folder / NODE_PACKAGE).is_dir():
        return _node(folder)
    for program in (folder, folder / BENCH, folder / "bin" / BENCH):
        if program.is_file() and program.stem == BENCH:
            return _bench(program)
    python = python_of(folder)
    if python is not None:
        version = distribution_version(python, "llama_cpp")
        if version is not None:
            return LlamaCppPython(python, f"of llama-cpp-python {version}")
    raise SlimError(
        f"eval.engine_path={folder}: has no {NODE_PACKAGE.name}, no {BENCH} and no environment "
        f"with llama-cpp-python. {INSTALL}"
    )


def _node(folder: Path) -> NodeLlamaCpp:
    version = read_json(folder / NODE_PACKAGE / "package.json")["version"]
    if int(version.partition(".")[0]) < OLDEST_NODE_PACKAGE:
        raise SlimError(
            f"eval.engine_path={folder} has node-llama-cpp {version}, which is too old. Update it: "
            f"cd {folder} && npm install node-llama-cpp@3 --ignore-scripts"
        )
    if output_of(["node", "--version"]) is None:
        raise SlimError(
            "eval.engine=llama_cpp through node-llama-cpp needs Node 20 or later: there is no "
            "'node' on the PATH."
        )
    build = folder / NODE_PACKAGE / "llama" / "binariesGithubRelease.json"
    release = read_json(build).get("release", "") if build.is_file() else ""
    return NodeLlamaCpp(folder, f"{release} of node-llama-cpp {version}".strip())


def _bench(program: Path) -> LlamaBench:
    usage = output_of([str(program), "--help"])
    if usage is None or "--n-depth" not in usage:
        raise SlimError(
            f"{program} does not run or is too old: it has no --n-depth. Use a {BENCH} of 2025 or "
            "later."
        )
    # it has no option for its version; its siblings do, and tell "version: 1234 (abcdef)"
    told = None
    for sibling in ("llama-cli", "llama-completion", "llama-server"):
        told = told or output_of([str(program.with_name(sibling)), "--version"])
    build = re.search(r"version: (\S+)", told or "")
    return LlamaBench(program, f"{build.group(1)} (llama-bench)" if build else "(llama-bench)")

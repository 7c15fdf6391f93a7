"""What all engines share: they are found before any work, and measure in a process of their own.

slim writes a request, an engine's worker reads it, does the work and writes an answer, both JSON.
Tokens are slim's own, so that every engine reads the same ones. The request:

    model          file or folder
    engine_path    where the engine is
    threads, gpu   how many threads; whether a GPU may be used
    context        tokens that there must be room for
    prompts        [{tokens, new_tokens}], to be timed ``repeats`` times after ``warmup`` runs
    windows        [[token]], whose negative log-likelihoods are wanted
    continuations  [{tokens, new_tokens, ends}], to be continued greedily

The answer:

    runs           [{prefill, decode}] in seconds; decode is without the first new token
    resident_bytes, peak_bytes    what the process holds more than before it loaded the model, with
                   the model idle and at most while generating; null where it cannot tell
    nll            per window the sum over all tokens but the first, in nats
    continuations  [[token]]

An engine that cannot do one of them leaves it out and names it under ``lacks``.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, ClassVar

from slim.core.errors import SlimError

if TYPE_CHECKING:
    from slim.models.spec import ModelSpec

WORKERS = Path(__file__).parent
PROBE_SECONDS = 60  # for an engine to tell its version
LINES = 3  # of what a dead engine said last


class Engine:
    """An engine that is installed.

    Attributes:
        name: as in ``eval.engine``.
        title: as people call it.
        lacks: what of the answer it cannot give (see the module).
    """

    name: ClassVar[str]
    title: ClassVar[str]
    lacks: tuple[str, ...] = ()

    def __init__(self, path: Path, version: str):
        """Take what was found.

        Args:
            path: where the engine is.
            version: of the engine, and of what binds it.
        """
        self.path = path
        self.version = version

    @property
    def label(self) -> str:
        """Name and version, which tell its figures from those of others."""
        return f"{self.title} {self.version}"

    def check(self, spec: ModelSpec) -> None:
        """Raise ``SlimError`` for a model that the engine does not read."""

    @contextmanager
    def model(self, folder: Path, file: Path | None) -> Iterator[Path]:
        """Give the engine's own form of a checkpoint.

        Args:
            folder: the checkpoint.
            file: what it was imported from, where it was.
        """
        yield folder

    def command(self) -> list[str]:
        """Return the command of the worker; request and answer come after it."""
        raise NotImplementedError

    def environment(self) -> dict[str, str] | None:
        """Return the environment of the worker; None: slim's own."""
        return None

    def measure(self, request: dict) -> dict:
        """Let the worker answer a request (see the module).

        Raises:
            SlimError: when it dies.
        """
        with TemporaryDirectory(prefix="slim-engine-") as scratch:
            asked, answered = Path(scratch) / "request.json", Path(scratch) / "answer.json"
            asked.write_text(json.dumps(request), encoding="utf-8")
            # on any exception, Ctrl-C included, subprocess.run kills the worker
            done = subprocess.run(
                [*self.command(), str(asked), str(answered)],
                capture_output=True, text=True, errors="replace", env=self.environment(),
            )  # fmt: skip
            if done.returncode != 0 or not answered.is_file():
                raise SlimError(
                    f"{self.label} failed on {request['model']} ({ending(done.returncode)}): "
                    f"{last_words(done.stderr or done.stdout)}\n"
                    "Without eval.engine slim measures the checkpoint itself."
                )
            return json.loads(answered.read_text(encoding="utf-8"))


def ending(code: int) -> str:
    """Say how a process ended."""
    if code == -9:
        return "killed, perhaps for lack of memory"
    if code < 0:
        return f"signal {-code}"
    return f"exit code {code}"


def last_words(text: str) -> str:
    """Return the last lines that say something, as one."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    # Python's last line names the error; Node's is its version, and the error stands before it
    errors = [line for line in lines if "rror" in line]
    if errors:
        return errors[-1][:300]
    return " / ".join(lines[-LINES:])[:300] or "it said nothing"


def output_of(command: list[str]) -> str | None:
    """Return what a short command prints; None where it fails or does not end."""
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=PROBE_SECONDS
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    if done.returncode != 0:
        return None
    return (done.stdout + done.stderr).strip()


def python_of(path: Path) -> Path | None:
    """Return the interpreter of an environment, given its folder or the interpreter itself."""
    for candidate in (path, path / "bin" / "python", path / "Scripts" / "python.exe"):
        if candidate.is_file() and candidate.name.startswith("python"):
            return candidate
    return None


def distribution_version(python: Path, package: str) -> str | None:
    """Return the version of a package in another environment; None where it is not installed.

    Args:
        python: its interpreter.
        package: what is imported; the name under which it was installed may be another.
    """
    code = (
        "import importlib.metadata as m, importlib.util as u; "
        f"assert u.find_spec('{package}'); "
        f"print(m.version(m.packages_distributions()['{package}'][0]))"
    )
    return output_of([str(python), "-c", code])

"""What an environment of its own is: its packages, which torch it gets, its name and its folder.
Needs no torch.

An environment is named by a hash of everything that determines it: the pinned packages, the Python
version, the torch it shares with slim. So a changed pin is another environment, and one that is
there is never changed."""

from __future__ import annotations

import os
import platform
import shutil
import sys
from dataclasses import dataclass, field
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from slim.checkpoints.store import digest
from slim.core.errors import SlimError
from slim.core.io import read_json
from slim.core.text import counted, gigabytes

LAYOUT = 1  # raised when environments are made in another way
MARKER = "environment.json"  # written last: a folder without it is none
PINS = Path(__file__).parent / "pins"
NAMED = 3  # packages that a sentence names
CPU_INDEX = "https://download.pytorch.org/whl/cpu"  # torch without CUDA, where pip knows no other

# what a worker may know of slim's surroundings: no other packages, no keys, no home
INHERITED = (
    "PATH", "LANG", "LC_", "TZ", "OMP_", "MKL_", "OPENBLAS_", "KMP_", "NUMEXPR_", "CUDA_",
    "NVIDIA_", "LD_LIBRARY_PATH", "ROCR_", "HIP_", "SYSTEMROOT", "SSL_CERT_",
)  # fmt: skip
# folders that libraries write to, led into the scratch folder
LED_INTO_SCRATCH = (
    "HOME", "USERPROFILE", "TMPDIR", "TEMP", "TMP", "XDG_CACHE_HOME", "XDG_CONFIG_HOME",
    "XDG_DATA_HOME", "HF_HOME", "TORCH_HOME", "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR",
    "TORCH_EXTENSIONS_DIR", "MPLCONFIGDIR", "NUMBA_CACHE_DIR",
)  # fmt: skip
SETTLED = {  # offline: the model is a folder, the tokens are slim's own
    "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1", "TOKENIZERS_PARALLELISM": "false", "DO_NOT_TRACK": "1",
}  # fmt: skip


@dataclass(frozen=True)
class Pins:
    """A set of packages that was tried together.

    Attributes:
        packages: Requirements such as ``"auto-round==0.16.1"``, in the order of the file.
        sizes: Requirement -> bytes of its download, where they are known.
    """

    packages: tuple[str, ...]
    sizes: dict[str, int] = field(default_factory=dict, compare=False, hash=False)

    @property
    def bytes(self) -> int | None:
        """Bytes of all downloads; None where one is unknown."""
        if set(self.packages) - self.sizes.keys():
            return None
        return sum(self.sizes[package] for package in self.packages)


def read_pins(name: str) -> Pins:
    """Read a file of ``pins/``: a requirement a line, the bytes of its download after ``#``.

    Args:
        name: Of the file, without its ending.
    """
    packages, sizes = [], {}
    for line in (PINS / f"{name}.txt").read_text(encoding="utf-8").splitlines():
        requirement, _, size = line.partition("#")
        requirement = requirement.strip()
        if not requirement:  # a comment
            continue
        packages.append(requirement)
        if size.strip().isdigit():
            sizes[requirement] = int(size)
    return Pins(tuple(packages), sizes)


@dataclass(frozen=True)
class Environment:
    """A Python environment, made or not.

    Attributes:
        name: Of the tool.
        pins: Its packages, all of them: nothing else is installed.
        root: Folder that holds environments.
        torch: Versions of torch that it works with, such as ``">=2.11,<2.14"``: slim's own torch is
            shared with it. None: it needs none, or ``pins`` has one.
        python: Its Python, a version such as ``"3.10"`` or a file; None: slim's own.
        modules: What must be importable when it is made.
        builds: Whether packages are built from source and find their tools in the environment.
        variables: Environment variables while it is made.
    """

    name: str
    pins: Pins
    root: Path
    torch: str | None = None
    python: str | None = None
    modules: tuple[str, ...] = ()
    builds: bool = False
    variables: tuple[tuple[str, str], ...] = ()

    @cached_property
    def identity(self) -> dict:
        """Everything that determines it, as plain JSON values."""
        return {
            "layout": LAYOUT,
            "name": self.name,
            "packages": list(self.pins.packages),
            "python": self.python_version,
            "torch": self.torch_version,
            "platform": f"{sys.platform} {platform.machine()}",
        }

    @property
    def folder(self) -> Path:
        """Where it is or will be."""
        return self.root / f"{self.name}-{digest(self.identity)[:10]}"

    @property
    def interpreter(self) -> Path:
        """Its Python."""
        if sys.platform == "win32":
            return self.folder / "Scripts" / "python.exe"
        return self.folder / "bin" / "python"

    @property
    def made(self) -> bool:
        """Whether it is there, whole."""
        return (self.folder / MARKER).is_file()

    @property
    def record(self) -> dict:
        """What was noted when it was made: ``identity``, ``versions``, ``bytes``, ``seconds``."""
        return read_json(self.folder / MARKER)

    @property
    def python_version(self) -> str:
        """Its Python's version, as far as it is told without running it."""
        if self.python is None:
            return f"{sys.version_info.major}.{sys.version_info.minor}"
        return self.python

    @property
    def torch_version(self) -> str | None:
        """The version of the torch that it shares with slim; None: it shares none."""
        if self.torch is None:
            return None
        from packaging.specifiers import SpecifierSet  # local: only where torch is asked for

        try:
            own = version("torch")
        except PackageNotFoundError:
            own = "none"
        if own == "none" or not SpecifierSet(self.torch).contains(own, prereleases=True):
            raise SlimError(
                f"The environment of {self.name} shares slim's torch and needs torch{self.torch}; "
                f"slim has {own}. Install one of these: pip install 'torch{self.torch}'"
            )
        if self.python is not None and self.base_python() != Path(sys.executable):
            raise SlimError(
                f"The environment of {self.name} has another Python ({self.python}) than slim and "
                "cannot share its torch. Leave torch out and name torch==VERSION in packages."
            )
        return own

    def base_python(self) -> Path:
        """Return the interpreter that the environment is made with.

        Raises:
            SlimError: It is not there.
        """
        running = f"{sys.version_info.major}.{sys.version_info.minor}"
        if self.python in (None, running):
            return Path(sys.executable)
        path = Path(self.python).expanduser()
        if path.is_file():
            return path
        program = shutil.which(f"python{self.python}")
        if program is None:
            raise SlimError(
                f"{self.name} needs Python {self.python}: there is no python{self.python} on the "
                "PATH. Install it, or give the interpreter's file."
            )
        return Path(program)

    def plan(self) -> str:
        """Say what making it would fetch, how large that is, and where it goes."""
        size = self.pins.bytes
        amount = "of unknown size"
        if size is not None:
            amount = f"about {gigabytes(size)}"
        where = f"into {self.folder}, and nowhere else"
        shared = ""
        if self.torch_version is not None:
            shared = f"; torch {self.torch_version} is slim's own, by links"
        packages = self.pins.packages
        if not packages:
            return f"Environment {self.folder.name}: to be made without packages {where}{shared}."
        names = ", ".join(packages[:NAMED])
        if len(packages) > NAMED:
            names += f" and {counted(len(packages) - NAMED, 'more package')}"
        return f"Environment {self.folder.name}: to be fetched, {amount}: {names}, {where}{shared}."


def variables_for(environment: Environment, scratch: Path) -> dict[str, str]:
    """Return the environment variables of a worker.

    Args:
        environment: Where it runs.
        scratch: Folder for everything that libraries keep.
    """
    variables = {name: text for name, text in os.environ.items() if name.startswith(INHERITED)}
    programs = str(environment.interpreter.parent)
    ours = str(Path(sys.executable).parent)
    folders = [part for part in variables.get("PATH", "").split(os.pathsep) if part != ours]
    variables["PATH"] = os.pathsep.join([programs, *folders])
    variables.update(dict.fromkeys(LED_INTO_SCRATCH, str(scratch)))
    return variables | SETTLED

"""Making, checking and removing environments: once, under a lock, whole or absent.

uv makes them where it is installed, else venv and pip. slim's torch is shared by hard links
(copies where the disk is another): no download, no second copy, and the kind that this machine
needs. Packages are installed without looking at what they ask for, since the pins are all there
is: what was tried is what is installed."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

from slim.backends.environment import MARKER, Environment, variables_for
from slim.checkpoints.store import Store, reraise_full_disk
from slim.core.console import activity, progress_bar, say
from slim.core.errors import SlimError
from slim.core.hardware import free_disk
from slim.core.io import remove, write_json
from slim.core.text import gigabytes

# variables that would lead an environment to other packages than its own
LEADING_ELSEWHERE = (
    "PYTHONPATH", "PYTHONHOME", "PYTHONSTARTUP", "VIRTUAL_ENV", "CONDA_PREFIX", "PIP_TARGET",
    "PIP_PREFIX", "PIP_USER", "UV_PROJECT_ENVIRONMENT",
)  # fmt: skip
# what packages that are built from source need first
BUILD_TOOLS = ("setuptools", "wheel", "packaging", "ninja", "maturin", "pybind11", "numpy")
# what installers say where nothing answers
NO_NETWORK = (
    "Failed to establish a new connection", "Temporary failure in name resolution",
    "NameResolutionError", "ConnectTimeoutError", "Network is unreachable", "No route to host",
    "Connection refused", "error sending request", "dns error", "Failed to resolve",
)  # fmt: skip
NO_VERSION = ("No matching distribution found for ", "Because there is no version of ")
FULL_DISK = ("No space left on device", "os error 28", "Disk quota exceeded")
UNPACKED = 4  # bytes on disk for a byte of download, about
LAST_LINES = 12  # of an installer's output in an error


def make(environment: Environment) -> float:
    """Make an environment unless it is there.

    Args:
        environment: The environment.

    Returns:
        Seconds that it took; 0 where it was there.

    Raises:
        SlimError: A package or Python is not to be found, nothing answers, or the disk is full.
            Nothing is left then.
    """
    store = Store(environment.root)
    with store.lock(environment.folder):
        if environment.made:
            return 0.0
        remove(environment.folder)  # what a killed process left
        say(environment.plan())
        require_disk(environment)
        started = time.monotonic()
        try:
            with activity(f"environment {environment.name}"):
                versions = build(environment)
            seconds = round(time.monotonic() - started, 1)
            record = {
                "identity": environment.identity,
                "versions": versions,
                "bytes": disk_bytes(environment.folder),
                "seconds": seconds,
            }
            write_json(environment.folder / MARKER, record)
        except BaseException as error:
            remove(environment.folder)
            reraise_full_disk(error, environment.folder)
            raise
    say(f"{environment.folder.name} is made: {gigabytes(record['bytes'])} in {seconds:.0f} s.")
    return seconds


def require_disk(environment: Environment) -> None:
    """Raise ``SlimError`` where the disk has no room for an environment of known size."""
    needed = UNPACKED * (environment.pins.bytes or 0)
    free = free_disk(environment.root)
    if needed > free:
        raise SlimError(
            f"The environment of {environment.name} needs about {gigabytes(needed)} on disk, and "
            f"{gigabytes(free)} are free at {environment.root}.\n"
            "Free some space, or let SLIM_ENVIRONMENTS name a folder on another disk."
        )


def build(environment: Environment) -> dict[str, str]:
    """Make the folder, install the packages, and import what must be importable.

    Args:
        environment: Its folder does not exist yet.

    Returns:
        Package -> version of everything that is installed.
    """
    base = environment.base_python()
    uv = shutil.which("uv")
    create(environment, base, uv)
    if environment.torch_version is not None:
        link_torch(site_packages(environment))
    packages = list(environment.pins.packages)
    if environment.builds:
        tools = [package for package in packages if name_of(package) in BUILD_TOOLS]
        install(environment, tools, uv)
    install(environment, packages, uv)
    problem = import_problem(environment)
    if problem is not None:
        raise SlimError(
            f"The environment of {environment.name} was made, but does not work here: {problem}\n"
            "It is not kept. Its packages were tried with "
            "Python 3.11 on Linux; `python -m slim.backends make` tries again."
        )
    return installed_versions(environment)


def create(environment: Environment, base: Path, uv: str | None) -> None:
    """Make an environment without packages.

    Args:
        environment: Its folder does not exist yet.
        base: The interpreter that it gets.
        uv: The program; None: venv is used.
    """
    if uv is not None:
        command = [uv, "venv", "--quiet", "--no-project", "--python", str(base)]
    else:
        command = [str(base), "-m", "venv"]
        if has_pip() or not environment.pins.packages:
            command.append("--without-pip")  # slim's own pip installs into it: quicker to make
    run_installer(environment, [*command, str(environment.folder)])


def install(environment: Environment, packages: list[str], uv: str | None) -> None:
    """Install requirements, and nothing that they ask for.

    Args:
        environment: Made so far.
        packages: Pinned requirements.
        uv: The program; None: pip is used.
    """
    if not packages:
        return
    python = str(environment.interpreter)
    if uv is not None:
        command = [uv, "pip", "install", "--python", python, "--no-deps"]
    elif has_pip():
        command = [sys.executable, "-m", "pip", "--python", python, "install", "--no-deps"]
    else:
        command = [python, "-m", "pip", "install", "--no-deps"]
    if uv is None:
        command += ["--disable-pip-version-check", "--no-input", "--retries", "1"]
        command.append("--no-compile")  # done on first import, where it is needed
    if environment.builds:
        command.append("--no-build-isolation")
    run_installer(environment, [*command, *packages], len(packages))


def has_pip() -> bool:
    """Whether slim's own environment has pip (those that uv makes have none)."""
    return importlib.util.find_spec("pip") is not None


def run_installer(environment: Environment, command: list[str], total: int | None = None) -> None:
    """Run an installer and show how far it is.

    Args:
        environment: What it works on.
        command: The installer with its arguments.
        total: Packages that it is to install, for the bar; None: no bar.

    Raises:
        SlimError: It failed.
    """
    variables = {name: os.environ[name] for name in os.environ if name not in LEADING_ELSEWHERE}
    variables.update(environment.variables)
    process = subprocess.Popen(
        command, env=variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        errors="replace", stdin=subprocess.DEVNULL,
    )  # fmt: skip
    lines: deque[str] = deque(maxlen=400)
    try:
        with progress_bar(f"packages of {environment.name}", total) as advance:
            for line in process.stdout:
                lines.append(line.rstrip())
                if total and line.startswith(("Collecting ", "Processing ")):
                    advance()
        code = process.wait()
    finally:
        if process.poll() is None:  # Ctrl-C
            process.kill()
            process.wait()
    if code != 0:
        raise installer_error(environment, list(lines), code)


def installer_error(environment: Environment, lines: list[str], code: int) -> SlimError:
    """Return the error for an installer that failed: nothing answers, no such version, or what it
    said last.

    Args:
        environment: What it worked on.
        lines: Its output.
        code: Its exit code.
    """
    text = "\n".join(lines)
    name = environment.name
    if any(words in text for words in FULL_DISK):
        return SlimError(
            f"The disk is full: the environment of {name} could not be made in {environment.root}. "
            "Nothing half-made is left.\n"
            "Free some space, or let SLIM_ENVIRONMENTS name a folder on another disk."
        )
    if any(words in text for words in NO_NETWORK):
        return SlimError(
            f"The packages of {name} have to be fetched, and no package index answers. Nothing was "
            f"run, nothing half-made is left.\n"
            f"Connect this machine, or make the environment where there is a network: "
            f"python -m slim.backends make {name}"
        )
    for words in NO_VERSION:
        for line in lines:
            if words in line:
                missing = line.partition(words)[2].split(" ")[0].strip()
                return SlimError(
                    f"The environment of {name} cannot be made: there is no {missing} for Python "
                    f"{environment.python_version} on this machine. Correct the pinned version."
                )
    said = [line for line in lines if line.strip() and not line.startswith("WARNING: Location")]
    ending = " / ".join(said[-LAST_LINES:])[-600:]
    return SlimError(
        f"The environment of {name} could not be made (exit code {code}); nothing is left of it. "
        f"The installer said: {ending}"
    )


def name_of(requirement: str) -> str:
    """Return the name in a pinned requirement, as indexes write it."""
    return requirement.split("==")[0].split("@")[0].strip().lower().replace("_", "-")


def site_packages(environment: Environment) -> Path:
    """Return the folder of an environment that packages are installed into."""
    code = "import sysconfig; print(sysconfig.get_paths()['purelib'])"
    return Path(ask(environment, code).strip())


def ask(environment: Environment, code: str) -> str:
    """Return what a line of Python prints in an environment.

    Args:
        environment: An environment that is made so far.
        code: The line.

    Raises:
        SlimError: It fails; the message is the last line of its traceback.
    """
    done = subprocess.run(
        [str(environment.interpreter), "-s", "-E", "-c", code],
        capture_output=True, text=True, errors="replace", stdin=subprocess.DEVNULL,
        env=variables_for(environment, environment.folder),
    )  # fmt: skip
    if done.returncode != 0:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        lines = lines or [f"exit code {done.returncode}"]
        raise SlimError(lines[-1])
    return done.stdout


def import_problem(environment: Environment) -> str | None:
    """Say why the modules of an environment cannot be imported; None: they can."""
    if not environment.modules:
        return None
    try:
        ask(environment, f"import {', '.join(environment.modules)}")
    except SlimError as error:
        return str(error)
    return None


def installed_versions(environment: Environment) -> dict[str, str]:
    """Return package -> version of everything in an environment."""
    code = (
        "import json; from importlib.metadata import distributions as d; "
        "print(json.dumps({x.metadata['Name']: x.version for x in d()}))"
    )
    return dict(sorted(json.loads(ask(environment, code).splitlines()[-1]).items()))


def problems(environment: Environment) -> list[str]:
    """Return a sentence for everything that is wrong with an environment that was made."""
    sentences = []
    try:
        versions = installed_versions(environment)
    except (SlimError, OSError) as error:
        return [f"its Python does not run: {error}"]
    present = {name_of(name): number for name, number in versions.items()}
    for package in environment.pins.packages:
        name, equals, wanted = package.partition("==")
        number = present.get(name_of(package))
        if equals and number != wanted.strip():
            sentences.append(f"{name} is {number or 'missing'}, not {wanted}")
    problem = import_problem(environment)
    if problem is not None:
        sentences.append(problem)
    return sentences


def link_torch(target: Path) -> None:
    """Share slim's torch, and the libraries of the GPU's maker that it needs, with an environment.

    Args:
        target: The environment's folder of packages.
    """
    for shared in torch_distributions():
        for file in shared.files or ():
            if ".." in file.parts:  # programs next to the interpreter
                continue
            source, copy = Path(shared.locate_file(file)), target / file
            if not source.is_file() or copy.exists():
                continue
            copy.parent.mkdir(parents=True, exist_ok=True)
            try:
                os.link(source.resolve(), copy)
            except OSError:  # another disk, or a file system without links
                shutil.copyfile(source, copy)


def torch_distributions() -> Iterator[Distribution]:
    """Yield slim's torch, and those of its requirements that only it brings."""
    waiting, seen = ["torch"], set()
    while waiting:
        name = waiting.pop()
        if name in seen:
            continue
        seen.add(name)
        try:
            shared = distribution(name)
        except PackageNotFoundError:  # for another system
            continue
        yield shared
        for requirement in shared.requires or ():
            needed = requirement.split(";")[0].split("[")[0].split(" ")[0]
            needed = needed.split("=")[0].split("<")[0].split(">")[0].split("~")[0].split("!")[0]
            if needed.lower().startswith(("nvidia-", "triton", "cuda-", "pytorch-triton")):
                waiting.append(needed)


def disk_bytes(folder: Path) -> int:
    """Return the bytes that a folder takes by itself: files shared by links do not count."""
    total = 0
    for path in folder.rglob("*"):
        state = path.lstat()
        if path.is_file() and state.st_nlink == 1:
            total += state.st_size
    return total


def remove_environment(environment_folder: Path) -> bool:
    """Remove an environment.

    Args:
        environment_folder: Its folder.

    Returns:
        False where another process is making it: it is left alone.
    """
    store = Store(environment_folder.parent)
    with store.lock_if_free(environment_folder) as free:
        if free:
            # first: without its marker it is none, however far the removal gets
            (environment_folder / MARKER).unlink(missing_ok=True)
            remove(environment_folder)
    return free

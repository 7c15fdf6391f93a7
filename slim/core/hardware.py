"""What this machine is and has: for limits before work, for facts that hold on one machine only,
and for the record."""

from __future__ import annotations

import contextlib
import ctypes
import platform
import shutil
import subprocess
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

MMAP_THRESHOLD, TRIM_THRESHOLD = -3, -1  # of malloc.h
RECORDED_PACKAGES = (
    "slim", "torch", "transformers", "peft", "lightning", "lm-eval", "compressed-tensors",
    "bitsandbytes", "datasets",
)  # fmt: skip


@cache
def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that results depend on."""
    installed = {"python": platform.python_version()}
    for package in RECORDED_PACKAGES:
        try:
            installed[package] = version(package)
        except PackageNotFoundError:  # some are extras, and slim itself may run from a checkout
            continue
    return installed


@cache
def git_commit() -> str | None:
    """Return the commit of slim's own checkout, with ``+`` where files differ from it; None outside
    a checkout."""
    root = Path(__file__).parent.parent.parent
    if not (root / ".git").exists():
        return None
    try:
        commit = _git(root, "rev-parse", "HEAD")
        if _git(root, "status", "--porcelain", "--untracked-files=no"):
            commit += "+"
        return commit
    except (OSError, subprocess.SubprocessError):
        return None


def _git(root: Path, *arguments: str) -> str:
    result = subprocess.run(
        ["git", "-C", str(root), *arguments], capture_output=True, text=True, timeout=10, check=True
    )
    return result.stdout.strip()


def pick_device(device: str) -> str:
    """Return the torch device for ``auto``, ``cpu`` or ``cuda``. Raises ``SlimError`` for a GPU
    that is not there."""
    from slim.core.errors import SlimError
    from slim.core.settings import require_choice

    require_choice("device", device, ("auto", "cpu", "cuda"))
    if device == "cpu":
        return "cpu"
    if device == "auto" and not _may_have_gpu():
        return "cpu"
    import torch

    if torch.cuda.is_available():
        return "cuda"
    if device == "cuda":
        raise SlimError("device=cuda, but torch finds no GPU here. Use device=cpu or device=auto.")
    return "cpu"


def _may_have_gpu() -> bool:
    """Tell without importing torch, which takes seconds, whether a GPU is worth asking for."""
    return (
        Path("/dev/nvidiactl").exists()
        or Path("/dev/kfd").exists()
        or platform.system() == "Windows"
    )


def fingerprint(device: str) -> dict:
    """Return what speed and memory figures depend on besides the checkpoint."""
    import torch

    machine = {
        "host": platform.node(),
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    if device == "cuda":
        machine["gpu"] = torch.cuda.get_device_name()
    return machine


def _processor() -> str:
    """Return the processor's name; the architecture alone where the system does not tell it."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def available_memory(device: str) -> int | None:
    """Return the bytes of memory that can still be taken on the device, or None where that cannot
    be told."""
    if device == "cuda":
        import torch

        return torch.cuda.mem_get_info()[0]
    info = Path("/proc/meminfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return None


def free_disk(folder: Path) -> int:
    """Return the free bytes on the disk where ``folder`` is or will be."""
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def map_large_tensors() -> None:
    """Let tensors of 2 MiB and more have pages of their own, which go back to the system with them,
    where malloc can.

    By itself glibc raises that limit, up to 32 MiB, with every such tensor that is freed: later
    ones then lie in a heap whose holes nobody can use."""
    with contextlib.suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).mallopt(MMAP_THRESHOLD, 2**21)
        ctypes.CDLL(None).mallopt(TRIM_THRESHOLD, 2**25)


def trim_heap() -> None:
    """Give freed memory back to the system, where the C library can; what malloc keeps for later
    counts as in use."""
    with contextlib.suppress(AttributeError, OSError, TypeError):  # only glibc has it
        ctypes.CDLL(None).malloc_trim(0)

"""Memory of a worker's own process. Runs in the engine's environment: the standard library only."""

from contextlib import suppress
from pathlib import Path


def process_bytes(field):
    """Return ``VmRSS`` or its peak ``VmHWM`` in bytes; None where the system does not tell."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    return None


def reset_peak():
    """Count the peak from now, where the system allows it."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def difference(after, before):
    """Return the bytes that were added; None where one of them is not known."""
    if after is None or before is None:
        return None
    return max(0, after - before)

"""What workers share: the order of timed runs, and the memory of the worker's own process.

Runs in the engine's environment: the standard library only.
"""

from contextlib import suppress
from pathlib import Path


def timed_runs(request, timed):
    """Return what ``timed(prompt)`` returns for every prompt once, then for every prompt again,
    after runs that are not counted."""
    prompts = request["prompts"]
    for run in range(request["warmup"] if prompts else 0):
        timed(prompts[run % len(prompts)])
    runs = []
    for _ in range(request["repeats"]):
        for prompt in prompts:
            runs.append(timed(prompt))
    return runs


def memory_before():
    """Count the peak from now, where the system allows it, and return what is held already."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    return process_bytes("VmRSS")


def memory_since(before):
    """Return the two entries of the answer: what is held more than ``before``, now and at most."""
    return {
        "resident_bytes": difference(process_bytes("VmRSS"), before),
        "peak_bytes": difference(process_bytes("VmHWM"), before),
    }


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


def difference(after, before):
    """Return the bytes that were added; None where one of them is not known."""
    if after is None or before is None:
        return None
    return max(0, after - before)

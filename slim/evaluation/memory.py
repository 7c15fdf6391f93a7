"""Memory that a model takes: its tensors, exactly, and what the process or the GPU holds for it, as measured."""

from __future__ import annotations

import gc
import itertools
import os
from collections.abc import Iterator
from pathlib import Path

from slim.machine import trim_heap

STATUS = Path("/proc/self/status")
ONE_THREAD = "HF_DEACTIVATE_ASYNC_LOAD"
CLEAR_REFS = Path("/proc/self/clear_refs")


def weights_bytes(model) -> int:
    """Return the bytes of all parameters and buffers of a torch module, packed ones included, shared ones once."""
    sizes = {}
    for tensor in itertools.chain(model.parameters(), model.buffers(), statistics(model)):
        sizes[tensor.device, tensor.data_ptr(), tensor.nbytes] = tensor.nbytes
    return sum(sizes.values())


def statistics(model) -> Iterator:
    """Yield the scales and tables that bitsandbytes' layers keep outside their parameters and buffers."""
    for module in model.modules():
        weight, product = getattr(module, "weight", None), getattr(module, "state", None)
        outer = getattr(weight, "quant_state", None)
        for holder in (weight, product, outer, getattr(outer, "state2", None)):
            found = (getattr(holder, name, None) for name in ("SCB", "absmax", "code", "offset"))
            yield from (tensor for tensor in found if hasattr(tensor, "data_ptr"))


class MemoryMeter:
    """Measures what the body of a ``with`` adds to the memory in use, in bytes::

        with MemoryMeter(device) as meter:
            model = load_model(...)
            ...
        meter.resident  # still held at the end
        meter.peak      # most at any moment

    On a GPU by torch's own counters; on a Linux CPU by the process's resident set, with what malloc keeps for later
    given back first. Both are None where there is no such counter (macOS, a restricted container).

    Inside, transformers loads weights in the calling thread: what its loader threads allocate stays, once freed, in
    heaps of theirs that cannot be given back, and the next model would seem to need no memory.
    """

    def __init__(self, device: str = "cpu"):
        self.cuda = str(device).startswith("cuda")
        self.device = device
        self.resident: int | None = None
        self.peak: int | None = None

    def __enter__(self) -> MemoryMeter:
        self._setting = os.environ.get(ONE_THREAD)
        os.environ[ONE_THREAD] = "1"
        release()
        self._reset = self._reset_peak()
        self._before = self._read("VmRSS")
        return self

    def __exit__(self, *_) -> None:
        if self._setting is None:
            del os.environ[ONE_THREAD]
        else:
            os.environ[ONE_THREAD] = self._setting
        peak = self._read("VmHWM") if self._reset else None
        release()
        now = self._read("VmRSS")
        if now is not None and self._before is not None:
            self.resident = max(0, now - self._before)
            self.peak = None if peak is None else max(self.resident, peak - self._before)

    def _read(self, field: str) -> int | None:
        if not self.cuda:
            return process_bytes(field)
        import torch

        torch.cuda.synchronize(self.device)
        counter = torch.cuda.memory_allocated if field == "VmRSS" else torch.cuda.max_memory_allocated
        return counter(self.device)

    def _reset_peak(self) -> bool:
        """Make the peak counter start from now; say whether that worked."""
        if not self.cuda:
            return reset_process_peak()
        import torch

        torch.cuda.reset_peak_memory_stats(self.device)
        return True


def release() -> None:
    """Collect garbage and give the heap's free pages back to the system, where the C library can."""
    gc.collect()
    trim_heap()


def process_bytes(field: str) -> int | None:
    """Return a size from ``/proc/self/status``: ``VmRSS`` (resident now) or ``VmHWM`` (its peak); None if not there."""
    try:
        lines = STATUS.read_text().splitlines()
    except OSError:
        return None
    values = [int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":")]
    return values[0] if values else None


def reset_process_peak() -> bool:
    """Set ``VmHWM`` to the present ``VmRSS``; return whether the kernel allowed it."""
    try:
        CLEAR_REFS.write_text("5")
    except OSError:
        return False
    return True

"""Memory that a model takes: its tensors, exactly, and what the process or the GPU holds for it, as
measured."""

from __future__ import annotations

import gc
import itertools
import os
from collections.abc import Iterator
from pathlib import Path

from slim.core.hardware import trim_heap

STATUS = Path("/proc/self/status")
ONE_THREAD = "HF_DEACTIVATE_ASYNC_LOAD"
CLEAR_REFS = Path("/proc/self/clear_refs")


def weights_bytes(model) -> int:
    """Return the bytes of all parameters and buffers of a torch module, packed ones included,
    shared ones once."""
    sizes = {}
    for tensor in itertools.chain(model.parameters(), model.buffers(), statistics(model)):
        sizes[tensor.device, tensor.data_ptr(), tensor.nbytes] = tensor.nbytes
    return sum(sizes.values())


def statistics(model) -> Iterator:
    """Yield the scales and tables that bitsandbytes' layers keep outside their parameters and
    buffers."""
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

    On a GPU by torch's own counters; on a Linux CPU by the process's resident set, with what malloc
    keeps for later given back first. Both are None where there is no such counter (macOS, a
    restricted container).

    Inside, transformers loads weights in the calling thread: what its loader threads allocate
    stays, once freed, in heaps of theirs that cannot be given back, and the next model would seem
    to need no memory."""

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

    def peak_so_far(self) -> int | None:
        """Return the most held beyond the start since then, or since :meth:`restart_peak`."""
        peak = self._read("VmHWM") if self._reset else None
        return None if peak is None or self._before is None else max(0, peak - self._before)

    def restart_peak(self) -> None:
        """Count the peak from now."""
        self._reset = self._reset_peak()

    def _read(self, field: str) -> int | None:
        if not self.cuda:
            return process_bytes(field)
        import torch

        torch.cuda.synchronize(self.device)
        counter = (
            torch.cuda.memory_allocated if field == "VmRSS" else torch.cuda.max_memory_allocated
        )
        return counter(self.device)

    def _reset_peak(self) -> bool:
        """Make the peak counter start from now; say whether that worked."""
        if not self.cuda:
            return reset_process_peak()
        import torch

        torch.cuda.reset_peak_memory_stats(self.device)
        return True


def phase_peaks(model, prompt: list[int], new_tokens: int) -> dict[str, float]:
    """Return what generating takes on top of the idle model, in bytes; a run of its own, which
    nothing times.

    ``prefill_peak_bytes`` and ``decode_peak_bytes``: most held at any moment of each phase (missing
    where the machine cannot tell). ``cache_bytes_per_token``: the key/value cache after the prompt,
    per token of it."""
    import torch

    from slim.evaluation.generation import decode, prefill

    ids = torch.tensor([prompt], device=model.device)
    meter, found = MemoryMeter(model.device.type), {}
    with torch.inference_mode(), meter:
        token, cache = prefill(model, ids)
        found["prefill_peak_bytes"] = meter.peak_so_far()
        held = cache_bytes(cache)
        meter.restart_peak()
        for _ in itertools.islice(decode(model, token, cache), new_tokens - 1):
            pass
        found["decode_peak_bytes"] = meter.peak_so_far()
    found["cache_bytes_per_token"] = held / len(prompt) if held else None
    return {name: float(value) for name, value in found.items() if value is not None}


def cache_bytes(cache) -> int:
    """Return the bytes of the keys and values in a cache of transformers."""
    tensors = [
        getattr(layer, name, None)
        for layer in getattr(cache, "layers", ())
        for name in ("keys", "values")
    ]
    return sum(tensor.nbytes for tensor in tensors if hasattr(tensor, "nbytes"))


def release() -> None:
    """Collect garbage and give the heap's free pages back to the system, where the C library
    can."""
    gc.collect()
    trim_heap()


def process_bytes(field: str) -> int | None:
    """Return a size from ``/proc/self/status``: ``VmRSS`` (resident now) or ``VmHWM`` (its peak);
    None if not there."""
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

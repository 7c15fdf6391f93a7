"""Memory that a model takes: its tensors, exactly, and what the process or the GPU holds for it, as
measured."""

from __future__ import annotations

import gc
import itertools
import os
from collections.abc import Iterator
from pathlib import Path

from slim.core.hardware import trim_heap
from slim.evaluation.generation import decode, prefill

STATUS = Path("/proc/self/status")
# transformers' environment variable: load weights in the calling thread
ONE_THREAD = "HF_DEACTIVATE_ASYNC_LOAD"
# writing 5 here makes the kernel count the peak from now (proc(5))
CLEAR_REFS = Path("/proc/self/clear_refs")
# where bitsandbytes keeps scales, code tables and offsets, in 8 and in 4 bits
STATISTICS = ("SCB", "absmax", "code", "offset")


def weights_bytes(model) -> int:
    """Return the bytes of all parameters and buffers of a torch module, packed ones included,
    shared ones once."""
    sizes = {}
    for tensor in itertools.chain(model.parameters(), model.buffers(), statistics(model)):
        # views of the same memory are one entry: tied embeddings, for example
        sizes[tensor.device, tensor.data_ptr(), tensor.nbytes] = tensor.nbytes
    return sum(sizes.values())


def statistics(model) -> Iterator:
    """Yield the scales and tables that bitsandbytes' layers keep outside their parameters and
    buffers."""
    for module in model.modules():
        weight = getattr(module, "weight", None)
        product = getattr(module, "state", None)  # of the last product in 8 bits
        outer = getattr(weight, "quant_state", None)
        inner = getattr(outer, "state2", None)  # of scales that are themselves quantised
        for holder in (weight, product, outer, inner):
            for name in STATISTICS:
                tensor = getattr(holder, name, None)
                if hasattr(tensor, "data_ptr"):
                    yield tensor


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
    to need no memory.

    Attributes:
        device: ``"cpu"`` or a GPU, such as ``"cuda"``.
        resident: bytes still held at the end; None before that.
        peak: most bytes held at any moment; None before the end.
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
        peak = self._peak()  # before release, which may need memory itself
        release()
        now = self._read("VmRSS")
        if now is None or self._before is None:
            return
        # earlier garbage may be freed inside, which would make the difference negative
        self.resident = max(0, now - self._before)
        if peak is not None:
            self.peak = max(self.resident, peak - self._before)

    def peak_so_far(self) -> int | None:
        """Return the most held beyond the start since then, or since :meth:`restart_peak`."""
        peak = self._peak()
        if peak is None or self._before is None:
            return None
        return max(0, peak - self._before)

    def restart_peak(self) -> None:
        """Count the peak from now."""
        self._reset = self._reset_peak()

    def _peak(self) -> int | None:
        """Return the peak counter; None where it could not be reset and counts from long ago."""
        if not self._reset:
            return None
        return self._read("VmHWM")

    def _read(self, field: str) -> int | None:
        """Return bytes in use, ``VmRSS``, or their peak, ``VmHWM``, on a GPU too."""
        if not self.cuda:
            return process_bytes(field)
        import torch

        torch.cuda.synchronize(self.device)  # what is still queued allocates too
        if field == "VmRSS":
            return torch.cuda.memory_allocated(self.device)
        return torch.cuda.max_memory_allocated(self.device)

    def _reset_peak(self) -> bool:
        """Make the peak counter start from now; say whether that worked."""
        if not self.cuda:
            return reset_process_peak()
        import torch

        torch.cuda.reset_peak_memory_stats(self.device)
        return True


def phase_peaks(model, prompt: list[int], new_tokens: int) -> dict[str, float]:
    """Measure what generating takes on top of the idle model, in a run of its own that nothing
    times.

    Args:
        model: a torch module of transformers.
        prompt: tokens.
        new_tokens: tokens generated after it.

    Returns:
        ``prefill_peak_bytes`` and ``decode_peak_bytes``: most held at any moment of each phase
        (missing where the machine cannot tell). ``cache_bytes_per_token``: the key/value cache
        after the prompt, per token of it.
    """
    import torch

    ids = torch.tensor([prompt], device=model.device)
    meter = MemoryMeter(model.device.type)
    peaks = {}
    with torch.inference_mode(), meter:
        token, cache = prefill(model, ids)
        peaks["prefill_peak_bytes"] = meter.peak_so_far()
        cached = cache_bytes(cache)
        meter.restart_peak()
        for _ in itertools.islice(decode(model, token, cache), new_tokens - 1):
            pass
        peaks["decode_peak_bytes"] = meter.peak_so_far()
    metrics = {name: float(peak) for name, peak in peaks.items() if peak is not None}
    if cached:
        metrics["cache_bytes_per_token"] = cached / len(prompt)
    return metrics


def cache_bytes(cache) -> int:
    """Return the bytes of the keys and values in a cache of transformers."""
    total = 0
    for layer in getattr(cache, "layers", ()):
        # a layer that has read nothing yet has None in their place
        for tensor in (getattr(layer, "keys", None), getattr(layer, "values", None)):
            total += getattr(tensor, "nbytes", 0)
    return total


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
    for line in lines:
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024  # told in KiB
    return None


def reset_process_peak() -> bool:
    """Set ``VmHWM`` to the present ``VmRSS``; return whether the kernel allowed it."""
    try:
        CLEAR_REFS.write_text("5")
    except OSError:
        return False
    return True

"""The type in which people would run a model on this machine, found by a short measurement.

On a CPU neither float32 nor bfloat16 is always the faster one: without instructions for bfloat16
(AVX2) it reads a prompt several times as slowly, though it writes twice as fast, being half as
large. So a prompt and an answer of ordinary lengths are timed in both, once per machine; the result
is kept in the store, and every checkpoint of every chain is timed in that type.
"""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING

from slim.checkpoints.store import digest
from slim.core.errors import SlimError
from slim.core.hardware import fingerprint
from slim.core.io import read_json, write_json
from slim.core.lazy import LazyModule

if TYPE_CHECKING:
    import torch

    from slim.checkpoints.store import Store
else:
    torch = LazyModule("torch")

DTYPES = ("float32", "bfloat16")
# a stack of matrices too large for most caches, as those of real models are: 50 million bytes in
# bfloat16
HIDDEN, WIDE, MATRICES = 1024, 4096, 6
PROMPT, ANSWER = 128, 32  # tokens
REPEATS = 3
# bfloat16 must be faster by this much: quality is measured in float32, on the same loaded model
MARGIN = 0.9


def machine_dtype(store: Store) -> str:
    """Return ``"float32"`` or ``"bfloat16"``: what is faster on the CPUs of this machine.

    Args:
        store: keeps the measurement, below ``machines/``, for as long as processor, number of
            threads and version of torch stay the same.
    """
    machine = fingerprint("cpu")
    path = store.root / "machines" / f"{digest(machine)}.json"
    with store.lock(path):
        kept = _read(path)
        if kept in DTYPES:
            return kept
        seconds = {dtype: generation_seconds(dtype) for dtype in DTYPES}
        chosen = faster(seconds)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, {"dtype": chosen, "seconds": seconds, "machine": machine})
    return chosen


def _read(path) -> str | None:
    try:
        return read_json(path).get("dtype")
    except (SlimError, OSError, AttributeError):  # none yet, or damaged: it is measured again
        return None


def faster(seconds: dict[str, float]) -> str:
    """Return the type to time checkpoints in, given the seconds that each takes."""
    return "bfloat16" if seconds["bfloat16"] < MARGIN * seconds["float32"] else "float32"


def generation_seconds(dtype: str) -> float:
    """Time the matrix products of a prompt and an answer.

    Args:
        dtype: of weights and activations.

    Returns:
        Seconds: the least of several repetitions, since others may use the machine too.
    """
    kind = getattr(torch, dtype)
    weights = []
    for number in range(MATRICES):
        shape = (HIDDEN, WIDE) if number % 2 == 0 else (WIDE, HIDDEN)
        weights.append((torch.rand(shape) / math.sqrt(shape[0])).to(kind))
    prompt, token = torch.rand(PROMPT, HIDDEN).to(kind), torch.rand(1, HIDDEN).to(kind)
    with torch.inference_mode():
        _seconds(weights, token)  # the first pass also loads the libraries
        reading = min(_seconds(weights, prompt) for _ in range(REPEATS))
        writing = min(_seconds(weights, token) for _ in range(REPEATS))
    return reading + ANSWER * writing


def _seconds(weights: list[torch.Tensor], states: torch.Tensor) -> float:
    started = time.perf_counter()
    for weight in weights:
        states = states @ weight
    return time.perf_counter() - started

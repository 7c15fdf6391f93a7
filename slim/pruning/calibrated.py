"""What criteria that look at calibration samples share: their windows, loading, and the memory of a
forward."""

from __future__ import annotations

import dataclasses

from slim.calibration.loaded_blocks import LOGITS_AT_ONCE
from slim.checkpoints.checkpoint import Checkpoint
from slim.checkpoints.stage import Context
from slim.core.settings import require_number
from slim.data.calibration import Calibration
from slim.models.spec import DTYPE_BYTES, ModelSpec, resolve_dtype
from slim.quantization.storage import weight_bytes

# What torch, transformers and a picture take by themselves on a CPU (measured: 450 to 500 MB over
# the interpreter).
LIBRARY_BYTES = 500_000_000


def chosen_windows(
    calibration: Calibration, samples: int | None, length: int | None
) -> Calibration:
    """Return ``calibration`` with the pruner's own number and length of windows where it has
    them."""
    changes = {"samples": samples, "length": length}
    for name, low in (("samples", 1), ("length", 8)):
        if changes[name] is not None:
            require_number(f"pruner.{name}", changes[name], low, integer=True)
    windows = dataclasses.replace(
        calibration, **{name: value for name, value in changes.items() if value is not None}
    )
    if samples is not None:
        windows.samples_setting = "pruner.samples"
    if length is not None:
        windows.length_setting = "pruner.length"
    return windows


def load_with_tokens(source: Checkpoint, windows: Calibration, context: Context):
    """Return the loaded model and its calibration tokens, int64 [samples, length], on the CPU."""
    from slim.loading.load_model import load_model

    tokens = windows.tokens_for(source)
    return load_model(source.folder, device=context.device), tokens


def forward_bytes(spec: ModelSpec, device: str, samples: int, length: int) -> int:
    """Estimate weights, one block's activations for ``samples`` windows at a time, and some tokens'
    logits."""
    dtype = resolve_dtype(spec, "auto", device)
    width = DTYPE_BYTES.get(dtype, 4)
    tokens = samples * min(length, spec.context_length)
    block = (
        tokens
        * (8 * spec.hidden_size + 4 * spec.intermediate_size + 4 * spec.heads * spec.head_dim)
        * width
    )
    # as computed, in float32, their softmax, its gradient
    logits = min(LOGITS_AT_ONCE, tokens * spec.vocab_size)
    return LIBRARY_BYTES + weight_bytes(spec, dtype) + block + 4 * 4 * logits


def shard_bytes(spec: ModelSpec) -> int:
    """Estimate what copying the largest tensor to a checkpoint takes."""
    return spec.vocab_size * spec.hidden_size * DTYPE_BYTES.get(spec.dtype, 4)

"""What criteria that look at calibration samples share: their windows, loading, and the memory of a forward."""

from __future__ import annotations

import dataclasses

from slim.architecture import DTYPE_BYTES, ModelDescription
from slim.checkpoint import Checkpoint, resolve_dtype
from slim.data.calibration import Calibration
from slim.pruning.forward import LOGITS_AT_ONCE
from slim.settings import require_number
from slim.stage import Context

# What torch, transformers and a picture take by themselves on a CPU (measured: 450 to 500 MB over the interpreter).
LIBRARY_BYTES = 500_000_000


def chosen_windows(calibration: Calibration, samples: int | None, length: int | None) -> Calibration:
    """Return ``calibration`` with the pruner's own number and length of windows where it has them."""
    changes = {"samples": samples, "length": length}
    for name, low in (("samples", 1), ("length", 8)):
        if changes[name] is not None:
            require_number(f"pruner.{name}", changes[name], low, integer=True)
    return dataclasses.replace(calibration, **{name: value for name, value in changes.items() if value is not None})


def load_with_tokens(source: Checkpoint, windows: Calibration, context: Context):
    """Return the loaded model and its calibration tokens, int64 [samples, length], on the CPU."""
    from slim.checkpoint import load_model, load_tokenizer

    tokens = windows.tokens(load_tokenizer(source.folder), source.description.context_length)
    return load_model(source.folder, device=context.device), tokens


def forward_bytes(model: ModelDescription, device: str, samples: int, length: int) -> int:
    """Estimate weights, one block's activations for ``samples`` windows at a time, and some tokens' logits."""
    dtype = resolve_dtype(model, "auto", device)
    width = DTYPE_BYTES.get(dtype, 4)
    tokens = samples * min(length, model.context_length)
    block = tokens * (8 * model.hidden_size + 4 * model.intermediate_size + 4 * model.heads * model.head_dim) * width
    logits = min(LOGITS_AT_ONCE, tokens * model.vocab_size)  # as computed, in float32, their softmax, its gradient
    return LIBRARY_BYTES + model.weight_bytes(dtype) + block + 4 * 4 * logits


def shard_bytes(model: ModelDescription) -> int:
    """Estimate what copying the largest tensor to a checkpoint takes."""
    return model.vocab_size * model.hidden_size * DTYPE_BYTES.get(model.dtype, 4)

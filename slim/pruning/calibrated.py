"""What criteria share: checks of settings, windows of calibration text, loading, and the memory of
a forward pass."""

from __future__ import annotations

import dataclasses
from typing import Any

from slim.calibration.loaded_blocks import LOGITS_AT_ONCE
from slim.checkpoints.checkpoint import Checkpoint
from slim.checkpoints.stage import Context
from slim.core.errors import SlimError
from slim.core.settings import require_number
from slim.data.calibration import Calibration
from slim.models.spec import DTYPE_BYTES, ModelSpec, resolve_dtype
from slim.quantization.storage import weight_bytes

# What torch, transformers and a picture take by themselves on a CPU (measured: 450 to 500 MB over
# the interpreter).
LIBRARY_BYTES = 500_000_000


def require_share(setting: str, value: Any, example: float, meaning: str) -> None:
    """Require a number between 0 and 1, both excluded.

    Args:
        setting: as the user types it.
        value: of the setting.
        example: of a value.
        meaning: what the share is of, for the message.
    """
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not 0 < value < 1:
        raise SlimError(
            f"{setting}={value}: must be a number between 0 and 1, such as {example}: {meaning}. "
            "Use pruner=none to leave the model as it is."
        )


def chosen_windows(
    calibration: Calibration, samples: int | None, length: int | None
) -> Calibration:
    """Return ``calibration`` with a pruner's own windows.

    Args:
        calibration: the text and its windows.
        samples: number of windows, 1 or more; None: the calibration's.
        length: tokens per window, 8 or more; None: the calibration's.
    """
    if samples is not None:
        require_number("pruner.samples", samples, 1, integer=True)
        calibration = dataclasses.replace(calibration, samples=samples)
        calibration.samples_setting = "pruner.samples"
    if length is not None:
        require_number("pruner.length", length, 8, integer=True)
        calibration = dataclasses.replace(calibration, length=length)
        calibration.length_setting = "pruner.length"
        if samples is not None:
            calibration.samples_setting = "pruner.samples"
    return calibration


def load_with_tokens(source: Checkpoint, windows: Calibration, context: Context):
    """Return the loaded model and its calibration tokens, int64 [samples, length], on the CPU."""
    # imports torch
    from slim.loading.load_model import load_model

    tokens = windows.tokens_for(source)
    return load_model(source.folder, device=context.device), tokens


def forward_bytes(spec: ModelSpec, device: str, samples: int, length: int) -> int:
    """Estimate the peak memory of a forward pass, in bytes: weights, one block's activations, and
    some tokens' logits.

    Args:
        spec: the model.
        device: torch device, which decides the type of the weights.
        samples: windows that go forward together.
        length: tokens per window.
    """
    dtype = resolve_dtype(spec, "auto", device)
    width = DTYPE_BYTES.get(dtype, 4)
    tokens = samples * min(length, spec.context_length)
    per_token = 8 * spec.hidden_size + 4 * spec.intermediate_size + 4 * spec.heads * spec.head_dim
    block = tokens * per_token * width
    # as computed, in float32, their softmax, its gradient
    logits = min(LOGITS_AT_ONCE, tokens * spec.vocab_size)
    return LIBRARY_BYTES + weight_bytes(spec, dtype) + block + 4 * 4 * logits


def shard_bytes(spec: ModelSpec) -> int:
    """Estimate what copying the largest tensor to a checkpoint takes."""
    return spec.vocab_size * spec.hidden_size * DTYPE_BYTES.get(spec.dtype, 4)

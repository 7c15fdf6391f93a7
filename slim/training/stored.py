"""What is left of a training once its weights are rounded to the type they are stored in."""

from __future__ import annotations

import torch
from torch import nn

from slim.checkpoints.checkpoint import Checkpoint
from slim.checkpoints.reader import TensorReader
from slim.core.console import say, warn
from slim.pruning.masks import mask_of, restore_zeros

# A share of zeros that no dense model has; one that was pruned elsewhere has.
UNTOLD_ZEROS = 0.1


def finalize(model: nn.Module, source: Checkpoint) -> dict:
    """Bring a trained plain model to the numbers that will be stored.

    Args:
        model: The trained model, changed in place.
        source: The checkpoint it was made from.

    Returns:
        ``weights_changed`` (share of all weights that differ from the source's) and, for a source
        with a mask, ``zeros_restored`` (how many zeros the training had moved).
    """
    metadata = keep_zeros(model, source)
    round_to(model, source.spec.dtype)
    changed, zeros = compare_weights(model, source)
    if mask_of(source) is None and zeros > UNTOLD_ZEROS:
        warn(
            "Training fills them. To keep them, first prune the source once more with "
            "pruner=magnitude_weights and its sparsity: that records a mask.",
            head=f"{zeros:.0%} of the source's weights are zero, and no mask says so.",
        )
    return metadata | {"weights_changed": changed}


@torch.no_grad()
def round_to(model: nn.Module, dtype: str) -> None:
    """Round the parameters in place; they keep the type they compute in.

    Args:
        model: Any.
        dtype: Torch's name of the type, such as ``bfloat16``.
    """
    for parameter in model.parameters():
        parameter.copy_(parameter.to(getattr(torch, dtype)))


@torch.no_grad()
def compare_weights(model: nn.Module, source: Checkpoint) -> tuple[float, float]:
    """Compare a trained model with its source, in the type that the source stores.

    An update much smaller than a weight is lost in rounding: bfloat16 keeps 8 bits of precision.

    Args:
        model: With the names of the source.
        source: The checkpoint it was made from.

    Returns:
        The share of all weights that differ, and the share that is zero in the source.
    """
    reader = TensorReader(source)
    changed = zeros = total = 0
    for name, parameter in model.named_parameters():
        before = reader.read(name)
        changed += int((parameter.detach().cpu().to(before.dtype) != before).sum())
        zeros += int((before == 0).sum())
        total += before.numel()
    return changed / total, zeros / total


def keep_zeros(model: nn.Module, source: Checkpoint) -> dict:
    """Where the source is pruned weight by weight, set its zeros to zero again.

    Training moves every weight. The zeros are put back before the result is measured, so the loss
    reported is that of the pruned model.

    Args:
        model: The trained model, changed in place.
        source: The checkpoint it was made from.

    Returns:
        ``zeros_restored``: how many had moved; empty for a dense source.
    """
    if mask_of(source) is None:
        return {}
    restored = restore_zeros(model, source)
    say(
        f"The source is pruned weight by weight: {restored:,} trained weights were set back to "
        "zero."
    )
    return {"zeros_restored": restored}

"""What is left of a training once its weights are rounded to the type they are stored in."""

from __future__ import annotations

import torch
from torch import nn

from slim.checkpoint import Checkpoint, TensorReader


@torch.no_grad()
def round_to(model: nn.Module, dtype: str) -> None:
    """Round the parameters to ``dtype`` (``"bfloat16"``), in place; they keep the type they compute in."""
    for parameter in model.parameters():
        parameter.copy_(parameter.to(getattr(torch, dtype)))


@torch.no_grad()
def weights_changed(model: nn.Module, source: Checkpoint) -> float:
    """Return the share of all stored weights that differ from those in ``source``, in the type ``source`` stores.

    An update much smaller than a weight is lost in rounding: bfloat16 keeps 8 bits of precision.
    """
    reader = TensorReader(source)
    changed = total = 0
    for name, parameter in model.named_parameters():
        before = reader.read(name)
        changed += int((parameter.detach().cpu().to(before.dtype) != before).sum())
        total += before.numel()
    return changed / total

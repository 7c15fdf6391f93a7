"""What is left of a training once its weights are rounded to the type they are stored in."""

from __future__ import annotations

import torch
from torch import nn

from slim.checkpoints.checkpoint import Checkpoint
from slim.checkpoints.reader import TensorReader
from slim.core.console import say
from slim.pruning.masks import mask_of, restore_zeros


def finalize(model: nn.Module, source: Checkpoint) -> dict:
    """Bring a trained plain model to the numbers that will be stored; return facts about what that
    changed."""
    facts = keep_zeros(model, source)
    round_to(model, source.spec.dtype)
    return facts | {"weights_changed": weights_changed(model, source)}


@torch.no_grad()
def round_to(model: nn.Module, dtype: str) -> None:
    """Round the parameters to ``dtype`` (``"bfloat16"``), in place; they keep the type they compute
    in."""
    for parameter in model.parameters():
        parameter.copy_(parameter.to(getattr(torch, dtype)))


@torch.no_grad()
def weights_changed(model: nn.Module, source: Checkpoint) -> float:
    """Return the share of all stored weights that differ from those in ``source``, in the type
    ``source`` stores.

    An update much smaller than a weight is lost in rounding: bfloat16 keeps 8 bits of precision.
    """
    reader = TensorReader(source)
    changed = total = 0
    for name, parameter in model.named_parameters():
        before = reader.read(name)
        changed += int((parameter.detach().cpu().to(before.dtype) != before).sum())
        total += before.numel()
    return changed / total


def mask_facts(source: Checkpoint) -> dict:
    """Return what the facts of a checkpoint say of its zeros, for the checkpoint made from it;
    empty for a dense one."""
    mask = mask_of(source)
    return {} if mask is None else {"mask": mask, "sparsity": source.manifest["facts"]["sparsity"]}


def keep_zeros(model: nn.Module, source: Checkpoint) -> dict:
    """Where ``source`` is pruned weight by weight, set its zeros to zero again; return how many had
    moved.

    Training moves every weight. The zeros are put back before the result is measured, so the loss
    reported is that of the pruned model."""
    if mask_of(source) is None:
        return {}
    restored = restore_zeros(model, source)
    say(
        f"The source is pruned weight by weight: {restored:,} trained weights were set back to zero."
    )
    return {"zeros_restored": restored}

"""Which weights become zero, from scores; and keeping the zeros of a pruned model when its weights
are trained."""

from __future__ import annotations

from typing import TYPE_CHECKING

from slim.checkpoints.checkpoint import Checkpoint
from slim.checkpoints.reader import TensorReader
from slim.core.lazy import LazyModule

if TYPE_CHECKING:
    import torch
    from torch import nn
else:
    torch = LazyModule("torch")


def largest_kept(scores: torch.Tensor, sparsity: float) -> torch.Tensor:
    """Return where a weight stays, bool like ``scores``: in every row all but the int(columns *
    sparsity) smallest.

    scores: [rows, columns], at least 0. Of equal scores the first go.
    """
    gone = int(scores.shape[1] * sparsity)
    if gone == 0:
        return torch.ones_like(scores, dtype=torch.bool)
    threshold = scores.kthvalue(gone, dim=1, keepdim=True).values
    below, equal = scores < threshold, scores == threshold
    wanted = gone - below.sum(1, keepdim=True)
    return ~(below | (equal & (equal.cumsum(1) <= wanted)))


def n_of_m_kept(scores: torch.Tensor, n: int, m: int) -> torch.Tensor:
    """Return where a weight stays, bool like ``scores``: the ``n`` largest of every ``m``
    successive ones of a row.

    scores: [rows, columns], ``m`` divides the columns. Of equal scores the first stay. Every weight
    counts the others of its group that go before it, which for the small groups of hardware is
    faster than sorting."""
    groups = scores.unflatten(1, (-1, m))
    kept = torch.empty_like(groups, dtype=torch.bool)
    columns = groups.unbind(-1)
    for one, score in enumerate(columns):
        before = torch.zeros_like(score, dtype=torch.int16)
        for other, rival in enumerate(columns):
            if other != one:
                before += rival >= score if other < one else rival > score
        kept[..., one] = before < n
    return kept.flatten(1)


def mask_of(source: Checkpoint) -> dict | None:
    """Return what the manifest of a checkpoint says of its zeros: ``{"kind", "n", "m"}``, or None
    for a dense one."""
    return (source.manifest.get("facts") or {}).get("mask")


def restore_zeros(model: nn.Module, source: Checkpoint) -> int:
    """Set the weights of a model's linear layers to zero where those of ``source`` are; return how
    many were not.

    model: with the names of ``source``, for example after training it or after merging adapters
    into it."""
    reader, spec = TensorReader(source), source.spec
    restored = 0
    with torch.no_grad():
        for block in range(spec.blocks):
            for name in spec.block_linears(block):
                full = f"{spec.family.blocks}.{block}.{name}.weight"
                weight = model.get_parameter(full)
                zero = (reader.read(full) == 0).to(weight.device)
                restored += int(torch.count_nonzero(weight[zero]))
                weight[zero] = 0
    return restored

"""Scores of key/value groups and MLP channels from scores per channel of the coupled tensors.

Removing a key/value head removes rows of k and v, and rows of q and columns of o for every query
head that reads it; removing an MLP channel removes a row of gate and of up and a column of down. A
criterion gives a number per channel of each of these tensors; the score of a unit is their mean
over the tensors, summed over the head's channels ("group mean" of LLM-Pruner, arXiv:2305.11627,
section 3.2).

Query head h reads key/value head h // repeats, so its channels are credited there (``own``).
LLM-Pruner's code reshapes the query channels to (repeats, C) and sums, which credits head h to h
mod kv_heads (``llm_pruner``): with grouped queries that is another head."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from slim.core.errors import SlimError
from slim.core.lazy import LazyModule
from slim.models.spec import Family, ModelSpec

if TYPE_CHECKING:
    import torch
else:
    torch = LazyModule("torch")

OWN, LLM_PRUNER = FOLDINGS = ("own", "llm_pruner")
CHUNK = 2**20  # numbers per product, so that a score needs no second copy of its tensor


@dataclass(frozen=True)
class Coupled:
    """A tensor that loses something when a unit goes.

    name: of the linear layer within the block. attention: whether units are key/value groups (else
        MLP channels).
    rows: whether a unit is rows of the weight (its outputs) or columns (its inputs).
    """

    name: str
    attention: bool
    rows: bool


def coupled_tensors(family: Family) -> Iterator[Coupled]:
    """Yield the coupled linear layers of a block: the last segment of each part loses inputs, the
    others outputs."""
    linears = {name for group in family.linear_groups for name in group.linears}
    for group in family.linear_groups:
        for name in group.linears:
            yield Coupled(
                name, name.startswith(family.attention + "."), group.scale_into not in linears
            )


@dataclass
class UnitScores:
    """Scores of one block: groups, float [kv_heads], and channels, float [intermediate_size]; the
    smallest go first."""

    groups: torch.Tensor
    channels: torch.Tensor


def sum_per_unit(function, rows: bool, *tensors: torch.Tensor) -> torch.Tensor:
    """Sum ``function(*tensors)`` over the columns (``rows``) or over the rows, float32 [out] or
    [in].

    tensors: of shape [out, in], handed to the function as float32 some rows at a time.
    """
    step = max(1, CHUNK // tensors[0].shape[1])
    parts = zip(*(tensor.detach().split(step) for tensor in tensors), strict=True)
    values = (function(*(part.float() for part in chunk)) for chunk in parts)
    if rows:
        return torch.cat([value.sum(1) for value in values])
    return sum(value.sum(0) for value in values)


def fold(scores: torch.Tensor, kv_heads: int, head_dim: int, folding: str = OWN) -> torch.Tensor:
    """Credit query channels to key/value channels: [heads * head_dim] -> [kv_heads * head_dim]."""
    if folding == LLM_PRUNER:
        return scores.view(-1, kv_heads * head_dim).sum(0)
    return scores.view(kv_heads, -1, head_dim).sum(1).flatten()


def unit_scores(
    scores: dict[str, torch.Tensor], spec: ModelSpec, block: int, folding: str = OWN
) -> UnitScores:
    """Combine scores per channel of some coupled tensors, by their names within the block, into
    scores of units."""
    shape = spec.at(block)
    attention, mlp = [], []
    for tensor in coupled_tensors(spec.family):
        if tensor.name not in scores:
            continue
        found = scores[tensor.name]
        if tensor.attention:
            attention.append(fold(found, shape.kv_heads, shape.head_dim, folding))
        else:
            mlp.append(found)
    groups = torch.stack(attention).mean(0).view(shape.kv_heads, shape.head_dim).sum(1)
    result = UnitScores(groups, torch.stack(mlp).mean(0))
    for name, found in (("heads", result.groups), ("MLP channels", result.channels)):
        if not torch.isfinite(found).all():
            raise SlimError(
                f"Scores of {name} of block {block} are NaN or infinite: the model's weights or its half-precision "
                "activations overflow. Evaluate it before pruning."
            )
    return result


def smallest(scores: torch.Tensor, count: int) -> list[int]:
    """Return the ``count`` units with the smallest scores, ascending; of equal ones the first."""
    return sorted(torch.argsort(scores, stable=True)[:count].tolist())

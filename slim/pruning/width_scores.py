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

from collections.abc import Callable, Iterator
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

    Attributes:
        name: of the linear layer within the block.
        attention: whether units are key/value groups, not MLP channels.
        rows: whether a unit is rows of the weight (its outputs), not columns (its inputs).
    """

    name: str
    attention: bool
    rows: bool


def coupled_tensors(family: Family) -> Iterator[Coupled]:
    """Yield the coupled linear layers of a block: the last linear group of attention and of the MLP
    loses inputs, the others lose outputs."""
    linears: set[str] = set()
    for group in family.linear_groups:
        linears.update(group.linears)
    for group in family.linear_groups:
        # what another linear layer scales is the end of its part
        is_last = group.scale_into in linears
        for name in group.linears:
            yield Coupled(name, name.startswith(family.attention + "."), not is_last)


@dataclass
class UnitScores:
    """Scores of one block; the smallest go first.

    Attributes:
        groups: of the key/value groups, float [kv_heads].
        channels: of the MLP channels, float [intermediate_size].
    """

    groups: torch.Tensor
    channels: torch.Tensor


def sum_per_unit(
    function: Callable[..., torch.Tensor], rows: bool, *tensors: torch.Tensor
) -> torch.Tensor:
    """Sum ``function(*tensors)`` per row or per column.

    Args:
        function: takes some rows of the tensors, as float32, and returns as many.
        rows: sum over the columns, so that every row has a sum; else over the rows.
        tensors: [out, in].

    Returns:
        float32 [out] or [in].
    """
    step = max(1, CHUNK // tensors[0].shape[1])
    sums = []
    for start in range(0, len(tensors[0]), step):
        part = [tensor.detach()[start : start + step].float() for tensor in tensors]
        sums.append(function(*part).sum(1 if rows else 0))
    return torch.cat(sums) if rows else sum(sums)


def fold(scores: torch.Tensor, kv_heads: int, head_dim: int, folding: str = OWN) -> torch.Tensor:
    """Credit query channels to key/value channels.

    Args:
        scores: [heads * head_dim].
        kv_heads: key/value heads.
        head_dim: channels of a head.
        folding: ``own`` or ``llm_pruner``, see above.

    Returns:
        [kv_heads * head_dim].
    """
    if folding == LLM_PRUNER:
        return scores.view(-1, kv_heads * head_dim).sum(0)
    return scores.view(kv_heads, -1, head_dim).sum(1).flatten()


def unit_scores(
    scores: dict[str, torch.Tensor], spec: ModelSpec, block: int, folding: str = OWN
) -> UnitScores:
    """Combine scores per channel into scores of units.

    Args:
        scores: name of a coupled tensor within the block -> float [channels]; some may be missing.
        spec: the model.
        block: number of the block.
        folding: ``own`` or ``llm_pruner``, see above.

    Raises:
        SlimError: for a score that is not finite.
    """
    shape = spec.at(block)
    attention: list[torch.Tensor] = []
    mlp: list[torch.Tensor] = []
    for tensor in coupled_tensors(spec.family):
        if tensor.name not in scores:
            continue
        channels = scores[tensor.name]
        if tensor.attention:
            attention.append(fold(channels, shape.kv_heads, shape.head_dim, folding))
        else:
            mlp.append(channels)
    groups = torch.stack(attention).mean(0).view(shape.kv_heads, shape.head_dim).sum(1)
    result = UnitScores(groups, torch.stack(mlp).mean(0))
    _require_finite(result.groups, "heads", block)
    _require_finite(result.channels, "MLP channels", block)
    return result


def _require_finite(scores: torch.Tensor, units: str, block: int) -> None:
    """Require scores that can be compared."""
    if not torch.isfinite(scores).all():
        raise SlimError(
            f"Scores of {units} of block {block} are NaN or infinite: the model's weights or its "
            "half-precision activations overflow. Evaluate it before pruning."
        )


def smallest(scores: torch.Tensor, count: int) -> list[int]:
    """Return the ``count`` units with the smallest scores, ascending; of equal ones the first."""
    return sorted(torch.argsort(scores, stable=True)[:count].tolist())

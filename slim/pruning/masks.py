"""Which weights become zero, from scores; and keeping the zeros of a pruned model when its weights
are trained."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from slim.checkpoints.checkpoint import Checkpoint
from slim.checkpoints.reader import TensorReader
from slim.core.lazy import LazyModule

if TYPE_CHECKING:
    import torch
    from torch import nn
else:
    torch = LazyModule("torch")

UNSTRUCTURED = {"kind": "unstructured", "n": None, "m": None}  # a mask without a pattern


def largest_kept(scores: torch.Tensor, sparsity: float) -> torch.Tensor:
    """Return where a weight stays: in every row all but the smallest. Of equal scores the first go.

    Args:
        scores: [rows, columns], at least 0.
        sparsity: int(columns * sparsity) of every row go.

    Returns:
        bool [rows, columns].
    """
    count = int(scores.shape[1] * sparsity)
    if count == 0:
        return torch.ones_like(scores, dtype=torch.bool)
    threshold = scores.kthvalue(count, dim=1, keepdim=True).values
    below = scores < threshold
    equal = scores == threshold
    # of those equal to the threshold only as many go as are needed to make up the count
    missing = count - below.sum(1, keepdim=True)
    return ~(below | (equal & (equal.cumsum(1) <= missing)))


def n_of_m_kept(scores: torch.Tensor, n: int, m: int) -> torch.Tensor:
    """Return where a weight stays: the ``n`` largest of every ``m`` successive ones of a row. Of
    equal scores the first stay.

    Every weight counts the rivals in its group that go before it, which for the small groups of
    hardware is faster than sorting.

    Args:
        scores: [rows, columns].
        n: how many of a group stay.
        m: size of a group; divides the columns.

    Returns:
        bool [rows, columns].
    """
    groups = scores.unflatten(1, (-1, m))
    kept = torch.empty_like(groups, dtype=torch.bool)
    columns = groups.unbind(-1)
    for place, score in enumerate(columns):
        rank = torch.zeros_like(score, dtype=torch.int16)
        for rival_place, rival in enumerate(columns):
            if rival_place < place:
                rank += rival >= score
            elif rival_place > place:
                rank += rival > score
        kept[..., place] = rank < n
    return kept.flatten(1)


def mask_of(source: Checkpoint) -> dict | None:
    """Return what the manifest of a checkpoint says of its zeros.

    Returns:
        ``kind`` ("n:m" or "unstructured"), ``n`` and ``m``; None for a dense model.
    """
    return (source.manifest.get("facts") or {}).get("mask")


@dataclass(frozen=True)
class LayerZeros:
    """The zeros of a linear layer.

    Attributes:
        name: Its full name.
        zeros: How many of its weights are zero.
        weights: How many it has.
        regular: Whether it has the pattern of the mask that was asked for.
    """

    name: str
    zeros: int
    weights: int
    regular: bool

    @property
    def share(self) -> float:
        """The share of its weights that are zero."""
        return self.zeros / self.weights


def layer_zeros(checkpoint: Checkpoint, mask: dict) -> Iterator[LayerZeros]:
    """Count the zeros in the linear layers of the blocks; one layer in memory at a time.

    Args:
        checkpoint: With plain weights.
        mask: What the manifest says of the zeros: ``kind``, ``n`` and ``m``; empty for no pattern.

    Yields:
        One count per layer, in the model's order.
    """
    reader = TensorReader(checkpoint)
    for name in linear_weights(checkpoint):
        weight = reader.read(name)
        yield LayerZeros(
            name.removesuffix(".weight"),
            int((weight == 0).sum()),
            weight.numel(),
            fits_pattern(weight, mask),
        )
        reader.release()


def fits_pattern(weight: torch.Tensor, mask: dict) -> bool:
    """Whether at most n of every m successive weights of a row are not zero; always for a mask
    without n and m.

    Args:
        weight: [out, in].
        mask: ``kind``, ``n`` and ``m``.
    """
    if not mask.get("m"):
        return True
    if weight.shape[1] % mask["m"]:
        return False
    groups = weight.unflatten(1, (-1, mask["m"]))
    return bool(((groups != 0).sum(-1) <= mask["n"]).all())


def linear_weights(source: Checkpoint) -> Iterator[str]:
    """Yield the names of the weights of all blocks' linear layers."""
    spec = source.spec
    for block in range(spec.blocks):
        for name in spec.block_linears(block):
            yield f"{spec.family.blocks}.{block}.{name}.weight"


def restore_zeros(model: nn.Module, source: Checkpoint) -> int:
    """Set the weights of a model's linear layers to zero where those of a checkpoint are.

    Args:
        model: with the names of ``source``, for example after training it or after merging adapters
            into it.
        source: the pruned model.

    Returns:
        How many of them were not zero.
    """
    reader = TensorReader(source)
    restored = 0
    with torch.no_grad():
        for name in linear_weights(source):
            weight = model.get_parameter(name)
            zero = (reader.read(name) == 0).to(weight.device)
            restored += int(torch.count_nonzero(weight[zero]))
            weight[zero] = 0
    return restored

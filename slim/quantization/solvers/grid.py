"""Uniform grids per group of weights: choosing scale and zero point, rounding, and going back.

A row of ``in`` weights is cut into groups. In each, w is stored as an integer code c, 0 <= c < 2^b,
and read back as

    w^ = scale (c - zero)

with an integer zero point (2^(b-1) where the grid is symmetric). Scales are rounded to the type
they are stored in before any code is computed, so what is measured here is what is stored. Pure
functions on tensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from slim.core.lazy import LazyModule
from slim.quantization.scheme import Scheme

if TYPE_CHECKING:
    import torch
else:
    torch = LazyModule("torch")

# Weights that a search looks at together on a CPU: dozens of intervals are tried on them, and a few
# copies of so many, 256 KiB each, stay in the processor's cache meanwhile.
CACHED = 2**16


@dataclass
class Quantized:
    """Codes and grid of one layer.

    Attributes:
        codes: uint8 [out, in].
        scale: [out, groups] in the stored type.
        zero: zero points, uint8 [out, groups].
        scheme: bits, group size and symmetry.
        group_index: int64 [in], the group of every column, where columns were grouped in activation
            order; None: the columns of a group follow one another.
    """

    codes: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor
    scheme: Scheme
    group_index: torch.Tensor | None = None

    def dequantize(self) -> torch.Tensor:
        """Return the weights these codes stand for, float32 [out, in]."""
        if self.group_index is None:
            return decode(self.codes, self.scale, self.zero)
        steps = self.codes.float() - self.zero[:, self.group_index].float()
        return steps.mul_(self.scale[:, self.group_index].float())

    def rows(self, part: slice) -> Quantized:
        """Return the rows ``part`` of the layer; they share its memory."""
        return replace(self, codes=self.codes[part], scale=self.scale[part], zero=self.zero[part])


def concatenated(parts: list[Quantized]) -> Quantized:
    """Join layers with the same inputs, scheme and groups, row below row."""
    if len(parts) == 1:
        return parts[0]
    return replace(
        parts[0],
        codes=torch.cat([part.codes for part in parts]),
        scale=torch.cat([part.scale for part in parts]),
        zero=torch.cat([part.zero for part in parts]),
    )


def grouped(weight: torch.Tensor, groups: int) -> torch.Tensor:
    """Return [out, in] as [out, groups, group], sharing memory.

    Args:
        weight: any type, [out, in].
        groups: groups per row.
    """
    return weight.unflatten(-1, (groups, -1))


def decode(codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
    """Return the weights scale (c - zero), float32 [out, in].

    Args:
        codes: uint8 [out, in].
        scale: [out, groups], any floating-point type.
        zero: [out, groups].
    """
    values = grouped(codes, scale.shape[-1]).float() - zero.unsqueeze(-1).float()
    return values.mul_(scale.float().unsqueeze(-1)).flatten(-2)


def encode(
    weight: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, levels: int
) -> torch.Tensor:
    """Return the nearest codes of weights on a grid, uint8 [out, in].

    Args:
        weight: float32 [out, in].
        scale: [out, groups].
        zero: zero points, [out, groups].
        levels: number of codes, 2^b.
    """
    steps = grouped(weight, scale.shape[-1]) / scale.float().unsqueeze(-1)
    return (
        steps.round_()
        .add_(zero.unsqueeze(-1).float())
        .clamp_(0, levels - 1)
        .to(torch.uint8)
        .flatten(-2)
    )


def limits(weight: torch.Tensor, scheme: Scheme) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the lowest and highest value per group, float32 [out, groups] each, 0 between them.

    On a symmetric grid they are -m and m, m the largest magnitude.

    Args:
        weight: float32 [out, in].
        scheme: group size and symmetry.
    """
    blocks = grouped(weight, scheme.groups(weight.shape[-1]))
    low, high = blocks.amin(-1).clamp_(max=0), blocks.amax(-1).clamp_(min=0)
    if scheme.symmetric:
        high = torch.maximum(-low, high)
        low = -high
    return low, high


def grid_between(
    low: torch.Tensor, high: torch.Tensor, scheme: Scheme, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return scale, [out, groups] in ``dtype``, and zero, uint8 [out, groups], of a grid.

    A group of zeros gets scale 1. The symmetric grid has one step more below 0 than above, so it
    spans the interval with 2^b - 1 steps around its middle, as compressed-tensors does.

    Args:
        low: lowest value it spans, float32 [out, groups], at most 0.
        high: highest value, float32 [out, groups], at least 0.
        scheme: bits and symmetry.
        dtype: type scales are stored in.
    """
    scale = (high - low) / (scheme.levels - 1)
    tiny = torch.finfo(dtype).tiny
    scale = torch.where(scale > tiny, scale, torch.ones_like(scale)).to(dtype)
    if scheme.symmetric:
        zero = torch.full_like(scale, scheme.middle, dtype=torch.uint8)
    else:
        zero = (-low / scale.float()).round_().clamp_(0, scheme.levels - 1).to(torch.uint8)
    return scale, zero


def minmax(weight: torch.Tensor, scheme: Scheme, dtype: torch.dtype) -> Quantized:
    """Quantise on the grid that just spans every group.

    Args:
        weight: float32 [out, in].
        scheme: bits, group size and symmetry.
        dtype: type scales are stored in.
    """
    scale, zero = grid_between(*limits(weight, scheme), scheme, dtype)
    return Quantized(encode(weight, scale, zero, scheme.levels), scale, zero, scheme)


def group_errors(
    difference: torch.Tensor, importance: torch.Tensor | None, groups: int
) -> torch.Tensor:
    """Return the squared error per group, float32 [out, groups].

    Args:
        difference: float32 [out, in].
        importance: what an error costs. None: all the same. [in]: a weight per input, e.g. diag(H).
            [groups, group, group]: the diagonal blocks H_gg of the Hessian; an error e then costs
            e H_gg e^T.
        groups: groups per row.
    """
    blocks = grouped(difference, groups)
    if importance is None:
        return (blocks * blocks).sum(-1)
    if importance.dim() == 1:
        return (blocks * blocks).mul_(grouped(importance, groups)).sum(-1)
    return (torch.matmul(blocks.transpose(0, 1), importance).transpose(0, 1) * blocks).sum(-1)


def search(
    weight: torch.Tensor,
    scheme: Scheme,
    dtype: torch.dtype,
    importance: torch.Tensor | None = None,
    factors: Sequence[float] = (1.0,),
    each_end: bool = True,
) -> Quantized:
    """Quantise on the best of several grids, chosen per group.

    The intervals tried are [low, high] of the group shrunk by each factor: outliers are clipped
    where the finer steps for all others are worth it. On an asymmetric grid both ends are shrunk
    together first, then, with ``each_end``, each end alone.

    Args:
        weight: float32 [out, in].
        scheme: bits, group size and symmetry.
        dtype: type scales are stored in.
        importance: what an error costs, as in :func:`group_errors`.
        factors: shrink factors, the first of them 1.
        each_end: whether each end is shrunk alone too.
    """
    if weight.device.type == "cpu" and weight.numel() > CACHED:
        parts = []
        for rows in weight.split(max(1, CACHED // weight.shape[-1])):
            parts.append(search(rows, scheme, dtype, importance, factors, each_end))
        return concatenated(parts)
    low, high = limits(weight, scheme)
    best = Search(weight, scheme, dtype, importance)
    for factor in factors:
        best.offer(low * factor, high * factor)
    if each_end and not scheme.symmetric:
        low, high = best.low, best.high
        for factor in factors[1:]:
            best.offer(low * factor, high)
        low = best.low
        for factor in factors[1:]:
            best.offer(low, high * factor)
    return best.result()


class Search:
    """Keeps, per group, the best of the intervals that were offered."""

    def __init__(
        self,
        weight: torch.Tensor,
        scheme: Scheme,
        dtype: torch.dtype,
        importance: torch.Tensor | None,
    ):
        """Begin without an interval; weight, scheme, dtype, importance as for :func:`search`."""
        self.weight, self.scheme, self.dtype, self.importance = weight, scheme, dtype, importance
        self.error: torch.Tensor | None = None

    def offer(self, low: torch.Tensor, high: torch.Tensor) -> None:
        """Try an interval, and take it in the groups where it is better.

        Args:
            low: lower ends, float32 [out, groups].
            high: upper ends, float32 [out, groups].
        """
        scale, zero = grid_between(low, high, self.scheme, self.dtype)
        difference = self._difference(scale.float(), zero.float())
        error = group_errors(difference, self.importance, scale.shape[-1])
        if self.error is None:
            self.error, self.low, self.high, self.scale, self.zero = error, low, high, scale, zero
            return
        better = error < self.error
        self.error = torch.where(better, error, self.error)
        self.low = torch.where(better, low, self.low)
        self.high = torch.where(better, high, self.high)
        self.scale = torch.where(better, scale, self.scale)
        self.zero = torch.where(better, zero, self.zero)

    def _difference(self, scale: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
        """Return W^ - W as ``decode(encode(...))`` gives it; most of the time is spent here."""
        blocks = grouped(self.weight, scale.shape[-1])
        scale, zero = scale.unsqueeze(-1), zero.unsqueeze(-1)
        # Adding the zero point and taking it off again costs less than clamping c - zero instead of
        # c: bounds that are tensors are four times slower than bounds that are numbers.
        codes = (blocks / scale).round_().add_(zero).clamp_(0, self.scheme.levels - 1)
        return codes.sub_(zero).mul_(scale).sub_(blocks).flatten(-2)

    def result(self) -> Quantized:
        """Return the weights on the best grid of every group."""
        codes = encode(self.weight, self.scale, self.zero, self.scheme.levels)
        return Quantized(codes, self.scale, self.zero, self.scheme)


def shrink_factors(steps: int, least: float = 0.4) -> list[float]:
    """Return factors that shrink an interval, evenly spaced.

    Args:
        steps: how many, the first of them 1.
        least: the last of them.
    """
    if steps <= 1:
        return [1.0]
    return [1.0 - (1.0 - least) * index / (steps - 1) for index in range(steps)]

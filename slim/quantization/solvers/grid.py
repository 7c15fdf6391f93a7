"""Uniform grids per group of weights: choosing scale and zero point, rounding, and going back. Pure
tensor functions.

A row of ``in`` weights is cut into groups. In each, w is stored as an integer code c, 0 <= c < 2^b,
and read back as

    w^ = scale (c - zero)

with an integer zero point (2^(b-1) where the grid is symmetric). Scales are rounded to the type
they are stored in before any code is computed, so what is measured here is what is stored."""

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


@dataclass
class Quantized:
    """Codes and grid of one layer.

    codes: uint8 [out, in]. scale: [out, groups] in the stored type. zero: uint8 [out, groups].
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
        """Return some rows of the layer, as a view."""
        return replace(self, codes=self.codes[part], scale=self.scale[part], zero=self.zero[part])


def grouped(weight: torch.Tensor, groups: int) -> torch.Tensor:
    """View [out, in] as [out, groups, group]."""
    return weight.unflatten(-1, (groups, -1))


def decode(codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
    """Return scale (c - zero) as float32 [out, in] for codes [out, in], scale and zero [out,
    groups]."""
    values = grouped(codes, scale.shape[-1]).float() - zero.unsqueeze(-1).float()
    return values.mul_(scale.float().unsqueeze(-1)).flatten(-2)


def encode(
    weight: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, levels: int
) -> torch.Tensor:
    """Return the nearest codes, uint8 [out, in], of float32 weights [out, in] on the grid given by
    scale and zero."""
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
    """Return scale [out, groups] in ``dtype`` and zero, uint8, of the grid that spans ``low`` to
    ``high``.

    A group of zeros gets scale 1. The symmetric grid has one step more below 0 than above, so it
    spans the interval with 2^b - 1 steps around its middle, as compressed-tensors does."""
    scale = (high - low) / (scheme.levels - 1)
    tiny = torch.finfo(dtype).tiny
    scale = torch.where(scale > tiny, scale, torch.ones_like(scale)).to(dtype)
    if scheme.symmetric:
        zero = torch.full_like(scale, scheme.middle, dtype=torch.uint8)
    else:
        zero = (-low / scale.float()).round_().clamp_(0, scheme.levels - 1).to(torch.uint8)
    return scale, zero


def minmax(weight: torch.Tensor, scheme: Scheme, dtype: torch.dtype) -> Quantized:
    """Quantise float32 [out, in] on the grid that just spans every group."""
    scale, zero = grid_between(*limits(weight, scheme), scheme, dtype)
    return Quantized(encode(weight, scale, zero, scheme.levels), scale, zero, scheme)


def group_errors(
    difference: torch.Tensor, importance: torch.Tensor | None, groups: int
) -> torch.Tensor:
    """Return the squared error per group, float32 [out, groups], of ``difference`` [out, in].

    importance: what an error costs. None: all the same. [in]: a weight per input, e.g. diag(G).
        [groups, group, group]: the diagonal blocks G_gg of the Gram matrix; the cost of e is then e
        G_gg e^T.
    """
    blocks = grouped(difference, groups)
    if importance is None:
        return blocks.square().sum(-1)
    if importance.dim() == 1:
        return (blocks.square() * grouped(importance, groups)).sum(-1)
    return (torch.matmul(blocks.transpose(0, 1), importance).transpose(0, 1) * blocks).sum(-1)


def search(
    weight: torch.Tensor,
    scheme: Scheme,
    dtype: torch.dtype,
    importance: torch.Tensor | None = None,
    factors: Sequence[float] = (1.0,),
    each_end: bool = True,
) -> Quantized:
    """Quantise on the best of several grids, chosen per group: [low, high] shrunk by each of
    ``factors``.

    Outliers are clipped where the finer steps for all others are worth it. On an asymmetric grid
    both ends are shrunk together first, then, with ``each_end``, each end alone. ``importance`` as
    in :func:`group_errors`."""
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
        self.weight, self.scheme, self.dtype, self.importance = weight, scheme, dtype, importance
        self.error: torch.Tensor | None = None

    def offer(self, low: torch.Tensor, high: torch.Tensor) -> None:
        """Try the interval ``low`` to ``high`` ([out, groups]) and take it in the groups where it
        is better."""
        scale, zero = grid_between(low, high, self.scheme, self.dtype)
        error = group_errors(
            self._difference(scale.float(), zero.float()), self.importance, scale.shape[-1]
        )
        if self.error is None:
            self.error, self.low, self.high, self.scale, self.zero = error, low, high, scale, zero
            return
        better = error < self.error
        self.error = torch.where(better, error, self.error)
        self.low, self.high = (
            torch.where(better, low, self.low),
            torch.where(better, high, self.high),
        )
        self.scale, self.zero = (
            torch.where(better, scale, self.scale),
            torch.where(better, zero, self.zero),
        )

    def _difference(self, scale: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
        """Return W^ - W on a grid, as ``decode(encode(...))`` gives it; most of the time goes
        here."""
        blocks, scale, least = (
            grouped(self.weight, scale.shape[-1]),
            scale.unsqueeze(-1),
            -zero.unsqueeze(-1),
        )
        steps = (blocks / scale).round_().clamp_(least, least + (self.scheme.levels - 1))
        return steps.mul_(scale).sub_(blocks).flatten(-2)

    def result(self) -> Quantized:
        codes = encode(self.weight, self.scale, self.zero, self.scheme.levels)
        return Quantized(codes, self.scale, self.zero, self.scheme)


def layer_loss(difference: torch.Tensor, hessian: torch.Tensor | None) -> torch.Tensor:
    """Return tr(D G D^T), the squared output error over the calibration tokens, per row: float32
    [out].

    Without a Gram matrix: the squared norm of the rows of D.
    """
    if hessian is None:
        return difference.square().sum(-1)
    return ((difference @ hessian) * difference).sum(-1)


def shrink_factors(steps: int, least: float = 0.4) -> list[float]:
    """Return ``steps`` factors from 1 down to ``least``, evenly spaced."""
    if steps <= 1:
        return [1.0]
    return [1.0 - (1.0 - least) * index / (steps - 1) for index in range(steps)]

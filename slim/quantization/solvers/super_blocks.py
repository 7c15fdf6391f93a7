"""Grids of two levels, as GGUF's blocks have them: whole numbers for scales inside super-blocks.

A row of weights is cut into super-blocks, each with two float16 numbers d and e, and these into
groups, each with whole numbers s and m. A weight is stored as a code c and read back as

    w^ = d s (c - middle) - e m

with 0 <= c < 2^b; symmetric kinds have a ``middle`` and no e, the others the reverse. Grids are
chosen by weighted least squares: an error in column j costs ``importance[j]``, such as H_jj of the
Hessian H = X^T X. Matrices of the solvers are transposed, [in, rows]. Pure functions on tensors.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from slim.core.lazy import LazyModule

if TYPE_CHECKING:
    import torch
else:
    torch = LazyModule("torch")

ROUNDS = 4  # of choosing whole scales, codes, and the super-blocks' numbers in turn
CANDIDATES = 19  # real scales that are tried for a group
TINY = 1e-30  # keeps quotients of groups of zeros finite


@dataclass(frozen=True)
class BlockKind:
    """What the blocks of a type can hold.

    Attributes:
        bits: Per code.
        size: Weights in a super-block.
        group: Weights that share s and m.
        scales: The least and the largest s.
        minimums: The least and the largest m; (0, 0): a symmetric grid.
    """

    bits: int
    size: int = 32
    group: int = 32
    scales: tuple[int, int] = (1, 1)
    minimums: tuple[int, int] = (0, 0)

    @property
    def symmetric(self) -> bool:
        """Whether the grid lies around 0, without an offset."""
        return self.minimums == (0, 0)

    @property
    def middle(self) -> int:
        """The code that stands for 0 on a symmetric grid, else 0."""
        return 2 ** (self.bits - 1) if self.symmetric else 0

    @property
    def top(self) -> int:
        """The largest code."""
        return 2**self.bits - 1

    @property
    def two_levels(self) -> bool:
        """Whether the groups of a super-block have scales of their own."""
        return self.scales[0] < self.scales[1]


@dataclass
class BlockQuantized:
    """Codes and grids of one layer.

    Attributes:
        codes: uint8 [out, in].
        grids: Its grids, for all rows.
        kind: What the numbers mean.
    """

    codes: torch.Tensor
    grids: Grids
    kind: BlockKind

    def dequantize(self) -> torch.Tensor:
        """Return the weights these codes stand for, float32 [out, in]."""
        steps, offsets = self.grids.steps().T.unsqueeze(-1), self.grids.offsets().T.unsqueeze(-1)
        values = self.codes.unflatten(-1, (-1, self.kind.group)).float() - self.kind.middle
        values.mul_(steps)
        if not self.kind.symmetric:
            values.sub_(offsets)
        return values.flatten(-2)

    def rows(self, part: slice) -> BlockQuantized:
        """Return the rows ``part`` of the layer; they share its memory."""
        return replace(self, codes=self.codes[part], grids=self.grids.of_rows(part))


@dataclass
class Grids:
    """The grids of some rows.

    Attributes:
        d: float32 [blocks, rows]; numbers that float16 holds.
        e: Likewise.
        scale: s, float32 [blocks, groups, rows].
        minimum: m, likewise.
    """

    d: torch.Tensor
    e: torch.Tensor
    scale: torch.Tensor
    minimum: torch.Tensor

    def steps(self) -> torch.Tensor:
        """Return the distances of neighbouring grid points, d s, [groups of a row, rows]."""
        return (self.d.unsqueeze(1) * self.scale).flatten(0, 1)

    def offsets(self) -> torch.Tensor:
        """Return what is subtracted, e m, [groups of a row, rows]."""
        return (self.e.unsqueeze(1) * self.minimum).flatten(0, 1)

    def of_rows(self, part: slice) -> Grids:
        """Return the grids of the rows ``part``."""
        tensors = (self.d, self.e, self.scale, self.minimum)
        return Grids(*(tensor[..., part] for tensor in tensors))


def joined(parts: list[BlockQuantized]) -> BlockQuantized:
    """Join layers of the same kind and inputs, row below row."""
    if len(parts) == 1:
        return parts[0]
    grids = {}
    for name in ("d", "e", "scale", "minimum"):
        grids[name] = torch.cat([getattr(part.grids, name) for part in parts], -1)
    codes = torch.cat([part.codes for part in parts])
    return replace(parts[0], codes=codes, grids=Grids(**grids))


def float16(values: torch.Tensor) -> torch.Tensor:
    """Round to numbers that float16 holds, in float32; beyond its range to the largest of them."""
    limit = torch.finfo(torch.float16).max
    return values.clamp(-limit, limit).to(torch.float16).float()


def encode(target: torch.Tensor, grids: Grids, kind: BlockKind) -> torch.Tensor:
    """Return the nearest codes of weights on their grids, float32 [in, rows].

    Args:
        target: float32 [in, rows].
        grids: Their grids.
        kind: What the codes mean.
    """
    values = target.unflatten(0, (-1, kind.group))
    steps, offsets = grids.steps().unsqueeze(1), grids.offsets().unsqueeze(1)
    codes = (values + offsets).div_(divisor(steps)).round_().add_(kind.middle)
    return codes.clamp_(0, kind.top).flatten(0, 1)


def nearest(
    weight: torch.Tensor, kind: BlockKind, importance: torch.Tensor | None = None
) -> BlockQuantized:
    """Round a layer to the best grids for its weights, every weight by itself.

    Args:
        weight: float32 [out, in]; super-blocks divide ``in``.
        kind: The blocks.
        importance: What an error in each column costs, float32 [in]. None: large weights count
            more, w^2 + mean w^2, since a layer's largest weights carry most of its output.
    """
    target = weight.T.contiguous()
    if importance is None:
        squares = target.square()
        weights = squares + squares.mean(0)
    else:
        weights = importance.unsqueeze(-1)
    grids = choose_grids(target, kind, weights)
    codes = encode(target, grids, kind).to(torch.uint8).T.contiguous()
    return BlockQuantized(codes, grids, kind)


def choose_grids(target: torch.Tensor, kind: BlockKind, importance: torch.Tensor) -> Grids:
    """Choose the grids of super-blocks: real scales per group first, then whole ones.

    Args:
        target: float32 [in, rows].
        kind: The blocks.
        importance: What an error costs, float32 [in, rows] or [in, 1]; anything at least 0.

    Returns:
        Their grids.
    """
    shape = (-1, kind.size // kind.group, kind.group)
    x = target.unflatten(0, shape)  # [blocks, groups, group, rows]
    # a column without input has importance 0, and a group of such columns has no best grid
    h = (importance / (importance.mean(0) + TINY) + 1e-6).unflatten(0, shape)
    if kind.symmetric:
        scale, minimum = _best_scales(x, h, kind)
    else:
        scale, minimum = _best_intervals(x, h, kind)
    problem = _GridProblem(x, h, kind)
    return problem.solve(problem.first(scale, minimum))


def _best_scales(
    x: torch.Tensor, h: torch.Tensor, kind: BlockKind
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the best scale of every group on a symmetric grid, and zeros, [blocks, groups, rows].

    A scale may be negative: the code -middle has no counterpart above, so the sign that lets the
    weight of largest magnitude have it is taken.
    """
    place = x.abs().argmax(2, keepdim=True)
    extreme = x.gather(2, place).squeeze(2)
    sign = torch.where(extreme > 0, -1.0, 1.0)
    largest = extreme.abs().clamp(min=TINY)
    best_gain = torch.full_like(extreme, -1.0)
    best = torch.zeros_like(extreme)
    weighted = x * h
    for delta in _spread(kind):
        inverse = sign * (kind.middle + delta) / largest
        codes = (x * inverse.unsqueeze(2)).round_().clamp_(-kind.middle, kind.middle - 1)
        product = (weighted * codes).sum(2)
        square = (codes.square_() * h).sum(2).clamp(min=TINY)
        gain = product.square() / square
        better = gain > best_gain
        best_gain = torch.where(better, gain, best_gain)
        best = torch.where(better, product / square, best)
    return best, torch.zeros_like(best)


def _best_intervals(
    x: torch.Tensor, h: torch.Tensor, kind: BlockKind
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the best scale and offset of every group on a grid with offsets, likewise."""
    low = x.amin(2)
    if kind.two_levels:  # e and m are both at least 0
        low = low.clamp(max=0)
    span = (x.amax(2) - low).clamp(min=TINY)
    fit = _LineFit(x, h, positive=kind.two_levels)
    shifted = x - low.unsqueeze(2)
    for delta in _spread(kind):
        inverse = (kind.top + delta) / span
        fit.offer((shifted * inverse.unsqueeze(2)).round_().clamp_(0, kind.top))
    return fit.scale, fit.minimum


def _spread(kind: BlockKind) -> list[float]:
    """Return by how many steps the intervals that are tried differ from the whole one."""
    count = CANDIDATES if kind.bits < 6 else CANDIDATES // 2
    return [-0.9 + 1.8 * index / (count - 1) for index in range(count)]


class _LineFit:
    """Keeps, per group, the codes' best line x ~ s c - m among those offered."""

    def __init__(self, x: torch.Tensor, h: torch.Tensor, positive: bool):
        self.positive = positive
        self.h = h / h.sum(2, keepdim=True)
        self.weighted = x * self.h
        self.sum = self.weighted.sum(2)
        self.gain = torch.full_like(self.sum, -float("inf"))
        self.scale = torch.zeros_like(self.sum)
        self.minimum = torch.zeros_like(self.sum)

    def offer(self, codes: torch.Tensor) -> None:
        """Fit a line to codes, and keep it in the groups where it is better."""
        product = (self.weighted * codes).sum(2)
        weighted_codes = codes * self.h
        first, second = weighted_codes.sum(2), weighted_codes.mul_(codes).sum(2)
        variance = second - first.square()
        # codes that are all the same have no slope
        sloped = variance > 1e-6 * second
        scale = (product - self.sum * first) / torch.where(sloped, variance, 1.0)
        scale = torch.where(sloped, scale, 0.0)
        offset = self.sum - scale * first
        if self.positive:
            without = (offset > 0) | (scale <= 0)
            scale = torch.where(without, product / second.clamp(min=TINY), scale)
            offset = torch.where(without, 0.0, offset)
        gain = 2 * (scale * product + offset * self.sum)
        gain -= scale.square() * second + 2 * scale * offset * first + offset.square()
        better = gain > self.gain
        self.gain = torch.where(better, gain, self.gain)
        self.scale = torch.where(better, scale, self.scale)
        self.minimum = torch.where(better, -offset, self.minimum)


class _GridProblem:
    """Whole scales and the super-blocks' numbers, improved in turn for given weights."""

    def __init__(self, x: torch.Tensor, h: torch.Tensor, kind: BlockKind):
        self.x, self.h, self.kind = x, h, kind
        self.total = h.sum(2).expand(x[:, :, 0].shape)

    def first(self, scale: torch.Tensor, minimum: torch.Tensor) -> Grids:
        """Round real scales and offsets, [blocks, groups, rows], to whole ones."""
        kind = self.kind
        if not kind.two_levels:
            ones = torch.ones_like(scale)
            d, e = float16(scale[:, 0]), float16(minimum[:, 0])
            return Grids(d, e, ones, ones if not kind.symmetric else torch.zeros_like(scale))
        place = scale.abs().argmax(1, keepdim=True)
        most = scale.gather(1, place).squeeze(1)
        limit = kind.scales[0] if kind.symmetric else kind.scales[1]
        d = float16(most / limit)
        e = float16(minimum.amax(1) / max(1, kind.minimums[1]))
        whole = (scale / divisor(d.unsqueeze(1))).round_().clamp_(*kind.scales)
        offsets = (minimum / divisor(e.unsqueeze(1))).round_().clamp_(*kind.minimums)
        return Grids(d, e, whole, offsets)

    def solve(self, grids: Grids) -> Grids:
        """Return the best grids that some rounds from ``grids`` on come to."""
        if not self.kind.two_levels:
            return self._keep_better(grids, self._refit(grids))
        best, best_error = grids, self.error(grids).sum(1)
        for _ in range(ROUNDS):
            grids = self._refit(self._neighbours(grids))
            error = self.error(grids).sum(1)
            best = _where(error < best_error, grids, best)
            best_error = torch.minimum(error, best_error)
        return best

    def _keep_better(self, old: Grids, new: Grids) -> Grids:
        return _where(self.error(new).sum(1) < self.error(old).sum(1), new, old)

    def error(self, grids: Grids) -> torch.Tensor:
        """Return the weighted squared error of every group, [blocks, groups, rows]."""
        steps, offsets = self._wide(grids)
        codes = self._codes(steps, offsets)
        change = codes.mul_(steps).sub_(offsets).sub_(self.x)
        return change.square_().mul_(self.h).sum(2)

    def _wide(self, grids: Grids) -> tuple[torch.Tensor, torch.Tensor]:
        steps = (grids.d.unsqueeze(1) * grids.scale).unsqueeze(2)
        return steps, (grids.e.unsqueeze(1) * grids.minimum).unsqueeze(2)

    def _codes(self, steps: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
        """Return c - middle of the nearest grid points."""
        low, kind = -self.kind.middle, self.kind
        return ((self.x + offsets) / divisor(steps)).round_().clamp_(low, low + kind.top)

    def _neighbours(self, grids: Grids) -> Grids:
        """Move every group's s by at most 1, with the m that is best then, where that is better."""
        best, best_error = grids, self.error(grids)
        for move in (0, -1, 1):
            scale = (grids.scale + move).clamp(*self.kind.scales)
            tried = replace(grids, scale=scale)
            if not self.kind.symmetric:
                tried = self._best_minimums(tried)
            elif move == 0:
                continue
            error = self.error(tried)
            better = error < best_error
            best_error = torch.where(better, error, best_error)
            best = replace(
                best,
                scale=torch.where(better, tried.scale, best.scale),
                minimum=torch.where(better, tried.minimum, best.minimum),
            )
        return best

    def _best_minimums(self, grids: Grids) -> Grids:
        """Return the grids with the m that is best for the codes that they give."""
        steps, offsets = self._wide(grids)
        rest = self._codes(steps, offsets).mul_(steps).sub_(self.x)
        wanted = rest.mul_(self.h).sum(2) / self.total
        minimum = (wanted / divisor(grids.e.unsqueeze(1))).round_().clamp_(*self.kind.minimums)
        return replace(grids, minimum=minimum)

    def _refit(self, grids: Grids) -> Grids:
        """Return the grids with the d and e that are best for the codes that they give."""
        steps, offsets = self._wide(grids)
        codes = self._codes(steps, offsets)
        product = (codes * self.x).mul_(self.h).sum(2)
        first = (codes * self.h).sum(2)
        second = codes.square_().mul_(self.h).sum(2)
        s, m = grids.scale, grids.minimum
        a, b = (s.square() * second).sum(1), (s * product).sum(1)
        if self.kind.symmetric:
            d = torch.where(a > TINY, b / a.clamp(min=TINY), grids.d)
            return replace(grids, d=float16(d))
        mixed = -(s * m * first).sum(1)
        c, f = (m.square() * self.total).sum(1), -(m * (self.x * self.h).sum(2)).sum(1)
        determinant = a * c - mixed.square()
        solvable = determinant > 1e-6 * a * c + TINY
        safe = torch.where(solvable, determinant, torch.ones_like(a))
        d, e = (b * c - mixed * f) / safe, (a * f - mixed * b) / safe
        if self.kind.two_levels:
            solvable &= (d > 0) & (e >= 0)
        d, e = torch.where(solvable, d, grids.d), torch.where(solvable, e, grids.e)
        return replace(grids, d=float16(d), e=float16(e))


def _where(better: torch.Tensor, new: Grids, old: Grids) -> Grids:
    """Return the new grids in the super-blocks, [blocks, rows], where they are better."""
    groups = better.unsqueeze(1)
    return Grids(
        torch.where(better, new.d, old.d),
        torch.where(better, new.e, old.e),
        torch.where(groups, new.scale, old.scale),
        torch.where(groups, new.minimum, old.minimum),
    )


def divisor(steps: torch.Tensor) -> torch.Tensor:
    """Return steps to divide by: a step of 0 makes no difference, whatever the code."""
    return torch.where(steps == 0, torch.ones_like(steps), steps)

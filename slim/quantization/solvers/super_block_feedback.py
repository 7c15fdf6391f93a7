"""Super-blocks under the whole Hessian: error feedback column by column, then coordinate descent.

Both make tr(D H D^T) small, D = W^ - W, as GPTQ and the descent on plain grids do
(``error_feedback.py``, ``coordinate_descent.py``); what differs are the numbers that may move: of a
group the whole numbers s and m, of a super-block the float16 numbers d and e. Matrices are
transposed, [in, rows].
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from slim.core.lazy import LazyModule
from slim.quantization.solvers.columns import ColumnSweep
from slim.quantization.solvers.error_feedback import CholeskyFactor
from slim.quantization.solvers.super_blocks import (
    BlockKind,
    BlockQuantized,
    Grids,
    choose_grids,
    divisor,
    float16,
)

if TYPE_CHECKING:
    import torch
else:
    torch = LazyModule("torch")


def feed_errors(
    weight: torch.Tensor,
    cholesky: CholeskyFactor,
    kind: BlockKind,
    importance: torch.Tensor,
) -> BlockQuantized:
    """Round weights column by column, in the order of the factor (arXiv:2210.17323, algorithm 1).

    Grids are chosen beforehand, for the weights as they are, so columns may come in any order.

    Args:
        weight: float32 [out, in].
        cholesky: The factor of the damped Hessian.
        kind: The blocks.
        importance: What an error in each column costs when grids are chosen, float32 [in].
    """
    return _BlockRounding(weight, cholesky, kind, importance).run()


class _BlockRounding:
    """The state of the error feedback; columns are in the factor's order."""

    def __init__(
        self,
        weight: torch.Tensor,
        cholesky: CholeskyFactor,
        kind: BlockKind,
        importance: torch.Tensor,
    ):
        self.cholesky, self.kind = cholesky, kind
        weights = weight.T.contiguous()
        self.grids = choose_grids(weights, kind, importance.unsqueeze(-1))
        self.group_of = (cholesky.order // kind.group).tolist()
        self.steps, self.offsets = self.grids.steps(), self.grids.offsets()
        self.divisors = divisor(self.steps)
        # w - w^ of the columns that are done; it starts as the weights
        self.error = weights[cholesky.order]
        self.target = self.error.clone()
        self.codes = torch.empty_like(self.error, dtype=torch.uint8)

    def run(self) -> BlockQuantized:
        columns = len(self.target)
        ColumnSweep(columns, columns, self._round_column, self._push).run()
        codes = torch.empty_like(self.codes)
        codes[self.cholesky.order] = self.codes
        return BlockQuantized(codes.T.contiguous(), self.grids, self.kind)

    def _round_column(self, j: int, start: int, stop: int) -> None:
        group, error, kind = self.group_of[j], self.error[j], self.kind
        codes = self.target[j] + self.offsets[group]
        codes.div_(self.divisors[group]).round_().add_(kind.middle).clamp_(0, kind.top)
        self.codes[j] = codes
        error.addcmul_(codes.sub_(kind.middle), self.steps[group], value=-1)
        error.add_(self.offsets[group])
        self.target[j + 1 : stop].addr_(self.cholesky.unit[j, j + 1 : stop], error)

    def _push(self, done: slice, later: slice) -> None:
        self.target[later].addmm_(self.cholesky.unit[done, later].T, self.error[done])


def descend(
    weight: torch.Tensor, layer: BlockQuantized, hessian: torch.Tensor, rounds: int
) -> BlockQuantized:
    """Return a layer after some rounds of coordinate descent; no step raises the loss.

    Given all other numbers, and for all rows at once, every code moves to its best value, and at
    the end of each super-block so do s and m of its groups, then d and e. Columns without input
    keep their codes.

    Args:
        weight: W, float32 [out, in].
        layer: Its codes and grids to begin with.
        hessian: H, float32 [in, in].
        rounds: How often every number is moved.
    """
    descent = _BlockDescent(weight, layer, hessian)
    for _ in range(rounds):
        descent.round()
    return descent.result()


class _BlockDescent:
    """The state of the descent: codes, slopes and changes, [in, rows]."""

    def __init__(self, weight: torch.Tensor, layer: BlockQuantized, hessian: torch.Tensor):
        self.kind, self.hessian = layer.kind, hessian
        # D at first; afterwards what a round has changed of W^
        self.change = layer.dequantize().sub_(weight).T.contiguous()
        self.slope = hessian @ self.change
        self.codes = layer.codes.T.float().contiguous()
        grids = layer.grids
        self.grids = Grids(
            grids.d.clone(), grids.e.clone(), grids.scale.clone(), grids.minimum.clone()
        )
        self.curvature = hessian.diagonal().tolist()
        self._update_steps()

    def _update_steps(self) -> None:
        self.steps = self.grids.steps()
        self.divisors = divisor(self.steps)

    def round(self) -> None:
        """Move every number once."""
        self.change.zero_()
        ColumnSweep(
            len(self.codes),
            self.kind.size,
            self._move_codes,
            self._push,
            leave_group=self._move_grids,
            push_back=self._push,
        ).run()
        self._update_steps()

    def result(self) -> BlockQuantized:
        """Return the layer as it is now."""
        codes = self.codes.to(torch.uint8).T.contiguous()
        return BlockQuantized(codes, self.grids, self.kind)

    def _move_codes(self, j: int, start: int, stop: int) -> None:
        if self.curvature[j] <= 0:
            return  # no input ever reaches this column
        codes, group = self.codes[j], j // self.kind.group
        wanted = torch.addcdiv(
            codes, self.slope[j], self.divisors[group], value=-1 / self.curvature[j]
        )
        wanted.round_().clamp_(0, self.kind.top)
        change = torch.sub(wanted, codes, out=self.change[j]).mul_(self.steps[group])
        codes.copy_(wanted)
        self.slope[start:stop].addr_(self.hessian[j, start:stop], change)

    def _push(self, done: slice, others: slice) -> None:
        self.slope[others].addmm_(self.hessian[others, done], self.change[done])

    def _move_grids(self, columns: slice) -> None:
        """Move the numbers of one super-block's grid."""
        block, kind, grids = columns.start // self.kind.size, self.kind, self.grids
        levels = self.codes[columns] - kind.middle
        if kind.two_levels:
            for group in range(kind.size // kind.group):
                self._move_group(columns.start, block, group, levels)
        scale = grids.scale[block].repeat_interleave(kind.group, 0)
        self._move(columns, columns, grids.d[block], levels * scale, float16)
        if not kind.symmetric:
            minimum = grids.minimum[block].repeat_interleave(kind.group, 0)
            self._move(columns, columns, grids.e[block], -minimum, float16)

    def _move_group(self, first: int, block: int, group: int, levels: torch.Tensor) -> None:
        """Move s and m of a group of the super-block that begins at column ``first``."""
        kind, grids = self.kind, self.grids
        inside = slice(group * kind.group, (group + 1) * kind.group)
        columns = slice(first + inside.start, first + inside.stop)
        block_columns = slice(first, first + kind.size)

        def whole(limits: tuple[int, int]) -> Callable[[torch.Tensor], torch.Tensor]:
            return lambda values: values.round().clamp(*limits)

        direction = levels[inside] * grids.d[block]
        number = grids.scale[block, group]
        self._move(columns, block_columns, number, direction, whole(kind.scales))
        if not kind.symmetric:
            direction = (-grids.e[block]).expand_as(direction)
            number = grids.minimum[block, group]
            self._move(columns, block_columns, number, direction, whole(kind.minimums))

    def _move(
        self,
        columns: slice,
        block_columns: slice,
        number: torch.Tensor,
        direction: torch.Tensor,
        rounded: Callable[[torch.Tensor], torch.Tensor],
    ) -> None:
        """Move a number of every row to its best value that can be stored, where that is a gain.

        Args:
            columns: Those whose weights it changes.
            block_columns: Those whose slopes are needed before the super-block is left.
            number: [rows], changed in place.
            direction: What the weights change by per unit of it, [columns, rows].
            rounded: Gives the nearest values that can be stored.
        """
        reached = self.hessian[block_columns, columns] @ direction
        offset = columns.start - block_columns.start
        size = columns.stop - columns.start
        slope = (direction * self.slope[columns]).sum(0)
        curvature = (direction * reached[offset : offset + size]).sum(0)
        wanted = number - slope / curvature
        wanted = torch.where(torch.isfinite(wanted), wanted, number)
        move = rounded(wanted) - number
        gain = move * (2 * slope + curvature * move) < 0
        move = torch.where(gain, move, torch.zeros_like(move))
        number += move
        self.change[columns] += direction * move
        self.slope[block_columns] += reached * move

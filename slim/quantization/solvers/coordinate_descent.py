"""Coordinate descent on a rounded layer: every code, and every scale, in turn to its best value.

With D = W^ - W the loss tr(D H D^T) is quadratic in each single number, with slope D H. Given all
other numbers, and for all rows of W at once:

    code of column j:    c_j <- the grid's nearest to  c_j - (D H)_j / (s H_jj)
    scale of group g:    s_g <- s_g - u_g (D H)_g^T / (u_g H_gg u_g^T),  u_g = (c - zero) inside the
    group

The step for codes is QuantEase's (Behdin et al., arXiv:2309.01885). No step raises the loss. Every
change is passed on to the slopes of all columns, so that a round costs as much as one product with
H, and nothing has to be computed again for the next one. Pure functions on tensors.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from slim.core.lazy import LazyModule
from slim.quantization.solvers.columns import ColumnSweep
from slim.quantization.solvers.grid import Quantized

if TYPE_CHECKING:
    import torch
else:
    torch = LazyModule("torch")


def refine(
    weight: torch.Tensor,
    layer: Quantized,
    hessian: torch.Tensor,
    rounds: int,
    order: torch.Tensor | None = None,
    scales: bool = True,
) -> Quantized:
    """Return a layer after some rounds of descent; columns without input keep their codes.

    Args:
        weight: W, float32 [out, in].
        layer: its codes and grid to begin with.
        hessian: H, float32 [in, in], rows and columns in ``order``.
        rounds: how often every code and scale is moved.
        order: int64 [in], where groups are formed of columns in this order; None: of neighbors.
        scales: whether scales move too, or codes alone.
    """
    descent = Descent(weight, layer, hessian, order, scales)
    for number in range(rounds):
        descent.round(last=number == rounds - 1)
    return descent.result()


class Descent:
    """The state of the descent: codes, slopes and changes, each transposed, [in, rows]."""

    def __init__(
        self,
        weight: torch.Tensor,
        layer: Quantized,
        hessian: torch.Tensor,
        order: torch.Tensor | None,
        scales: bool,
    ):
        """Compute the first slopes; weight, layer, hessian, order, scales as for :func:`refine`."""
        self.layer, self.hessian, self.order, self.scales = layer, hessian, order, scales
        self.group = layer.scheme.group(weight.shape[1])
        difference = layer.dequantize().sub_(weight).T
        codes = layer.codes.T
        if order is not None:
            difference, codes = difference[order], codes[order]
        # D at first; afterwards what a round has changed of W^
        self.change = difference.contiguous()
        self.slope = hessian @ self.change
        self.codes = codes.float()
        self.fresh = torch.empty(len(weight), device=weight.device)  # codes of the column at hand
        self.scale = layer.scale.T.float().clone(memory_format=torch.contiguous_format)
        self.zero = layer.zero.T.float()
        self.curvature = hessian.diagonal().tolist()
        self.top = layer.scheme.levels - 1
        self.last = False
        # views taken once: indexing a tensor costs as much as working on a short row of it
        self.rows = list(
            zip(self.codes.unbind(), self.slope.unbind(), self.change.unbind(), strict=True)
        )

    def round(self, last: bool) -> None:
        """Move every code and scale once.

        Args:
            last: whether this is the last round: slopes that nobody will read are then left as they
                are.
        """
        self.last = last
        self.change.zero_()
        leave_group = self._move_scale if self.scales else None
        ColumnSweep(
            len(self.codes),
            self.group,
            self._move_codes,
            self._push,
            leave_group=leave_group,
            push_back=self._push_back,
        ).run()

    def result(self) -> Quantized:
        """Return the layer as it is now, columns in their own order."""
        codes = self.codes.to(torch.uint8)
        if self.order is not None:
            codes = torch.empty_like(codes).index_copy_(0, self.order, codes)
        scale = self.scale.T.to(self.layer.scale.dtype).contiguous()
        return replace(self.layer, codes=codes.T.contiguous(), scale=scale)

    def _move_codes(self, j: int, start: int, stop: int) -> None:
        if self.curvature[j] <= 0:
            return  # no input ever reaches this column
        codes, slope, change = self.rows[j]
        scale, fresh = self.scale[j // self.group], self.fresh
        torch.addcdiv(codes, slope, scale, value=-1 / self.curvature[j], out=fresh)
        fresh.round_().clamp_(0, self.top)
        torch.sub(fresh, codes, out=change).mul_(scale)
        codes.copy_(fresh)
        self.slope[start:stop].addr_(self.hessian[j, start:stop], change)

    def _push(self, done: slice, others: slice) -> None:
        self.slope[others].addmm_(self.hessian[others, done], self.change[done])

    def _push_back(self, done: slice, earlier: slice) -> None:
        # After the last round only scales still move: the slopes inside a group matter for its own.
        in_same_group = earlier.start // self.group == (done.stop - 1) // self.group
        if not self.last or in_same_group:
            self._push(done, earlier)

    def _move_scale(self, columns: slice) -> None:
        """Give a group the scale that is best for its codes, where it is still a gain as stored."""
        old = self.scale[columns.start // self.group]
        steps = self.codes[columns] - self.zero[columns.start // self.group]
        reached = self.hessian[columns, columns] @ steps
        slope = (steps * self.slope[columns]).sum(0)
        curvature = (steps * reached).sum(0)
        new = (old - slope / curvature).to(self.layer.scale.dtype).float()
        move = new - old
        loss_change = move * (2 * slope + curvature * move)
        gain = (new > 0.5 * old) & (new < 2 * old) & (loss_change < 0)
        move = torch.where(gain, move, torch.zeros_like(move))
        old += move
        self.change[columns] += steps.mul_(move)
        self.slope[columns] += reached.mul_(move)

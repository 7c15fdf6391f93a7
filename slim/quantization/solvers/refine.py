"""Coordinate descent on a rounded layer: every code, and every scale, in turn to its best value
given all the others.

With D = W^ - W the loss tr(D G D^T) is quadratic in each single number, with slope D G. For all
rows of W at once:

    code of column j:    c_j <- the grid's nearest to  c_j - (D G)_j / (s G_jj)            (QuantEase, arXiv:2309.01885)
    scale of group g:    s_g <- s_g - u_g (D G)_g^T / (u_g G_gg u_g^T),  u_g = (c - zero) inside the group

No step raises the loss. Every change is passed on to the slopes of all columns, so that a round
costs as much as one product with G, and nothing has to be computed again for the next one. Pure
tensor functions."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from slim.core.lazy import LazyModule
from slim.quantization.solvers.coordinate_descent import Sweep
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
    """Return ``layer`` after ``rounds`` of descent; columns without input keep their codes.

    weight: float32 [out, in]. order: int64 [in], where groups are formed of columns in this order,
        not of neighbours.
    hessian: G, float32 [in, in], rows and columns in that order. scales: whether scales move too,
    or codes alone."""
    descent = Descent(weight, layer, hessian, order, scales)
    for number in range(rounds):
        descent.round(last=number == rounds - 1)
    return descent.result()


class Descent:
    """The state of the descent: codes, what is left of the slope, and what changed, each
    transposed, [in, rows]."""

    def __init__(
        self,
        weight: torch.Tensor,
        layer: Quantized,
        hessian: torch.Tensor,
        order: torch.Tensor | None,
        scales: bool,
    ):
        self.layer, self.hessian, self.order, self.scales = layer, hessian, order, scales
        self.group = layer.scheme.group(weight.shape[1])
        difference = layer.dequantize().sub_(weight).T
        codes = layer.codes.T
        if order is not None:
            difference, codes = difference[order], codes[order]
        self.change = difference.contiguous()
        self.slope = hessian @ self.change
        self.codes, self.fresh = codes.float(), torch.empty(len(weight), device=weight.device)
        self.scale, self.zero = (
            layer.scale.T.float().clone(memory_format=torch.contiguous_format),
            layer.zero.T.float(),
        )
        self.curvature, self.top, self.last = (
            hessian.diagonal().tolist(),
            layer.scheme.levels - 1,
            False,
        )
        self.rows = list(
            zip(self.codes.unbind(), self.slope.unbind(), self.change.unbind(), strict=True)
        )

    def round(self, last: bool) -> None:
        """Visit every column and group once. last: slopes that nobody will read are left as they
        are."""
        self.last = last
        self.change.zero_()
        leave = self._rescale if self.scales else None
        Sweep(
            len(self.codes),
            self.group,
            self._column,
            self._push,
            leave_group=leave,
            back=self._push_back,
        ).run()

    def result(self) -> Quantized:
        codes = self.codes.to(torch.uint8)
        if self.order is not None:
            codes = torch.empty_like(codes).index_copy_(0, self.order, codes)
        scale = self.scale.T.to(self.layer.scale.dtype).contiguous()
        return replace(self.layer, codes=codes.T.contiguous(), scale=scale)

    def _column(self, j: int, start: int, stop: int) -> None:
        if self.curvature[j] <= 0:
            return
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
        if not self.last or earlier.start // self.group == (done.stop - 1) // self.group:
            self._push(done, earlier)

    def _rescale(self, columns: slice) -> None:
        """Give a group the scale that is best for its codes, where it is still a gain in the type
        it is stored in."""
        old = self.scale[columns.start // self.group]
        steps = self.codes[columns] - self.zero[columns.start // self.group]
        reached = self.hessian[columns, columns] @ steps
        slope, curvature = (steps * self.slope[columns]).sum(0), (steps * reached).sum(0)
        new = (old - slope / curvature).to(self.layer.scale.dtype).float()
        move = new - old
        gain = (new > 0.5 * old) & (new < 2 * old) & (move * (2 * slope + curvature * move) < 0)
        move = torch.where(gain, move, torch.zeros_like(move))
        old += move
        self.change[columns] += steps.mul_(move)
        self.slope[columns] += reached.mul_(move)

"""Rounding a layer under its Hessian: GPTQ, refitted scales, the better of several results.

All of them make the loss |X (W^ - W)^T|^2 = tr(D H D^T) small, with D = W^ - W and H = X^T X. Rows
of W are independent of one another, so any number of rows, of several layers with the same input,
can be given at once. Pure functions on tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from slim.calibration.errors import layer_loss
from slim.core.hardware import trim_heap
from slim.core.lazy import LazyModule
from slim.quantization.scheme import WHOLE_ROW
from slim.quantization.solvers.columns import ColumnSweep
from slim.quantization.solvers.grid import Quantized, concatenated, search

if TYPE_CHECKING:
    import torch

    from slim.quantization.scheme import Scheme
else:
    torch = LazyModule("torch")

ROW_WEIGHTS = 2**22  # weights that are solved for at once: a few float32 copies of them exist
# in means of diag(H); a factorization that fails even with this much is given up
MOST_DAMPING = 1.0
PERMUTED_ROWS = 256  # rows of H that are permuted at once


@dataclass
class CholeskyFactor:
    """The factor of the damped Hessian, H + damping mean(diag H) I = A diag(d)^2 A^T.

    A is unit upper triangular, A diag(d) the upper Cholesky factor. A_kj says how much of column
    k's rounding error column j makes up for: this is GPTQ's recursion without the inverse it is
    usually written with. If the inverse is U^T U, U upper triangular, then A diag(d) = U^-1 and d_j
    = 1 / U_jj; the two forms give the same codes (QuIP, arXiv:2307.13304, theorem 6).

    Attributes:
        unit: A, float32 [in, in], rows and columns in ``order``.
        diagonal: d, float32 [in], likewise.
        order: int64 [in], the column that comes first, second, ...
        damping: as much as the factorization needed, in means of diag(H).
    """

    unit: torch.Tensor
    diagonal: torch.Tensor
    order: torch.Tensor
    damping: float


def cholesky_factor(
    hessian: torch.Tensor, damping: float, order: torch.Tensor
) -> CholeskyFactor | None:
    """Factor a Hessian; the damping grows tenfold until that works, at most to ``MOST_DAMPING``.

    A column that no input reaches gets a diagonal entry of the mean's size, so that it is rounded
    by itself. Besides the result no second matrix is allocated.

    Args:
        hessian: H, float32 [in, in].
        damping: added to its diagonal, in means of it.
        order: int64 [in], the order columns are taken in.

    Returns:
        The factor, or None where no damping helps.
    """
    diagonal = hessian.diagonal()
    mean = float(diagonal.mean())
    if not 0 < mean < float("inf"):
        return None
    # LAPACK gives a lower factor L of the matrix with rows and columns reversed; L turned round by
    # 180 degrees is the upper factor of the matrix itself.
    backwards = order.flip(0)
    while damping <= MOST_DAMPING:
        matrix = permuted(hessian, backwards)
        matrix.diagonal().add_(torch.where(diagonal > 0, damping * mean, mean)[backwards])
        failed = torch.zeros((), dtype=torch.int32, device=hessian.device)
        # the matrix is symmetric, so its transpose is as good and lets LAPACK work in place
        torch.linalg.cholesky_ex(matrix.mT, out=(matrix.mT, failed))
        if not failed and bool(torch.isfinite(matrix.diagonal()).all()):
            upper = reverse(matrix.mT)
            pivots = upper.diagonal().clone()
            return CholeskyFactor(upper.div_(pivots), pivots, order, damping)
        damping = max(10 * damping, 1e-4)
    return None


def activation_order(hessian: torch.Tensor) -> torch.Tensor:
    """Return the columns with large inputs first, int64 [in]."""
    return hessian.diagonal().argsort(descending=True, stable=True)


def noted_factor(
    name: str,
    hessian: torch.Tensor,
    damping: float,
    order: torch.Tensor,
    notes: list[str],
    otherwise: str,
) -> CholeskyFactor | None:
    """Factor a Hessian as :func:`cholesky_factor` does, and note where it took more or failed.

    Args:
        name: whose Hessian it is, for notes.
        hessian: H, float32 [in, in].
        damping: added to its diagonal, in means of it.
        order: int64 [in], the order columns are taken in.
        notes: gets a sentence.
        otherwise: what is done without the factor, such as ``"rounded to nearest"``.
    """
    cholesky = cholesky_factor(hessian, damping, order)
    if cholesky is None:
        notes.append(
            f"{name}: the Hessian could not be factored even with full damping; {otherwise}."
        )
    elif cholesky.damping > damping:
        notes.append(
            f"{name}: damping raised from {damping:g} to {cholesky.damping:g} to factor the "
            "Hessian."
        )
    return cholesky


def permuted(hessian: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """Return a copy of H, [in, in], with rows and columns in another order.

    Args:
        hessian: H, float32 [in, in].
        order: int64 [in]; new row k is old row order[k].
    """
    matrix = torch.empty_like(hessian)
    # indexing rows and columns of all of H at once would allocate a third matrix
    for rows in torch.arange(len(hessian), device=hessian.device).split(PERMUTED_ROWS):
        matrix[rows] = hessian[order[rows]][:, order]
    return matrix


def reverse(matrix: torch.Tensor) -> torch.Tensor:
    """Turn a square matrix [n, n] round by 180 degrees, in place.

    The last row, read backwards, becomes the first. Returns the matrix.
    """
    size = len(matrix)
    for row in range(size // 2):
        first = matrix[row].flip(0)
        matrix[row] = matrix[size - 1 - row].flip(0)
        matrix[size - 1 - row] = first
    if size % 2:
        matrix[size // 2] = matrix[size // 2].flip(0)
    return matrix


def gptq(
    weight: torch.Tensor,
    cholesky: CholeskyFactor,
    scheme: Scheme,
    dtype: torch.dtype,
    factors: Sequence[float],
    fixed: Quantized | None = None,
) -> Quantized:
    """Round weights column by column, in the order of the factor (arXiv:2210.17323, algorithm 1).

        t_j = w_j + sum_k<j (w_k - w^_k) A_kj,    w^_j = Q(t_j)

    Args:
        weight: float32 [out, in].
        cholesky: A and the order of the columns.
        scheme: bits, group size and symmetry.
        dtype: type of the scales.
        factors: shrink factors tried for a group's grid, see :func:`grid.search`.
        fixed: a layer whose grids are used (static groups). Without it groups are formed in the
            order of the columns, and each one's grid is chosen when it is reached, for the targets
            as they are then.
    """
    return _ColumnRounding(weight, cholesky, scheme, dtype, factors, fixed).run()


class _ColumnRounding:
    """The state of GPTQ on some rows; matrices are [in, rows], columns in the factor's order."""

    def __init__(
        self,
        weight: torch.Tensor,
        cholesky: CholeskyFactor,
        scheme: Scheme,
        dtype: torch.dtype,
        factors: Sequence[float],
        fixed: Quantized | None,
    ):
        self.cholesky, self.scheme, self.dtype, self.factors = cholesky, scheme, dtype, factors
        self.choose_grids = fixed is None
        self.layer = fixed or new_layer(weight, scheme, dtype, cholesky.order)
        self.group_of = groups_of(self.layer)[cholesky.order].tolist()
        # w - w^ of the columns that are done; it starts as the weights
        self.error = weight.T[cholesky.order]
        self.target = self.error.clone()  # t
        self.codes = torch.empty_like(self.error, dtype=torch.uint8)
        self.fresh = torch.empty(len(weight), device=weight.device)  # codes of the column at hand
        self.scale = self.layer.scale.T.float().contiguous()  # [groups, rows]
        self.zero = self.layer.zero.T.float().contiguous()
        self.top = scheme.levels - 1

    def run(self) -> Quantized:
        columns = len(self.target)
        enter_group = self._choose_grid if self.choose_grids else None
        ColumnSweep(
            columns, self.scheme.group(columns), self._round_column, self._push, enter_group
        ).run()
        codes = torch.empty_like(self.layer.codes)
        codes[:, self.cholesky.order] = self.codes.T
        return replace(
            self.layer,
            codes=codes,
            scale=self.scale.T.to(self.dtype).contiguous(),
            zero=self.zero.T.to(torch.uint8).contiguous(),
        )

    def _choose_grid(self, columns: slice) -> None:
        """Choose a group's grid for its targets; an error in column j costs d_j^2."""
        importance = self.cholesky.diagonal[columns].square()
        targets = self.target[columns].T.contiguous()
        grid = search(targets, one_group(self.scheme), self.dtype, importance, self.factors)
        group = self.group_of[columns.start]
        self.scale[group] = grid.scale[:, 0].float()
        self.zero[group] = grid.zero[:, 0]

    def _round_column(self, j: int, start: int, stop: int) -> None:
        group = self.group_of[j]
        scale, zero, error = self.scale[group], self.zero[group], self.error[j]
        codes = torch.div(self.target[j], scale, out=self.fresh)
        codes.round_().add_(zero).clamp_(0, self.top)
        self.codes[j] = codes
        error.addcmul_(codes.sub_(zero), scale, value=-1)
        self.target[j + 1 : stop].addr_(self.cholesky.unit[j, j + 1 : stop], error)

    def _push(self, done: slice, later: slice) -> None:
        self.target[later].addmm_(self.cholesky.unit[done, later].T, self.error[done])


def one_group(scheme: Scheme) -> Scheme:
    """Return the scheme for a single group taken as a layer of its own."""
    return replace(scheme, group_size=WHOLE_ROW)


def new_layer(
    weight: torch.Tensor, scheme: Scheme, dtype: torch.dtype, order: torch.Tensor
) -> Quantized:
    """Return a layer without codes and grids whose groups are formed in a given order.

    Args:
        weight: float32 [out, in], for the sizes.
        scheme: bits, group size and symmetry.
        dtype: type of the scales.
        order: int64 [in]; the first ``group`` columns in this order are group 0, and so on.
    """
    rows, inputs = weight.shape
    groups = scheme.groups(inputs)
    in_order = torch.arange(inputs, device=order.device) // scheme.group(inputs)
    group_index = torch.empty_like(order)
    group_index[order] = in_order
    return Quantized(
        torch.zeros(rows, inputs, dtype=torch.uint8, device=weight.device),
        torch.ones(rows, groups, dtype=dtype, device=weight.device),
        torch.full((rows, groups), scheme.middle, dtype=torch.uint8, device=weight.device),
        scheme,
        None if torch.equal(group_index, in_order) else group_index,
    )


def groups_of(layer: Quantized) -> torch.Tensor:
    """Return the group of every column, int64 [in]."""
    if layer.group_index is not None:
        return layer.group_index
    inputs = layer.codes.shape[1]
    return torch.arange(inputs, device=layer.codes.device) // layer.scheme.group(inputs)


def better_rows(
    weight: torch.Tensor, hessian: torch.Tensor, candidates: list[Quantized]
) -> Quantized:
    """Return, row by row, the candidate with the smallest loss, the first of equals.

    Args:
        weight: float32 [out, in].
        hessian: H, float32 [in, in].
        candidates: layers with the same scheme and groups.
    """
    losses = []
    for candidate in candidates:
        losses.append(layer_loss(candidate.dequantize() - weight, hessian))
    best = torch.stack(losses).argmin(0)
    codes = candidates[0].codes.clone()
    scale = candidates[0].scale.clone()
    zero = candidates[0].zero.clone()
    for index, candidate in enumerate(candidates[1:], 1):
        rows = best == index
        codes[rows] = candidate.codes[rows]
        scale[rows] = candidate.scale[rows]
        zero[rows] = candidate.zero[rows]
    return replace(candidates[0], codes=codes, scale=scale, zero=zero)


def refit_scales(weight: torch.Tensor, layer: Quantized, hessian: torch.Tensor) -> Quantized:
    """Return a layer with the scales that are best for its codes, per row where that is a gain.

    With u_g the row of integers (c - zero) inside group g and 0 elsewhere, w^ = sum_g s_g u_g;
    least squares under H gives N s = b with N_gh = u_g H u_h^T, b_g = u_g H w^T. A fit that turns a
    sign round, or more than doubles or halves a scale, is not taken.

    Args:
        weight: W, float32 [out, in].
        layer: its codes and grid.
        hessian: H, float32 [in, in].
    """
    groups = layer.scale.shape[-1]
    group_of = groups_of(layer)
    columns = [(group_of == g).nonzero().flatten() for g in range(groups)]
    steps = layer.codes.float() - layer.zero[:, group_of].float()
    normal = steps.new_zeros(len(steps), groups, groups)  # N of every row
    target = steps.new_empty(len(steps), groups)  # b of every row
    for g in range(groups):
        rows = steps[:, columns[g]]
        target[:, g] = ((weight @ hessian[:, columns[g]]) * rows).sum(-1)
        following = torch.cat(columns[g:])  # the groups before it follow by symmetry
        products = (rows @ hessian[columns[g]][:, following]).mul_(steps[:, following])
        normal[:, :, g].index_add_(1, group_of[following], products)
    normal += normal.tril(-1).mT
    damping = normal.diagonal(dim1=1, dim2=2).mean(-1).clamp(min=1e-12)[:, None, None] * 1e-6

    # Least squares around the present scales: a group that the inputs never reach keeps its own.
    present = layer.scale.float()
    residual = target - times(normal, present)
    fitted = present + torch.linalg.solve(
        normal + damping * torch.eye(groups, device=weight.device), residual
    )
    fitted = fitted.to(layer.scale.dtype)
    usable = torch.isfinite(fitted) & (fitted > 0.5 * present) & (fitted < 2 * present)
    move = torch.where(usable, fitted.float() - present, torch.zeros_like(present))
    loss_change = (move * (times(normal, move) - 2 * residual)).sum(-1, keepdim=True)
    return replace(layer, scale=torch.where(usable & (loss_change < 0), fitted, layer.scale))


def times(matrices: torch.Tensor, vectors: torch.Tensor) -> torch.Tensor:
    """Return the products, [rows, n], of one matrix and one vector per row.

    Args:
        matrices: [rows, n, n].
        vectors: [rows, n].
    """
    return (matrices @ vectors.unsqueeze(-1)).squeeze(-1)


def by_rows(
    weight: torch.Tensor,
    solve: Callable[..., Quantized],
    layer: Quantized | None = None,
    join: Callable[[list], Quantized] | None = None,
) -> Quantized:
    """Solve for some rows of a layer after another, so that the solver's copies of them stay small.

    Args:
        weight: [out, in].
        solve: gives the codes and grid of some rows of ``weight``.
        layer: if given, ``solve`` gets the same rows of it as a second argument.
        join: puts the solutions one below the other; None: :func:`concatenated`.
    """
    size = max(1, ROW_WEIGHTS // weight.shape[1])
    parts = []
    for start in range(0, len(weight), size):
        rows = weight[start : start + size]
        if layer is None:
            parts.append(solve(rows))
        else:
            parts.append(solve(rows, layer.rows(slice(start, start + size))))
        if rows.numel() >= ROW_WEIGHTS // 2:  # trimming after every small layer would cost time
            trim_heap()
    return (join or concatenated)(parts)

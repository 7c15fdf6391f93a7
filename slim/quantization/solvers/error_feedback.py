"""Rounding a layer under its Gram matrix: GPTQ, refitted scales, the better of several. Pure tensor
functions.

All of them make the loss |X (W^ - W)^T|^2 = tr(D G D^T) small, with D = W^ - W and G = X^T X. Rows
of W are independent of one another, so any number of rows, of several layers with the same input,
can be given at once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from slim.core.hardware import trim_heap
from slim.core.lazy import LazyModule
from slim.quantization.solvers.coordinate_descent import Sweep
from slim.quantization.solvers.grid import Quantized, layer_loss, search

if TYPE_CHECKING:
    import torch

    from slim.quantization.scheme import Scheme
else:
    torch = LazyModule("torch")

ROW_WEIGHTS = 2**22  # weights that are solved for at once: a few float32 copies of them exist
# in means of diag(G); a factorisation that fails even with this much is given up
MOST_DAMPING = 1.0


@dataclass
class Feedback:
    """The unit upper triangular A of H = A diag(d)^2 A^T, with H = G + damping mean(diag G) I,
    columns in ``order``.

    A_kj says how much of column k's rounding error column j makes up for. This is GPTQ's recursion
    without the inverse it is usually written with: if H^-1 = U^T U, U upper triangular, then A
    diag(d) = U^-1 and d_j = 1 / U_jj; the two forms give the same codes (QuIP, arXiv:2307.13304,
    theorem 6).

    upper: A, float32 [in, in]. pivots: d, [in]. order: int64 [in]. damping: as much as the
    factorisation needed."""

    upper: torch.Tensor
    pivots: torch.Tensor
    order: torch.Tensor
    damping: float


def feedback(hessian: torch.Tensor, damping: float, order: torch.Tensor) -> Feedback | None:
    """Factor G, [in, in]; ``damping`` grows tenfold until that works, at most to 1. None where
    nothing helps.

    A column that no input reaches gets a diagonal entry of the mean's size, so that it is rounded
    by itself. Beside the result no second matrix is allocated."""
    diagonal = hessian.diagonal()
    mean = float(diagonal.mean())
    if not 0 < mean < float("inf"):
        return None
    backwards = order.flip(0)
    while damping <= MOST_DAMPING:
        matrix = permuted(hessian, backwards)
        matrix.diagonal().add_(torch.where(diagonal > 0, damping * mean, mean)[backwards])
        failed = torch.zeros((), dtype=torch.int32, device=hessian.device)
        # symmetric, so its transpose is as good: in place
        torch.linalg.cholesky_ex(matrix.mT, out=(matrix.mT, failed))
        if not failed and bool(torch.isfinite(matrix.diagonal()).all()):
            upper = reverse(matrix.mT)
            pivots = upper.diagonal().clone()
            return Feedback(upper.div_(pivots), pivots, order, damping)
        damping = max(10 * damping, 1e-4)
    return None


def permuted(hessian: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """Return a copy of G, [in, in], with rows and columns in another order."""
    matrix = torch.empty_like(hessian)
    # all at once would take a third matrix
    for rows in torch.arange(len(hessian), device=hessian.device).split(256):
        matrix[rows] = hessian[order[rows]][:, order]
    return matrix


def reverse(matrix: torch.Tensor) -> torch.Tensor:
    """Turn a square matrix round by 180 degrees, in place: the last row, read backwards, becomes
    the first."""
    size = len(matrix)
    for row in range(size // 2):
        first = matrix[row].flip(0)
        matrix[row] = matrix[size - 1 - row].flip(0)
        matrix[size - 1 - row] = first
    if size % 2:
        matrix[size // 2] = matrix[size // 2].flip(0)
    return matrix


def whole_row(scheme: Scheme) -> Scheme:
    """Return the scheme for a single group taken as a layer of its own."""
    return replace(scheme, group_size=-1)


def gptq(
    weight: torch.Tensor,
    feed: Feedback,
    scheme: Scheme,
    dtype: torch.dtype,
    factors: list[float],
    fixed: Quantized | None = None,
) -> Quantized:
    """Round float32 weights [out, in] column by column in the order of ``feed`` (arXiv:2210.17323,
    algorithm 1).

        t_j = w_j + sum_k<j (w_k - w^_k) A_kj,    w^_j = Q(t_j)

    fixed: a layer whose grids are used (static groups). Without it groups are formed in the order
    of ``feed``, and each one's grid is chosen when it is reached, for the targets as they are then.
    factors: shrink factors tried for it."""
    inputs, group, order = weight.shape[1], scheme.group(weight.shape[1]), feed.order
    # [in, out]: a column of the layer is a contiguous row here; it starts as the weights
    error = weight.T[order]
    target, fresh = error.clone(), torch.empty(len(weight), device=weight.device)
    layer = fixed or new_layer(weight, scheme, dtype, order)
    group_of = groups_of(layer)[order].tolist()
    codes = torch.empty_like(error, dtype=torch.uint8)
    scale, zero = layer.scale.T.float().contiguous(), layer.zero.T.float().contiguous()

    def enter_group(columns: slice) -> None:
        importance = feed.pivots[columns].square()
        found = search(
            target[columns].T.contiguous(), whole_row(scheme), dtype, importance, factors
        )
        scale[group_of[columns.start]], zero[group_of[columns.start]] = (
            found.scale[:, 0].float(),
            found.zero[:, 0],
        )

    def column(j: int, start: int, stop: int) -> None:
        g = group_of[j]
        torch.div(target[j], scale[g], out=fresh).round_().add_(zero[g]).clamp_(
            0, scheme.levels - 1
        )
        codes[j] = fresh
        error[j].addcmul_(fresh.sub_(zero[g]), scale[g], value=-1)
        target[j + 1 : stop].addr_(feed.upper[j, j + 1 : stop], error[j])

    def push(done: slice, later: slice) -> None:
        target[later].addmm_(feed.upper[done, later].T, error[done])

    Sweep(inputs, group, column, push, None if fixed else enter_group).run()
    result = torch.empty_like(layer.codes)
    result[:, order] = codes.T
    return replace(
        layer,
        codes=result,
        scale=scale.T.to(dtype).contiguous(),
        zero=zero.T.to(torch.uint8).contiguous(),
    )


def new_layer(
    weight: torch.Tensor, scheme: Scheme, dtype: torch.dtype, order: torch.Tensor
) -> Quantized:
    """Return a layer without codes and grids whose groups are formed in ``order``."""
    rows, inputs = weight.shape
    groups = scheme.groups(inputs)
    index = torch.empty_like(order)
    index[order] = torch.arange(inputs, device=order.device) // scheme.group(inputs)
    in_order = bool(
        (index == torch.arange(inputs, device=order.device) // scheme.group(inputs)).all()
    )
    return Quantized(
        torch.zeros(rows, inputs, dtype=torch.uint8, device=weight.device),
        torch.ones(rows, groups, dtype=dtype, device=weight.device),
        torch.full((rows, groups), scheme.middle, dtype=torch.uint8, device=weight.device),
        scheme,
        None if in_order else index,
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
    """Return, row by row, the candidate with the smallest loss (the first of equals); their groups
    must be the same."""
    losses = torch.stack([layer_loss(item.dequantize() - weight, hessian) for item in candidates])
    best = losses.argmin(0)
    codes, scale, zero = (
        candidates[0].codes.clone(),
        candidates[0].scale.clone(),
        candidates[0].zero.clone(),
    )
    for index, item in enumerate(candidates[1:], 1):
        rows = best == index
        codes[rows], scale[rows], zero[rows] = item.codes[rows], item.scale[rows], item.zero[rows]
    return replace(candidates[0], codes=codes, scale=scale, zero=zero)


def refit_scales(weight: torch.Tensor, layer: Quantized, hessian: torch.Tensor) -> Quantized:
    """Return ``layer`` with the scales that are best for its codes under ``hessian``, per row where
    that is a gain.

    With u_g the row of integers (c - zero) inside group g and 0 elsewhere, w^ = sum_g s_g u_g;
    least squares under G gives A s = b with A_gh = u_g G u_h^T, b_g = u_g G w^T. A fit that turns a
    sign round is not taken."""
    groups, group_of = layer.scale.shape[-1], groups_of(layer)
    columns = [(group_of == g).nonzero().flatten() for g in range(groups)]
    steps = layer.codes.float() - layer.zero[:, group_of].float()
    normal, target = (
        steps.new_zeros(len(steps), groups, groups),
        steps.new_empty(len(steps), groups),
    )
    for h, own in enumerate(columns):
        rows = steps[:, own]
        target[:, h] = ((weight @ hessian[:, own]) * rows).sum(-1)
        others = torch.cat(columns[h:])  # the rest by symmetry
        products = (rows @ hessian[own][:, others]).mul_(steps[:, others])
        normal[:, :, h].index_add_(1, group_of[others], products)
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
    # what the loss changes by
    gain = (move * (times(normal, move) - 2 * residual)).sum(-1, keepdim=True) < 0
    return replace(layer, scale=torch.where(usable & gain, fitted, layer.scale))


def times(matrices: torch.Tensor, vectors: torch.Tensor) -> torch.Tensor:
    """Return the products of [rows, n, n] matrices and as many vectors [rows, n]."""
    return (matrices @ vectors.unsqueeze(-1)).squeeze(-1)


def by_rows(
    weight: torch.Tensor, solve: Callable[..., Quantized], layer: Quantized | None = None
) -> Quantized:
    """Apply ``solve`` to some rows of ``weight`` [out, in] after another, so that its copies of
    them stay small.

    layer: of which it is given the same rows too.
    """
    size = max(1, ROW_WEIGHTS // weight.shape[1])
    parts = []
    for start in range(0, len(weight), size):
        part = weight[start : start + size]
        parts.append(
            solve(part) if layer is None else solve(part, layer.rows(slice(start, start + size)))
        )
        if part.numel() >= ROW_WEIGHTS // 2:  # not after every small layer
            trim_heap()
    return concatenated(parts)


def concatenated(parts: list[Quantized]) -> Quantized:
    """Join layers with the same inputs, scheme and groups, row below row."""
    if len(parts) == 1:
        return parts[0]
    codes, scale, zero = (
        torch.cat([getattr(part, key) for part in parts]) for key in ("codes", "scale", "zero")
    )
    return replace(parts[0], codes=codes, scale=scale, zero=zero)

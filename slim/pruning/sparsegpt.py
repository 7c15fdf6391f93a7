"""SparseGPT: one row's weights become zero column by column, the columns after them make up for it.

With H = X^T X + damping and U the upper Cholesky factor of H^-1 (H^-1 = U^T U), for column j of
some columns:

    score    w_j^2 / U_jj^2            the smallest of the block go (or all but n of every m)
    error    e = (w_j - 0) / U_jj      where w_j goes, 0 where it stays
    update   w_k -= e U_jk             for all k >= j

Frantar & Alistarh, "SparseGPT" (arXiv:2301.00774), section 3 and its code.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from slim.core.lazy import LazyModule
from slim.pruning.least_squares import damped
from slim.pruning.masks import largest_kept, n_of_m_kept

if TYPE_CHECKING:
    import torch
else:
    torch = LazyModule("torch")

BLOCK = 128  # columns whose mask is chosen together, as in the paper


def inverse_factor(hessian: torch.Tensor, damping: float) -> torch.Tensor:
    """Return U, the upper Cholesky factor of (H + damping mean(diag H))^-1.

    Args:
        hessian: H = X^T X, [in, in].
        damping: above 0.

    Returns:
        [in, in], of the type of ``hessian``.
    """
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped(hessian, damping)))
    return torch.linalg.cholesky(inverse, upper=True).to(hessian.dtype)


def sparsegpt(
    weight: torch.Tensor,
    hessian: torch.Tensor,
    damping: float,
    sparsity: float,
    n_of_m: tuple[int, int] | None = None,
) -> torch.Tensor:
    """Return pruned and updated weights, [out, in].

    Args:
        weight: float32 [out, in].
        hessian: H = X^T X, [in, in].
        damping: ridge, above 0, in means of H's diagonal.
        sparsity: share that goes of every block of columns.
        n_of_m: n of every m successive weights of a row stay instead.
    """
    weight = weight.clone()
    factor = inverse_factor(hessian, damping)
    width = BLOCK
    if n_of_m is not None:  # whole groups
        width = max(1, BLOCK // n_of_m[1]) * n_of_m[1]
    for start in range(0, weight.shape[1], width):
        stop = min(start + width, weight.shape[1])
        errors = prune_columns(
            weight[:, start:stop], factor[start:stop, start:stop], sparsity, n_of_m
        )
        weight[:, stop:] -= errors @ factor[start:stop, stop:]
    return weight


def prune_columns(
    weight: torch.Tensor, factor: torch.Tensor, sparsity: float, n_of_m: tuple[int, int] | None
) -> torch.Tensor:
    """Prune a block of columns in place.

    Args:
        weight: [out, columns].
        factor: U of these columns, [columns, columns].
        sparsity: share of the block's weights that goes.
        n_of_m: n of every m successive weights of a row stay instead.

    Returns:
        The errors e, [out, columns].
    """
    diagonal = factor.diagonal()
    kept = torch.ones_like(weight, dtype=torch.bool)
    if n_of_m is None:
        kept = largest_kept((weight / diagonal).square().flatten()[None], sparsity).view_as(weight)
    errors = torch.zeros_like(weight)
    for column in range(weight.shape[1]):
        # the mask of a group is chosen once the columns before it have updated its weights
        if n_of_m is not None and column % n_of_m[1] == 0:
            group = slice(column, column + n_of_m[1])
            kept[:, group] = n_of_m_kept((weight[:, group] / diagonal[group]).square(), *n_of_m)
        dropped = ~kept[:, column]
        errors[:, column] = torch.where(dropped, weight[:, column] / diagonal[column], 0)
        weight[:, column:] -= errors[:, column, None] * factor[column, column:]
        weight[dropped, column] = 0
    return errors

"""Closed-form repair of what a linear layer loses with some of its inputs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from slim.core.lazy import LazyModule

if TYPE_CHECKING:
    import torch
else:
    torch = LazyModule("torch")


def damped(hessian: torch.Tensor, damping: float) -> torch.Tensor:
    """Return H + damping * mean(diag H) * I in float64.

    Args:
        hessian: H, [n, n].
        damping: 0 or more.
    """
    hessian = hessian.double()
    # the smallest number keeps an all-zero H invertible
    ridge = damping * hessian.diagonal().mean() + torch.finfo(torch.float32).tiny
    return hessian + ridge * torch.eye(len(hessian), dtype=hessian.dtype, device=hessian.device)


def solve(hessian: torch.Tensor, right: torch.Tensor, damping: float) -> torch.Tensor:
    """Return (H + damping)^-1 B, float64 [n, k].

    Args:
        hessian: symmetric H, [n, n].
        right: B, [n, k].
        damping: 0 or more, in means of H's diagonal.
    """
    return torch.cholesky_solve(right.double(), torch.linalg.cholesky(damped(hessian, damping)))


def refit_columns(
    weight: torch.Tensor, hessian: torch.Tensor, kept: torch.Tensor, damping: float
) -> torch.Tensor:
    """Return the weights of the kept inputs that best repeat a layer's output without the others.

        W' = argmin |X W^T - X[:, keep] W'^T|^2 + damping |W' - W[:, keep]|^2
           = W[:, keep] + W[:, drop] H[drop, keep] (H[keep, keep] + damping)^-1

    which without damping is W H[:, keep] H[keep, keep]^-1. Damping holds on to the weights as they
    were, instead of pulling them to zero.

    Args:
        weight: W, [out, in].
        hessian: H = X^T X, [in, in].
        kept: int64 [kept], ascending.
        damping: 0 or more, in means of H's diagonal.

    Returns:
        W', [out, kept].
    """
    dropped = torch.ones(weight.shape[1], dtype=torch.bool, device=weight.device)
    dropped[kept] = False
    if not dropped.any():
        return weight.clone()
    lost = hessian[kept][:, dropped] @ weight[:, dropped].T
    change = solve(hessian[kept][:, kept], lost, damping)
    return weight[:, kept] + change.T.to(weight.dtype)

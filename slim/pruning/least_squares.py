"""Closed-form repair of what a linear layer loses with some of its inputs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from slim.core.lazy import LazyModule

if TYPE_CHECKING:
    import torch
else:
    torch = LazyModule("torch")


def damped(hessian: torch.Tensor, damping: float) -> torch.Tensor:
    """Return G + damping * mean(diag G) * I in float64."""
    hessian = hessian.double()
    ridge = damping * hessian.diagonal().mean() + torch.finfo(torch.float32).tiny
    return hessian + ridge * torch.eye(len(hessian), dtype=hessian.dtype, device=hessian.device)


def solve(hessian: torch.Tensor, right: torch.Tensor, damping: float) -> torch.Tensor:
    """Return (G + damping)^-1 B for symmetric G [n, n] and B [n, k], float64."""
    return torch.cholesky_solve(right.double(), torch.linalg.cholesky(damped(hessian, damping)))


def refit_columns(
    weight: torch.Tensor, hessian: torch.Tensor, kept: torch.Tensor, damping: float
) -> torch.Tensor:
    """Return the weights [out, kept] of the kept inputs that best repeat the layer's output without
    the others.

        W' = argmin |X W^T - X[:, keep] W'^T|^2 + damping |W' - W[:, keep]|^2
           = W[:, keep] + W[:, gone] G[gone, keep] (G[keep, keep] + damping)^-1

    which without damping is W G[:, keep] G[keep, keep]^-1. Damping holds on to the weights as they
    were, in place of pulling them to zero, and is counted in means of G's diagonal.

    weight: [out, in]. gram: G = X^T X, [in, in]. kept: int64 [kept], ascending.
    """
    gone = torch.ones(weight.shape[1], dtype=torch.bool, device=weight.device)
    gone[kept] = False
    if not gone.any():
        return weight.clone()
    change = solve(hessian[kept][:, kept], hessian[kept][:, gone] @ weight[:, gone].T, damping)
    return weight[:, kept] + change.T.to(weight.dtype)

"""How much a layer's output changes when its weights do: the loss of every method, tr(D H D^T)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import nn

ROW_WEIGHTS = 2**22  # weights of a layer that are worked on at once


@dataclass
class LayerError:
    """How much the output of one layer changed over the calibration tokens.

    Attributes:
        block: number of the layer's block.
        layer: its name within the block, such as ``mlp.down_proj``.
        error: |X D^T| / |X W^T| for a change D of the weights W; |D| / |W| without calibration.
    """

    block: int
    layer: str
    error: float


def layer_loss(change: torch.Tensor, hessian: torch.Tensor | None) -> torch.Tensor:
    """Return the squared output error |X D^T|^2 = tr(D H D^T) of every row, float32 [out].

    Args:
        change: D, float32 [out, in].
        hessian: H = X^T X, [in, in]; None takes the squared norm of D's rows instead.
    """
    return _loss_terms(change, hessian).sum(-1)


def squared_norm(matrix: torch.Tensor, hessian: torch.Tensor | None) -> torch.Tensor:
    """Return |X M^T|^2 = tr(M H M^T), a float32 scalar.

    Args:
        matrix: M, float32 [out, in]: the weights of a layer or a change of them.
        hessian: H = X^T X, [in, in]; None gives |M|^2.
    """
    # some rows at a time, since their product with H is as large as they are
    parts = matrix.split(max(1, ROW_WEIGHTS // matrix.shape[1]))
    return sum(_loss_terms(part, hessian).sum() for part in parts)


def _loss_terms(change: torch.Tensor, hessian: torch.Tensor | None) -> torch.Tensor:
    """Return the terms, [out, in], whose sum is tr(D H D^T)."""
    if hessian is None:
        return change.square()
    return (change @ hessian) * change


def relative_error(
    change: torch.Tensor, weight: torch.Tensor, hessian: torch.Tensor | None
) -> float:
    """Return how much a layer's output changes, |X D^T| / |X W^T|.

    Args:
        change: D, float32 [out, in].
        weight: W, float32 [out, in].
        hessian: H = X^T X, [in, in]; None gives |D| / |W|.
    """
    return root_ratio(squared_norm(change, hessian), squared_norm(weight, hessian))


def root_ratio(change: torch.Tensor, total: torch.Tensor) -> float:
    """Return sqrt(change / total), or 0 where the total is 0.

    Args:
        change: squared norm of a change, a scalar; may be slightly negative by rounding.
        total: squared norm of what is changed, a scalar.
    """
    return float((change / total).clamp(min=0).sqrt()) if total > 0 else 0.0


def exchange_weight(linear: nn.Linear, weight: torch.Tensor, hessian: torch.Tensor | None) -> float:
    """Give a layer other weights and return its relative error.

    Args:
        linear: the layer; its old weights are overwritten, which saves a copy of them.
        weight: the new weights, float32 [out, in].
        hessian: H = X^T X, [in, in], or None.
    """
    from torch import nn

    old = linear.weight.data
    total = squared_norm(old, hessian)
    linear.weight = nn.Parameter(weight, requires_grad=False)
    return root_ratio(squared_norm(old.sub_(weight), hessian), total)

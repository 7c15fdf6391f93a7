"""How much a layer's output changes when its weights do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import nn

ROW_WEIGHTS = 2**22  # weights of a layer that are worked on at once


@dataclass
class LayerError:
    """How much a layer's output changed: |X D^T| / |X W^T| over the calibration tokens (|D| / |W|
    without them)."""

    block: int
    layer: str
    error: float


def relative_error(
    difference: torch.Tensor, weight: torch.Tensor, hessian: torch.Tensor | None
) -> float:
    """Return how much a layer's output changes, |X D^T| / |X W^T|, for a change D of its weights W,
    both [out, in].

    hessian: G = X^T X, [in, in]; without one |D| / |W|.
    """
    return root_ratio(squared_size(difference, hessian), squared_size(weight, hessian))


def root_ratio(change: torch.Tensor, whole: torch.Tensor) -> float:
    """Return the root of ``change / whole``, squared sizes of a change and of what is changed; 0
    where that is nothing."""
    return float((change / whole).clamp(min=0).sqrt()) if whole > 0 else 0.0


def squared_size(matrix: torch.Tensor, hessian: torch.Tensor | None) -> torch.Tensor:
    """Return |X M^T|^2 for M [out, in] and G = X^T X, [in, in]; without one |M|^2."""
    # the product of all rows is as large as the layer
    parts = matrix.split(max(1, ROW_WEIGHTS // matrix.shape[1]))
    return sum(((part if hessian is None else part @ hessian) * part).sum() for part in parts)


def exchange_weight(linear: nn.Linear, weight: torch.Tensor, hessian: torch.Tensor | None) -> float:
    """Give a layer other weights, [out, in]; return its relative error. Overwrites the old ones,
    which saves a copy."""
    from torch import nn

    old = linear.weight.data
    whole = squared_size(old, hessian)
    linear.weight = nn.Parameter(weight, requires_grad=False)
    return root_ratio(squared_size(old.sub_(weight), hessian), whole)

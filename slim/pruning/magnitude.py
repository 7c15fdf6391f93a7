"""Block scores by magnitude: the sum of |w| over a block's weights. Needs no data and never the
whole model in memory.

    score(block) = sum over its weight tensors W of sum_ij |W_ij|

Kim et al., "Shortened LLaMA" (arXiv:2402.02834), section 2.1. Weight tensors are those named
``*.weight``, norms included (9 per Llama block; a norm of Gemma that stores w multiplies by 1 + w
and counts as that); biases are left out, as in the authors' code."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from slim.checkpoints.checkpoint import Checkpoint
from slim.checkpoints.reader import TensorReader
from slim.checkpoints.stage import Context
from slim.core.console import track
from slim.models.spec import ModelSpec
from slim.pruning.depth import DepthPruning

if TYPE_CHECKING:
    import torch


def magnitude_score(weight: torch.Tensor, offset: float = 0.0) -> float:
    """Return sum |w + offset|: rows in float32, their total in float64.

    Args:
        weight: of any shape and floating type.
        offset: added to the weight, as a norm does that stores its factor minus 1.
    """
    values = weight.float()
    if offset:
        values = values + offset
    return values.abs().sum(dim=-1).double().sum().item()


@dataclass
class Magnitude(DepthPruning):
    """``pruner=magnitude``. Settings: see :class:`DepthPruning`."""

    cache_name: ClassVar[str] = "Magnitude"

    criterion: ClassVar[str] = "magnitude"
    score_label: ClassVar[str] = "sum of |w|"

    def scores(self, source: Checkpoint, context: Context) -> list[float]:
        reader = TensorReader(source)
        family = source.spec.family
        scores = []
        for block in track(range(source.spec.blocks), "Magnitude of blocks"):
            score = 0.0
            for name in weight_names(source, f"{family.blocks}.{block}."):
                score += magnitude_score(reader.read(name), family.offset(name))
            scores.append(score)
        return scores

    def scoring_bytes(self, spec: ModelSpec, device: str) -> int:
        largest = max(rows * columns for rows, columns in spec.block_linears().values())
        return largest * (4 + 4 + 4)  # as stored, in float32, its absolute values


def weight_names(source: Checkpoint, prefix: str) -> list[str]:
    """Return the sorted names of weight tensors, biases left out.

    Args:
        source: the model.
        prefix: that the names begin with, its dot included.
    """
    names = [name for name in source.tensors if name.startswith(prefix)]
    return sorted(name for name in names if name.endswith(".weight"))

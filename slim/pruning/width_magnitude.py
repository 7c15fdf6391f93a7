"""Width scores without data: the size of a unit's weights, or chance. One tensor in memory at a
time.

    l1: sum of |w|    l2: sum of w^2    over the weights of a channel in each coupled tensor

LLM-Pruner (arXiv:2305.11627), its code's "l1", "l2" and "random"; the last is what a criterion has
to beat."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from slim.checkpoints.checkpoint import Checkpoint
from slim.checkpoints.reader import TensorReader
from slim.checkpoints.stage import Context
from slim.core.console import track
from slim.core.lazy import LazyModule
from slim.core.settings import require_number
from slim.models.spec import ModelSpec
from slim.pruning.width import WidthPruning
from slim.pruning.width_scores import UnitScores, coupled_tensors, sum_per_unit, unit_scores
from slim.pruning.width_sizes import width_of

if TYPE_CHECKING:
    import torch
else:
    torch = LazyModule("torch")


def weight_sizes(weight: torch.Tensor, power: int, rows: bool) -> torch.Tensor:
    """Return sum |w|^power per row or per column, float32 [out] or [in].

    Args:
        weight: [out, in].
        power: 1 or 2.
        rows: a sum per row, not per column.
    """
    return sum_per_unit(lambda w: w.abs().pow(power), rows, weight)


@dataclass(kw_only=True)
class WidthMagnitude(WidthPruning):
    """Base of ``width_l1`` and ``width_l2``."""

    power: ClassVar[int]

    def scores(self, source: Checkpoint, blocks: range, context: Context) -> dict[int, UnitScores]:
        reader = TensorReader(source)
        spec = source.spec
        scores = {}
        for block in track(blocks, "Sizes of heads and channels"):
            sizes = {}
            for tensor in coupled_tensors(spec.family):
                weight = reader.read(f"{spec.family.blocks}.{block}.{tensor.name}.weight")
                sizes[tensor.name] = weight_sizes(weight, self.power, tensor.rows)
            scores[block] = unit_scores(sizes, spec, block, self.folding)
        return scores


@dataclass(kw_only=True)
class WidthL1(WidthMagnitude):
    """``pruner=width_l1``. Settings: see :class:`WidthPruning`."""

    cache_name: ClassVar[str] = "WidthL1"

    criterion: ClassVar[str] = "l1"
    power: ClassVar[int] = 1


@dataclass(kw_only=True)
class WidthL2(WidthMagnitude):
    """``pruner=width_l2``. Settings: see :class:`WidthPruning`."""

    cache_name: ClassVar[str] = "WidthL2"

    criterion: ClassVar[str] = "l2"
    power: ClassVar[int] = 2


@dataclass(kw_only=True)
class WidthRandom(WidthPruning):
    """``pruner=width_random``. Other settings: see :class:`WidthPruning`.

    Attributes:
        seed: of the draw, 0 or more.
    """

    cache_name: ClassVar[str] = "WidthRandom"

    seed: int = 0

    criterion: ClassVar[str] = "random"

    def __post_init__(self) -> None:
        super().__post_init__()
        require_number("pruner.seed", self.seed, 0, integer=True)

    def scores(self, source: Checkpoint, blocks: range, context: Context) -> dict[int, UnitScores]:
        generator = torch.Generator().manual_seed(self.seed)
        scores = {}
        for block in blocks:
            width = width_of(source.spec, block)
            groups = torch.rand(width.kv_heads, generator=generator)
            channels = torch.rand(width.channels, generator=generator)
            scores[block] = UnitScores(groups, channels)
        return scores

    def scoring_bytes(self, spec: ModelSpec, device: str) -> int:
        return 0

"""Round to nearest: every weight goes to the nearest point of a uniform grid per group. Needs no calibration text.

    w^ = scale (round(w / scale) + zero - zero)

The grid spans all weights of its group (``search=1``, the plain method that others are measured against), or less: the
interval is shrunk by the factor with the smallest squared error, which clips outliers in favour of finer steps.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from slim.blockwise import SegmentView
from slim.lazy import LazyModule
from slim.quantization.grid import search, shrink_factors
from slim.quantization.method import Quantization
from slim.quantization.scheme import Scheme
from slim.quantization.visitor import QuantVisitor
from slim.settings import require_number

if TYPE_CHECKING:
    import torch

    from slim.architecture import ModelDescription
else:
    torch = LazyModule("torch")


@dataclass
class RTN(Quantization):
    """Settings of round to nearest, beside those of every method.

    search: how many intervals are tried per group, 1 to 100; 1: the grid spans all weights.
    """

    search: int = 1

    version: ClassVar[int] = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        require_number("quant.search", self.search, 1, 100, integer=True)

    def visitor(self, model: ModelDescription) -> RoundToNearest:
        return RoundToNearest(self.scheme, getattr(torch, model.dtype), self.search)


class RoundToNearest(QuantVisitor):
    """RTN on the walk; looks at weights only."""

    needs_gram = False

    def __init__(self, scheme: Scheme, dtype: torch.dtype, steps: int = 1):
        super().__init__(dtype)
        self.scheme, self.factors = scheme, shrink_factors(steps)

    def quantise(self, view: SegmentView) -> dict[str, torch.Tensor]:
        for name, linear in view.linears.items():
            self.done[name] = search(linear.weight, self.scheme, self.dtype, factors=self.factors)
        return {name: self.done[name].dequantise() for name in view.linears}

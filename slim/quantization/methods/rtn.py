"""Round to nearest: every weight goes to the nearest point of a uniform grid per group. Needs no
calibration text.

    w^ = scale (round(w / scale) + zero - zero)

The grid spans all weights of its group (``search=1``, the plain method that others are measured
against), or less: the interval is shrunk by the factor with the smallest squared error, which clips
outliers in favour of finer steps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from slim.calibration.sequential import LinearGroup
from slim.core.settings import require_number
from slim.quantization.formats import Format, get_format
from slim.quantization.methods.base import Quantization
from slim.quantization.methods.block_method import QuantizationMethod
from slim.quantization.scheme import Scheme
from slim.quantization.solvers.error_feedback import by_rows
from slim.quantization.solvers.grid import search, shrink_factors

if TYPE_CHECKING:
    import torch

    from slim.models.spec import ModelSpec


@dataclass
class RTN(Quantization):
    """Settings of round to nearest, beside those of every method.

    search: how many intervals are tried per group, 1 to 100; 1: the grid spans all weights.
    """

    cache_name: ClassVar[str] = "RTN"

    search: int = 1

    version: ClassVar[int] = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        require_number("quant.search", self.search, 1, 100, integer=True)

    def method(self, spec: ModelSpec, schemes: Mapping[str, Scheme]) -> RoundToNearest:
        return RoundToNearest(schemes, spec.dtype, get_format(self.format), self.search)


class RoundToNearest(QuantizationMethod):
    """RTN on the walk; looks at weights only."""

    needs_hessian = False

    def __init__(
        self, schemes: Mapping[str, Scheme], dtype: str, form: Format | None = None, steps: int = 1
    ):
        super().__init__(schemes, dtype, form)
        self.factors = shrink_factors(steps)

    def quantize(self, view: LinearGroup) -> dict[str, torch.Tensor]:
        for name, weight in self.weights(view).items():
            scheme = self.scheme(view, name)
            self.done[name] = by_rows(
                weight,
                lambda rows, scheme=scheme: search(
                    rows, scheme, self.scale_dtype, factors=self.factors
                ),
            )
        return {name: self.done[name].dequantize() for name in self.weights(view)}

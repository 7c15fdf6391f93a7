"""Round to nearest: every weight goes to the nearest point of a uniform grid per group.

    w^ = scale (round(w / scale) + zero - zero)

Needs no calibration text. The grid spans all weights of its group (``search=1``, the plain method
that others are measured against), or less: the interval is shrunk by the factor with the smallest
squared error, which clips outliers in favour of finer steps.
"""

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
from slim.quantization.solvers.grid import Quantized, search, shrink_factors

if TYPE_CHECKING:
    import torch

    from slim.models.spec import ModelSpec


@dataclass
class RTN(Quantization):
    """Settings of round to nearest, besides those of every method.

    Attributes:
        search: how many intervals are tried per group, 1 (the grid spans all weights) to 100.
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
    """RTN applied to one linear group after another; looks at weights only."""

    needs_hessian = False

    def __init__(
        self, schemes: Mapping[str, Scheme], dtype: str, form: Format | None = None, steps: int = 1
    ):
        """Take the settings.

        Args:
            schemes: full layer name -> scheme.
            dtype: type of the model, such as ``"bfloat16"``.
            form: the format written; None: compressed-tensors.
            steps: intervals tried per group.
        """
        super().__init__(schemes, dtype, form)
        self.factors = shrink_factors(steps)

    def quantize(self, group: LinearGroup) -> dict[str, torch.Tensor]:
        dense = {}
        for name, weight in self.weights(group).items():
            scheme = self.scheme(group, name)

            def round_rows(rows: torch.Tensor, scheme: Scheme = scheme) -> Quantized:
                return search(rows, scheme, self.scale_dtype, factors=self.factors)

            self.done[name] = by_rows(weight, round_rows)
            dense[name] = self.done[name].dequantize()
        return dense

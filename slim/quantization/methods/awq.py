"""Activation-aware weight quantisation: scale input channels, clip, refit. Lin et al.,
arXiv:2306.00978.

1. Channels are scaled where that lowers the loss tr(D G D^T): see scaling.py.
2. Every group of weights is clipped to the interval with the smallest loss of that group, e G_gg
e^T. 3. Beyond the paper, scales are refitted by least squares under G for the codes as they are,
weights are rounded again,
   and so on; each row keeps its best state.

alpha = 0 with the plain grid is round to nearest and always among the candidates, so no layer's
loss is above RTN's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from slim.core.lazy import LazyModule
from slim.core.settings import require_flag, require_number
from slim.quantization.formats import Format, get_format
from slim.quantization.methods.calibrated import CalibratedQuantization
from slim.quantization.methods.scaling import ScaledMethod
from slim.quantization.scheme import Scheme
from slim.quantization.solvers.error_feedback import better_rows, by_rows, refit_scales
from slim.quantization.solvers.grid import Quantized, encode, minmax, search, shrink_factors

if TYPE_CHECKING:
    import torch

    from slim.models.spec import ModelSpec
else:
    torch = LazyModule("torch")

REFITS = 2  # rounds of refitting scales and rounding again


@dataclass
class AWQ(CalibratedQuantization):
    """Settings of AWQ, beside those of every method.

    grid: how many values of alpha from 0 to 1 are tried; 1: no scaling. clip: how many intervals
        are tried per group;
    1: none is clipped. refit: whether scales are refitted after rounding.
    """

    cache_name: ClassVar[str] = "AWQ"

    grid: int = 20
    clip: int = 10
    refit: bool = True

    version: ClassVar[int] = 3

    def __post_init__(self) -> None:
        super().__post_init__()
        require_number("quant.grid", self.grid, 1, 200, integer=True)
        require_number("quant.clip", self.clip, 1, 100, integer=True)
        require_flag("quant.refit", self.refit)

    def method(self, spec: ModelSpec, schemes: Mapping[str, Scheme]) -> ActivationAware:
        return ActivationAware(
            schemes, spec.dtype, get_format(self.format), self.grid, self.clip, self.refit
        )


class ActivationAware(ScaledMethod):
    """AWQ on the walk; settings as in :class:`AWQ`."""

    def __init__(
        self,
        schemes: Mapping[str, Scheme],
        dtype: str,
        form: Format | None = None,
        grid: int = 20,
        clip: int = 10,
        refit: bool = True,
    ):
        super().__init__(schemes, dtype, form, grid)
        self.factors, self.refits = shrink_factors(clip), REFITS if refit else 0

    def solve(
        self,
        weights: dict[str, torch.Tensor],
        hessian: torch.Tensor,
        schemes: dict[str, Scheme],
        where: str,
    ) -> dict[str, Quantized]:
        return {
            name: by_rows(
                weight, lambda part, scheme=schemes[name]: self._clipped(part, hessian, scheme)
            )
            for name, weight in weights.items()
        }

    def _clipped(self, weight: torch.Tensor, hessian: torch.Tensor, scheme: Scheme) -> Quantized:
        """Return, row by row, the best of round to nearest, clipped, and refitted."""
        blocks = diagonal_blocks(hessian, scheme.group(weight.shape[-1]))
        candidates = [search(weight, scheme, self.scale_dtype, blocks, self.factors)]
        for _ in range(self.refits):
            last = candidates[-1]
            codes = encode(weight, last.scale, last.zero, scheme.levels)
            candidates.append(refit_scales(weight, replace(last, codes=codes), hessian))
        return better_rows(weight, hessian, [minmax(weight, scheme, self.scale_dtype), *candidates])


def diagonal_blocks(hessian: torch.Tensor, group: int) -> torch.Tensor:
    """Return the blocks G_gg on the diagonal, [groups, group, group]."""
    groups = hessian.shape[0] // group
    return (
        hessian.view(groups, group, groups, group)
        .diagonal(dim1=0, dim2=2)
        .permute(2, 0, 1)
        .contiguous()
    )

"""Activation-aware weight quantization: scale input channels, clip, refit.

Lin et al., arXiv:2306.00978, with a third step beyond the paper:

1. Channels are scaled where that lowers the loss tr(D H D^T) (``scaling.py``).
2. Every group of weights is clipped to the interval with the smallest loss of that group, e H_gg
e^T. 3. Scales are refitted by least squares under H for the codes as they are, weights are rounded
again,
   and so on; each row keeps its best state.

alpha = 0 with the plain grid is round to nearest and always among the candidates, so no layer's
loss is above RTN's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from slim.core.lazy import LazyModule
from slim.core.settings import require_flag, require_number
from slim.quantization.formats import Format, get_format
from slim.quantization.methods.calibrated import CalibratedQuantization
from slim.quantization.methods.scaling import RoundingProblem, ScaledMethod
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
    """Settings of AWQ, besides those of every calibrated method.

    Attributes:
        grid: how many values of alpha from 0 to 1 are tried, 1 (no scaling) to 200.
        clip: how many intervals are tried per group, 1 (none is clipped) to 100.
        refit: whether scales are refitted after rounding.
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

    def check(self, spec: ModelSpec) -> None:
        spec.require_decoder(
            "quant=awq",
            "a layer before each group that takes up its scales",
            "Use quant=gptq, quant=rtn or quant=hqq.",
        )
        super().check(spec)

    def method(self, spec: ModelSpec, schemes: Mapping[str, Scheme]) -> ActivationAware:
        form = get_format(self.format)
        method = ActivationAware(schemes, spec.dtype, form, self.grid, self.clip, self.refit)
        method.propagates = self.propagate
        return method


class ActivationAware(ScaledMethod):
    """AWQ applied to one linear group after another."""

    def __init__(
        self,
        schemes: Mapping[str, Scheme],
        dtype: str,
        form: Format | None = None,
        grid: int = 20,
        clip: int = 10,
        refit: bool = True,
    ):
        """Take the settings: grid, clip and refit as in :class:`AWQ`.

        Args:
            schemes: full layer name -> scheme.
            dtype: type of the model, such as ``"bfloat16"``.
            form: the format written; None: compressed-tensors.
            grid: values of alpha.
            clip: intervals per group.
            refit: whether scales are refitted.
        """
        super().__init__(schemes, dtype, form, grid)
        self.factors = shrink_factors(clip)
        self.refits = REFITS if refit else 0

    def solve(self, problem: RoundingProblem) -> dict[str, Quantized]:
        layers = {}
        for name, weight in problem.weights.items():
            scheme = problem.schemes[name]

            def clip_rows(rows: torch.Tensor, scheme: Scheme = scheme) -> Quantized:
                return self._clipped(rows, problem.hessian, scheme)

            layers[name] = by_rows(weight, clip_rows)
        return layers

    def _clipped(self, weight: torch.Tensor, hessian: torch.Tensor, scheme: Scheme) -> Quantized:
        """Return, row by row, the best of round to nearest, clipped, and refitted."""
        blocks = diagonal_blocks(hessian, scheme.group(weight.shape[-1]))
        nearest = minmax(weight, scheme, self.scale_dtype)
        candidates = [nearest, search(weight, scheme, self.scale_dtype, blocks, self.factors)]
        for _ in range(self.refits):
            last = candidates[-1]
            codes = encode(weight, last.scale, last.zero, scheme.levels)
            candidates.append(refit_scales(weight, replace(last, codes=codes), hessian))
        return better_rows(weight, hessian, candidates)


def diagonal_blocks(hessian: torch.Tensor, group: int) -> torch.Tensor:
    """Return the blocks H_gg on the diagonal, [groups, group, group].

    Args:
        hessian: H, float32 [in, in].
        group: columns in a group; it divides ``in``.
    """
    groups = hessian.shape[0] // group
    blocks = hessian.view(groups, group, groups, group).diagonal(dim1=0, dim2=2)
    return blocks.permute(2, 0, 1).contiguous()

"""GPTQ: weights are rounded one column after another, and the columns behind make up for each
error.

Frantar et al., arXiv:2210.17323. With X the layer's inputs and H = X^T X + damping, the columns j =
1, 2, ... of W:

    t_j = w_j + sum_k<j (w_k - w^_k) A_kj,    w^_j = Q(t_j),    H = A diag(d)^2 A^T, A unit upper triangular

which is the paper's recursion on H^-1 without the inverse (see solve.py). Beyond the paper, with
``refine``, every code and every scale goes again to its best value given all the others (see
refine.py), which only ever lowers the loss. With ``scaling=awq`` channels are scaled first, where
that lowers the loss."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from slim.core.errors import SlimError
from slim.core.lazy import LazyModule
from slim.core.settings import require_choice, require_flag, require_number
from slim.quantization.formats import get_format
from slim.quantization.methods.calibrated import CalibratedQuantization
from slim.quantization.methods.scaling import ScaledMethod
from slim.quantization.scheme import WHOLE_ROW, Scheme
from slim.quantization.solvers.error_feedback import Feedback, by_rows, feedback, gptq, permuted
from slim.quantization.solvers.grid import Quantized, layer_loss, search, shrink_factors
from slim.quantization.solvers.refine import refine

if TYPE_CHECKING:
    import torch

    from slim.models.spec import ModelSpec
else:
    torch = LazyModule("torch")

SCALINGS = ("none", "awq")


@dataclass
class GPTQ(CalibratedQuantization):
    """Settings of GPTQ, beside those of every method.

    act_order: columns with large inputs first. static_groups: groups are formed of neighbouring
        columns all the same, and their grids chosen beforehand; without it and with act_order,
        columns are grouped in that order.
    damping: added to the diagonal of G, in means of it; grows where the factorisation fails.
    true_sequential: whether the layers of a block see the inputs that the quantised ones before
        them give.
    scaling: ``awq`` scales channels first. grid: values of its exponent from 0 to 1.
    clip: intervals tried per group. refine: rounds of coordinate descent and refitted scales; 0:
    the paper's method."""

    cache_name: ClassVar[str] = "GPTQ"

    act_order: bool = True
    static_groups: bool = True
    damping: float = 0.01
    true_sequential: bool = True
    scaling: str = "none"
    grid: int = 20
    clip: int = 15
    refine: int = 3

    version: ClassVar[int] = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("act_order", "static_groups", "true_sequential"):
            require_flag(f"quant.{name}", getattr(self, name))
        require_number("quant.damping", self.damping, 0.0, 1.0)
        require_choice("quant.scaling", self.scaling, SCALINGS)
        require_number("quant.grid", self.grid, 2, 200, integer=True)
        require_number("quant.clip", self.clip, 1, 100, integer=True)
        require_number("quant.refine", self.refine, 0, 100, integer=True)
        if self.scaling == "awq" and not self.true_sequential:
            raise SlimError(
                "quant.scaling=awq folds factors into layers of the block as it goes: it needs quant.true_sequential=true."
            )

    @property
    def ordered(self) -> bool:
        return self.act_order and not self.static_groups and self.group_size != WHOLE_ROW

    def format_settings(self) -> dict:
        return {
            "static_groups": self.static_groups,
            "damp_percent": self.damping,
            "true_sequential": self.true_sequential,
        }

    def peak_bytes(self, spec: ModelSpec, device: str) -> int:
        widest = max(columns for _, columns in spec.block_linears().values())
        return super().peak_bytes(spec, device) + 4 * widest**2  # the factor beside the Gram matrix

    def method(self, spec: ModelSpec, schemes: Mapping[str, Scheme]) -> ErrorFeedback:
        return ErrorFeedback(self, schemes, spec.dtype)


class ErrorFeedback(ScaledMethod):
    """GPTQ on the walk, with the settings of its stage."""

    def __init__(self, stage: GPTQ, schemes: Mapping[str, Scheme], dtype: str):
        super().__init__(
            schemes, dtype, get_format(stage.format), stage.grid if stage.scaling == "awq" else 1
        )
        self.stage, self.factors, self.sequential = (
            stage,
            shrink_factors(stage.clip),
            stage.true_sequential,
        )

    def solve(
        self,
        weights: dict[str, torch.Tensor],
        hessian: torch.Tensor,
        schemes: dict[str, Scheme],
        where: str,
    ) -> dict[str, Quantized]:
        layers = self._fed_back(weights, hessian, schemes, where)
        if layers is None:
            return self._nearest(weights, schemes)
        if self.stage.refine:
            order = self._order(hessian) if self.stage.ordered else None
            hessian = hessian if order is None else permuted(hessian, order)
            for name, layer in layers.items():
                layers[name] = by_rows(
                    weights[name],
                    lambda rows, part: self._refine(rows, part, hessian, order),
                    layer,
                )
        return layers

    def _fed_back(
        self, weights: dict, hessian: torch.Tensor, schemes: dict, where: str
    ) -> dict[str, Quantized] | None:
        """Round with error feedback. None where G cannot be factored. The factor, as large as G, is
        gone afterwards."""
        feed = self._factor(hessian, where)
        return feed and {
            name: by_rows(
                weight, lambda rows, scheme=schemes[name]: self._round(rows, hessian, feed, scheme)
            )
            for name, weight in weights.items()
        }

    def _pays(
        self,
        weights: dict,
        schemes: dict,
        scaled: dict,
        scales: torch.Tensor,
        hessian: torch.Tensor,
        where: str,
    ) -> bool:
        """Whether scaled layers are used: only if their summed loss is below that of layers that
        are not scaled."""
        plain, gain = self.solve(weights, hessian, schemes, where), 0.0
        for name, weight in weights.items():
            gain += float(layer_loss(plain[name].dequantize() - weight, hessian).sum())
            gain -= float(layer_loss(scaled[name].dequantize() / scales - weight, hessian).sum())
        return gain > 0

    def _factor(self, hessian: torch.Tensor, where: str) -> Feedback | None:
        """Factor G in the order the columns are taken in, and note what that needed."""
        feed = feedback(hessian, self.stage.damping, self._order(hessian))
        if feed is None:
            self.notes.append(
                f"{where}: the Gram matrix could not be factored even with full damping; rounded to nearest."
            )
        elif feed.damping > self.stage.damping:
            self.notes.append(
                f"{where}: damping raised from {self.stage.damping:g} to {feed.damping:g} to factor G."
            )
        return feed

    def _order(self, hessian: torch.Tensor) -> torch.Tensor:
        """Return the order the columns are taken in, int64 [in]."""
        if self.stage.act_order:
            return hessian.diagonal().argsort(descending=True, stable=True)
        return torch.arange(len(hessian), device=hessian.device)

    def _round(
        self, weight: torch.Tensor, hessian: torch.Tensor, feed: Feedback, scheme: Scheme
    ) -> Quantized:
        fixed = None
        if self.stage.static_groups:
            fixed = search(weight, scheme, self.scale_dtype, hessian.diagonal(), self.factors)
        return gptq(weight, feed, scheme, self.scale_dtype, self.factors, fixed)

    def _refine(
        self,
        weight: torch.Tensor,
        layer: Quantized,
        hessian: torch.Tensor,
        order: torch.Tensor | None,
    ) -> Quantized:
        return refine(weight, layer, hessian, self.stage.refine, order)

"""GPTQ: weights are rounded one column after another, and later columns make up for each error.

Frantar et al., arXiv:2210.17323. With X the layer's inputs, H = X^T X and the columns j = 1, 2, ...
of W:

    t_j = w_j + sum_k<j (w_k - w^_k) A_kj,    w^_j = Q(t_j)
    H + damping mean(diag H) I = A diag(d)^2 A^T,    A unit upper triangular

which is the paper's recursion on the inverse of H without the inverse
(``solvers/error_feedback.py``). Beyond the paper, with ``refine``, every code and every scale goes
again to its best value given all the others (``solvers/coordinate_descent.py``), which only ever
lowers the loss. With ``scaling=awq`` channels are scaled first, where that lowers the loss
(``scaling.py``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from slim.core.errors import SlimError
from slim.core.lazy import LazyModule
from slim.core.settings import require_choice, require_flag, require_number
from slim.quantization.formats import get_format
from slim.quantization.methods.calibrated import CalibratedQuantization
from slim.quantization.methods.scaling import RoundingProblem, ScaledMethod
from slim.quantization.scheme import WHOLE_ROW, Scheme
from slim.quantization.solvers.coordinate_descent import refine
from slim.quantization.solvers.error_feedback import (
    CholeskyFactor,
    activation_order,
    by_rows,
    gptq,
    groups_of,
    noted_factor,
    permuted,
)
from slim.quantization.solvers.grid import Quantized, search, shrink_factors

if TYPE_CHECKING:
    import torch

    from slim.models.spec import ModelSpec
else:
    torch = LazyModule("torch")

SCALINGS = ("none", "awq")


@dataclass
class GPTQ(CalibratedQuantization):
    """Settings of GPTQ, besides those of every calibrated method.

    Attributes:
        act_order: columns with large inputs first.
        static_groups: groups are formed of neighboring columns, and their grids chosen beforehand.
            Without it each grid is chosen when its group is reached; with act_order, columns are
            then grouped in that order.
        damping: added to the diagonal of H, in means of it, 0 to 1; grows where H cannot be
            factored.
        true_sequential: whether the layers of a block see the inputs that the quantised ones before
            them give.
        scaling: ``none``, or ``awq``: channels are scaled first where that lowers the loss.
        grid: values of the scaling's exponent from 0 to 1, 2 to 200.
        clip: intervals tried per group, 1 (none is clipped) to 100.
        refine: rounds of coordinate descent over codes and scales, 0 (the paper's method) to 100.
    """

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
                "quant.scaling=awq folds factors into layers that are already quantised: it needs "
                "quant.true_sequential=true."
            )
        if self.propagate and not self.true_sequential:
            raise SlimError(
                "quant.propagate=true makes up for the layers before, which "
                "quant.true_sequential=false leaves out of sight. Use quant.true_sequential=true."
            )

    @property
    def ordered(self) -> bool:
        """Whether columns are grouped in activation order."""
        return self.act_order and not self.static_groups and self.group_size != WHOLE_ROW

    def format_settings(self) -> dict:
        return {
            "static_groups": self.static_groups,
            "damp_percent": self.damping,
            "true_sequential": self.true_sequential,
        }

    def peak_bytes(self, spec: ModelSpec, device: str) -> int:
        widest = max(columns for _, columns in spec.block_linears().values())
        cholesky_factor_bytes = 4 * widest**2
        return super().peak_bytes(spec, device) + cholesky_factor_bytes

    def method(self, spec: ModelSpec, schemes: Mapping[str, Scheme]) -> ErrorFeedback:
        return ErrorFeedback(self, schemes, spec.dtype)


class ErrorFeedback(ScaledMethod):
    """GPTQ applied to one linear group after another."""

    def __init__(self, stage: GPTQ, schemes: Mapping[str, Scheme], dtype: str):
        """Take the settings.

        Args:
            stage: settings of the method.
            schemes: full layer name -> scheme.
            dtype: type of the model, such as ``"bfloat16"``.
        """
        grid = stage.grid if stage.scaling == "awq" else 1
        super().__init__(schemes, dtype, get_format(stage.format), grid)
        self.stage = stage
        self.factors = shrink_factors(stage.clip)
        self.sequential = stage.true_sequential
        self.propagates = stage.propagate

    def solve(self, problem: RoundingProblem) -> dict[str, Quantized]:
        layers = self._error_feedback(problem)
        if layers is None:
            return self._nearest(problem)
        if self.stage.refine:
            hessian, order = problem.hessian, None
            if self.stage.ordered:
                # the descent goes group by group and wants the columns of a group side by side
                order = self._order(hessian)
                hessian = permuted(hessian, order)

            def descend(rows: torch.Tensor, layer: Quantized) -> Quantized:
                return refine(rows, layer, hessian, self.stage.refine, order)

            for name, layer in layers.items():
                layers[name] = by_rows(problem.weights[name], descend, layer)
        return self._indexed(layers)

    def unscaled_if_better(
        self, problem: RoundingProblem, scaled: dict[str, Quantized], scales: torch.Tensor
    ) -> dict[str, Quantized] | None:
        """Return the layers rounded without scaling, unless the scaled ones have less loss in sum.

        Args:
            problem: the unscaled problem.
            scaled: the layers rounded with scaled channels, by name.
            scales: s, float32 [in].
        """
        unscaled = self.solve(problem)
        gain = 0.0
        for name in problem.weights:
            gain += problem.loss(name, unscaled[name])
            gain -= problem.loss(name, scaled[name], scales)
        return None if gain > 0 else unscaled

    def _error_feedback(self, problem: RoundingProblem) -> dict[str, Quantized] | None:
        """Round column by column; None where H cannot be factored.

        The factor, as large as H, lives in here alone: refining comes after it."""
        cholesky = self._factor(problem)
        if cholesky is None:
            return None
        layers = {}
        for name, weight in problem.weights.items():
            scheme = problem.schemes[name]

            def round_rows(rows: torch.Tensor, scheme: Scheme = scheme) -> Quantized:
                return self._round(rows, problem.hessian, cholesky, scheme)

            layers[name] = by_rows(weight, round_rows)
        return layers

    def _nearest(self, problem: RoundingProblem) -> dict[str, Quantized]:
        return self._indexed(super()._nearest(problem))

    def _indexed(self, layers: dict[str, Quantized]) -> dict[str, Quantized]:
        """Give layers whose groups are formed of neighbors after all, as those of a single group
        are, the index that the file must have for every layer where columns are ordered."""
        if self.stage.ordered:
            for layer in layers.values():
                layer.group_index = groups_of(layer)
        return layers

    def _factor(self, problem: RoundingProblem) -> CholeskyFactor | None:
        """Factor H in the order the columns are taken in, and note what that needed."""
        hessian = problem.hessian
        order, damping = self._order(hessian), self.stage.damping
        return noted_factor(problem.name, hessian, damping, order, self.notes, "rounded to nearest")

    def _order(self, hessian: torch.Tensor) -> torch.Tensor:
        """Return the order the columns are taken in, int64 [in]."""
        if self.stage.act_order:
            return activation_order(hessian)
        return torch.arange(len(hessian), device=hessian.device)

    def _round(
        self,
        weight: torch.Tensor,
        hessian: torch.Tensor,
        cholesky: CholeskyFactor,
        scheme: Scheme,
    ) -> Quantized:
        fixed = None
        if self.stage.static_groups:
            fixed = search(weight, scheme, self.scale_dtype, hessian.diagonal(), self.factors)
        return gptq(weight, cholesky, scheme, self.scale_dtype, self.factors, fixed)

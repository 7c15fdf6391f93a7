"""Half-quadratic quantization: a grid per group that fits most weights well and gives outliers up.

Badri and Shaji, "Half-Quadratic Quantization of Large Machine Learning Models", 2023
(mobiusml.github.io/hqq_blog). Residuals of weights have heavy tails, so the grid is chosen by an
l_p norm with p < 1:

    min over z, s of |W - s (Q - z)|_p^p,    Q = clamp(round(W / s + z), 0, 2^b - 1)

A copy E of the residual splits that in two, with phi close to |E|_p^p / p:

    min over E, z, s of phi(E) + beta/2 |W - s (Q - z) - E|^2

and each part has a closed form. ``steps`` times, beta growing by ``kappa`` every time:

    E <- shrink(W - s (Q - z), beta, p),    shrink(x) = sign(x) max(|x| - |x|^(p-1) / beta, 0)
    z <- mean(Q - (W - E) / s)
    s <- <W - E, Q - z> / |Q - z|^2

The original keeps s and stores z as it comes. Files that other engines read hold integer zero
points, and with those and a fixed s there is nothing left to gain, so s is fitted too. Residuals
are measured in steps of the grid, so that beta means the same in every layer, and every step is
judged by its error as stored (docs/methods/hqq.md). Needs no calibration text.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from slim.calibration.sequential import LinearGroup
from slim.core.lazy import LazyModule
from slim.core.settings import require_number
from slim.quantization.formats import Format, get_format
from slim.quantization.methods.base import Quantization
from slim.quantization.methods.block_method import QuantizationMethod
from slim.quantization.scheme import Scheme
from slim.quantization.solvers.error_feedback import concatenated
from slim.quantization.solvers.grid import Quantized, decode, encode, grouped, limits, minmax

if TYPE_CHECKING:
    import torch

    from slim.models.spec import ModelSpec
else:
    torch = LazyModule("torch")

CHUNK = 2**17  # weights worked on at once: what a step needs of them stays in the processor's cache


@dataclass(frozen=True)
class Splitting:
    """The iteration.

    Attributes:
        p: exponent of the norm.
        beta: weight of the coupling in the first step; residuals are counted in steps of the grid.
        kappa: growth of beta per step.
        steps: number of steps.
    """

    p: float = 0.7
    beta: float = 10.0
    kappa: float = 1.1
    steps: int = 20


@dataclass
class HQQ(Quantization):
    """Settings of HQQ, besides those of every method.

    Attributes:
        p: exponent of the norm, 0.1 to 1; the smaller, the less an outlier counts.
        beta: weight of the coupling in the first step, 0.01 to 10^6; the larger, the nearer to
            least squares.
        kappa: growth of beta per step, 1 to 10.
        steps: number of steps, 1 to 1000.
    """

    cache_name: ClassVar[str] = "HQQ"

    p: float = 0.7
    beta: float = 10.0
    kappa: float = 1.1
    steps: int = 20

    version: ClassVar[int] = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        require_number("quant.p", self.p, 0.1, 1)
        require_number("quant.beta", self.beta, 0.01, 1e6)
        require_number("quant.kappa", self.kappa, 1, 10)
        require_number("quant.steps", self.steps, 1, 1000, integer=True)

    def method(self, spec: ModelSpec, schemes: Mapping[str, Scheme]) -> HalfQuadratic:
        splitting = Splitting(self.p, self.beta, self.kappa, self.steps)
        return HalfQuadratic(schemes, spec.dtype, get_format(self.format), splitting)


class HalfQuadratic(QuantizationMethod):
    """HQQ applied to one linear group after another; looks at weights only."""

    needs_hessian = False

    def __init__(
        self,
        schemes: Mapping[str, Scheme],
        dtype: str,
        form: Format | None = None,
        splitting: Splitting = Splitting(),  # noqa: B008 - it cannot be changed
    ):
        """Take the settings.

        Args:
            schemes: full layer name -> scheme.
            dtype: type of the model, such as ``"bfloat16"``.
            form: the format written; None: compressed-tensors.
            splitting: the iteration.
        """
        super().__init__(schemes, dtype, form)
        self.splitting = splitting

    def quantize(self, group: LinearGroup) -> dict[str, torch.Tensor]:
        dense = {}
        for name, weight in self.weights(group).items():
            scheme = self.scheme(group, name)
            self.done[name] = quantize(weight, scheme, self.scale_dtype, self.splitting)
            dense[name] = self.done[name].dequantize()
        return dense


def shrink(x: torch.Tensor, beta: float, p: float) -> torch.Tensor:
    """Return the generalized soft threshold: argmin over e of phi(e) + beta/2 (e - x)^2.

    phi is |e| for p = 1. Below, it is the penalty with derivative x^(p-1) at e = shrink(x), near
    |e|^p / p for large e.

    Args:
        x: float32 of any shape.
        beta: weight of the coupling.
        p: exponent of the norm.
    """
    size = x.abs()
    return x.sign() * (size - size.clamp(min=1e-30).pow_(p - 1).div_(beta)).clamp_(min=0)


def half_quadratic(
    blocks: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor,
    scheme: Scheme,
    splitting: Splitting,
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield scale and real-valued zero point after every step, float32 [out, groups] each.

    Args:
        blocks: weights, float32 [out, groups, group].
        scale: of the grid to begin with, float32 [out, groups].
        zero: its zero point, float32 [out, groups]; it stays where the grid is symmetric.
        scheme: bits and symmetry.
        splitting: the iteration.
    """
    beta = splitting.beta
    for _ in range(splitting.steps):
        steps = blocks / scale.unsqueeze(-1)
        codes = (steps + zero.unsqueeze(-1)).round_().clamp_(0, scheme.levels - 1)
        # (W - E) / s
        fitted = steps - shrink(steps - codes + zero.unsqueeze(-1), beta, splitting.p)
        if not scheme.symmetric:
            zero = (codes - fitted).mean(-1)
        codes -= zero.unsqueeze(-1)
        factor = (fitted * codes).sum(-1) / codes.square().sum(-1)
        # NaN where all weights lie on the zero point
        scale = torch.where(factor > 0, scale * factor, scale)
        beta *= splitting.kappa
        yield scale, zero


def lp_errors(difference: torch.Tensor, groups: int, p: float) -> torch.Tensor:
    """Return |D_g|_p^p of every group, float32 [out, groups].

    Args:
        difference: D, float32 [out, in].
        groups: groups per row.
        p: exponent of the norm.
    """
    return grouped(difference, groups).abs().pow_(p).sum(-1)


def quantize(
    weight: torch.Tensor, scheme: Scheme, dtype: torch.dtype, splitting: Splitting
) -> Quantized:
    """Quantise on the grid with the smallest l_p error per group.

    Candidates are the plain grid that spans the group (round to nearest) and the grid after each
    step, its scale rounded to ``dtype`` and its zero point to an integer. So no group's error, as
    stored, is above that of round to nearest.

    Args:
        weight: float32 [out, in].
        scheme: bits, group size and symmetry.
        dtype: type scales are stored in.
        splitting: the iteration.
    """
    size = max(1, CHUNK // weight.shape[-1])
    parts = [_quantize_rows(rows, scheme, dtype, splitting) for rows in weight.split(size)]
    return concatenated(parts)


def _quantize_rows(
    weight: torch.Tensor, scheme: Scheme, dtype: torch.dtype, splitting: Splitting
) -> Quantized:
    plain = minmax(weight, scheme, dtype)
    scale, zero = plain.scale, plain.zero
    groups = scale.shape[-1]
    error = lp_errors(plain.dequantize() - weight, groups, splitting.p)
    start = scale.float()
    low, _ = limits(weight, scheme)
    # the zero point that puts ``low`` on the grid, not yet rounded
    real_zero = zero.float() if scheme.symmetric else -low / start
    steps = half_quadratic(grouped(weight, groups), start, real_zero, scheme, splitting)
    for fitted_scale, fitted_zero in steps:
        # the grid as it would be stored
        trial_scale = fitted_scale.clamp(min=torch.finfo(dtype).tiny).to(dtype)
        trial_zero = fitted_zero.round().clamp_(0, scheme.levels - 1).to(torch.uint8)
        codes = encode(weight, trial_scale, trial_zero, scheme.levels)
        change = decode(codes, trial_scale, trial_zero) - weight
        trial_error = lp_errors(change, groups, splitting.p)
        better = trial_error < error
        error = torch.where(better, trial_error, error)
        scale = torch.where(better, trial_scale, scale)
        zero = torch.where(better, trial_zero, zero)
    return Quantized(encode(weight, scale, zero, scheme.levels), scale, zero, scheme)

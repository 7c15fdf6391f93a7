"""Scaling channels before rounding, as AWQ does: which factor, and where its inverse goes.

Weights that meet large inputs matter most. Multiplying their columns by s > 1, and dividing the
input channel by s, leaves the function as it is but makes their rounding error smaller by s; 1/s is
folded into the module in front (a norm, or the rows of the linear layer before it). Per linear
group with input X:

    W^ = Q(W diag(s)) diag(s)^-1,    s = m^alpha,  m = sqrt(diag(H) / n),  H = X^T X

and alpha is the one with the smallest loss |X (W^ - W)^T|^2 = tr(D H D^T), D = W^ - W: trying one
takes no forward pass. Where the paper (Lin et al., arXiv:2306.00978) takes the mean of |X| for m,
this takes the root mean square, which H holds.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from slim.calibration.errors import layer_loss
from slim.calibration.sequential import LinearGroup
from slim.core.lazy import LazyModule
from slim.quantization.formats import Format
from slim.quantization.methods.block_method import QuantizationMethod
from slim.quantization.scheme import Scheme
from slim.quantization.solvers.grid import Quantized, minmax, search

if TYPE_CHECKING:
    import torch
else:
    torch = LazyModule("torch")

SEARCH_ROWS = 512  # rows of a layer that the search for alpha looks at; the loss is a sum over rows
# intervals tried while searching alpha; the final grid is searched finely
SEARCH_FACTORS = (1.0, 0.85, 0.7)


@dataclass(frozen=True)
class RoundingProblem:
    """Layers with a common input that are to be rounded under its Hessian.

    Attributes:
        name: of the linear group, for notes.
        weights: layer -> float32 [out, in].
        schemes: layer -> bits, group size and symmetry.
        hessian: H = X^T X, float32 [in, in].
    """

    name: str
    weights: dict[str, torch.Tensor]
    schemes: dict[str, Scheme]
    hessian: torch.Tensor

    def scaled_by(self, scales: torch.Tensor) -> RoundingProblem:
        """Return the problem with columns times ``scales`` and inputs divided by them, [in]."""
        weights = {name: weight * scales for name, weight in self.weights.items()}
        return replace(self, weights=weights, hessian=self.hessian / scales / scales.unsqueeze(1))

    def loss(self, layer: str, rounded: Quantized, scales: torch.Tensor | None = None) -> float:
        """Return the loss of one layer under this problem's weights and Hessian.

        Args:
            layer: its name.
            rounded: its codes and grid.
            scales: s, [in], if they round the scaled weights.
        """
        dense = rounded.dequantize()
        if scales is not None:
            dense = dense / scales
        return float(layer_loss(dense - self.weights[layer], self.hessian).sum())


def channel_scales(
    hessian: torch.Tensor, tokens: int, channel_map: torch.Tensor, alpha: float
) -> torch.Tensor:
    """Return s = m^alpha per output channel of the module in front, with sqrt(max s min s) = 1.

    Args:
        hessian: H, float32 [in, in].
        tokens: n, the rows of X it sums over.
        channel_map: int64 [in], the channel in front of every input channel; inputs that share one
            share its scale.
        alpha: exponent, 0 to 1.

    Returns:
        float32 [largest of channel_map + 1]; 1 for channels that reach no input (queries and keys
        in a fused layer).
    """
    channels = int(channel_map.max()) + 1
    mean_square = hessian.diagonal() / tokens
    total = torch.zeros(channels, device=hessian.device).index_add_(0, channel_map, mean_square)
    readers = torch.bincount(channel_map, minlength=channels)
    is_read = readers > 0
    magnitude = (total[is_read] / readers[is_read]).sqrt()
    # channels that are never used stay finite
    magnitude = magnitude.clamp(min=float(magnitude.max()) * 1e-4 + 1e-12)
    scales = magnitude.pow(alpha)
    centered = scales / (scales.max() * scales.min()).sqrt()
    return torch.ones_like(total).masked_scatter(is_read, centered)


def folded_norm(group: LinearGroup, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return the weight of the norm in front of a group divided by scales, as stored, [channels].

    A norm that multiplies by 1 + w stores w: (1 + w) / s - 1.

    Args:
        group: whose ``scale_module`` is the norm.
        scales: s, float32 [channels].
        dtype: type the norm is stored in.
    """
    offset = group.spec.offset
    return ((group.scale_module.weight + offset) / scales - offset).to(dtype)


class ScaledMethod(QuantizationMethod):
    """Base of the calibrated methods: subclasses ``solve`` a group; scales are tried around it."""

    def __init__(
        self, schemes: Mapping[str, Scheme], dtype: str, form: Format | None = None, grid: int = 1
    ):
        """Take the settings.

        Args:
            schemes: full layer name -> scheme.
            dtype: type of the model, such as ``"bfloat16"``.
            form: the format written; None: compressed-tensors.
            grid: how many values of alpha from 0 to 1 are tried; 1: no scaling.
        """
        super().__init__(schemes, dtype, form)
        self.alphas = [index / max(1, grid - 1) for index in range(grid)]

    def solve(self, problem: RoundingProblem) -> dict[str, Quantized]:
        """Round all layers of a problem; return them by name."""
        raise NotImplementedError

    def unscaled_if_better(
        self, problem: RoundingProblem, scaled: dict[str, Quantized], scales: torch.Tensor
    ) -> dict[str, Quantized] | None:
        """Return the layers rounded without scaling, or None where the scaled ones are to be used.

        Here: scaling is given up if it leaves any layer's loss above that of round to nearest.

        Args:
            problem: the unscaled problem.
            scaled: the layers rounded with scaled channels, by name.
            scales: s, float32 [in].
        """
        nearest = self._nearest(problem)
        for name in problem.weights:
            if not problem.loss(name, scaled[name], scales) <= problem.loss(name, nearest[name]):
                return self.solve(problem)
        return None

    def quantize(self, group: LinearGroup) -> dict[str, torch.Tensor]:
        weights = self.weights(group)
        if not weights:
            return {}
        problem = RoundingProblem(
            name=f"{group.prefix}.{', '.join(weights)}",
            weights=weights,
            schemes={name: self.scheme(group, name) for name in weights},
            hessian=group.hessian,
        )
        if not bool((problem.hessian.diagonal() > 0).any()):
            self.notes.append(
                f"{problem.name}: no calibration token reached it with an input other than 0; "
                "rounded to nearest."
            )
            layers = self._nearest(problem)
        else:
            layers = self._solve_with_scaling(group, problem)
        self.done.update(layers)
        return {name: self.finished_weight(name) for name in layers}

    def _nearest(self, problem: RoundingProblem) -> dict[str, Quantized]:
        layers = {}
        for name, weight in problem.weights.items():
            layers[name] = minmax(weight, problem.schemes[name], self.scale_dtype)
        return layers

    def _solve_with_scaling(
        self, group: LinearGroup, problem: RoundingProblem
    ) -> dict[str, Quantized]:
        """Round the layers of a group, with channels scaled where that pays, and fold 1/s if so."""
        alpha = 0.0
        if len(self.alphas) > 1 and self._foldable(group, problem):
            alpha = self._search_alpha(group, problem)
        if alpha == 0:
            return self.solve(problem)
        fold = channel_scales(problem.hessian, group.tokens, group.channel_map, alpha)
        fold = self._rounded_fold(group, fold)
        scales = fold[group.channel_map]
        scaled = self.solve(problem.scaled_by(scales))
        unscaled = self.unscaled_if_better(problem, scaled, scales)
        if unscaled is not None:
            return unscaled
        self._store_fold(group, fold)
        self.scaled.update(dict.fromkeys(scaled, scales))
        return scaled

    def _foldable(self, group: LinearGroup, problem: RoundingProblem) -> bool:
        """Whether 1/s has a place: a norm or a packed layer, and all its readers are quantised."""
        if len(problem.weights) < len(group.linears):
            return False
        # in this order: a packed layer's float32 weight is freed at this point
        return group.scale_into in self.done or group.scale_module.weight.dim() == 1

    def _search_alpha(self, group: LinearGroup, problem: RoundingProblem) -> float:
        """Return the alpha with the smallest summed loss over a sample of rows of the layers."""
        samples = {}
        for name, weight in problem.weights.items():
            samples[name] = weight[:: -(-len(weight) // SEARCH_ROWS)]
        losses = {}
        for alpha in self.alphas:
            scales = channel_scales(problem.hessian, group.tokens, group.channel_map, alpha)
            scales = scales[group.channel_map]
            importance = problem.hessian.diagonal() / scales.square()
            losses[alpha] = 0
            for name, rows in samples.items():
                rounded = search(
                    rows * scales,
                    problem.schemes[name],
                    self.scale_dtype,
                    importance,
                    SEARCH_FACTORS,
                    each_end=False,
                )
                change = rounded.dequantize() / scales - rows
                share = len(problem.weights[name]) / len(rows)
                losses[alpha] += float(layer_loss(change, problem.hessian).sum()) * share
        return min(losses, key=losses.get)

    def _rounded_fold(self, group: LinearGroup, scales: torch.Tensor) -> torch.Tensor:
        """Return what the module in front divides by, per channel, once 1/s is folded and rounded.

        For a norm that is w / round(w / s), so rounding costs nothing: the weights are quantised
        against it. For a packed layer the scale of each group is rounded by itself, and s stays
        what it is."""
        packed = self.done.get(group.scale_into)
        channels = len(group.scale_module.weight if packed is None else packed.codes)
        scales = torch.nn.functional.pad(scales, (0, channels - len(scales)), value=1.0)
        if packed is not None:
            return scales
        offset = group.spec.offset
        weight = group.scale_module.weight + offset
        stored = folded_norm(group, scales, self.dtype).float() + offset
        return torch.where(stored != 0, weight / stored, torch.ones_like(scales))

    def _store_fold(self, group: LinearGroup, scales: torch.Tensor) -> None:
        """Divide the outputs of the module in front by ``scales``.

        That changes a norm's weight, or a packed layer's scales, whose codes stay."""
        if group.scale_into not in self.done:
            self.plain[f"{group.scale_into}.weight"] = folded_norm(group, scales, self.dtype)
            return
        layer = self.done[group.scale_into]
        self.unfolded[group.scale_into] = layer.scale
        layer.scale = (layer.scale.float() / scales.unsqueeze(-1)).to(self.scale_dtype)
        if group.scale_module.bias is not None:
            self.plain[f"{group.scale_into}.bias"] = group.scale_module.bias / scales

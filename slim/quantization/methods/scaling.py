"""Scaling channels before rounding, as AWQ does: which factor, and where its inverse goes.

Weights that meet large inputs matter most. Multiplying their columns by s > 1, and dividing the
input channel by s, leaves the function as it is but makes their rounding error smaller by s; 1/s is
folded into whatever feeds the input (a norm, or the rows of the linear layer before it). Per group
of layers with one input X:

    W^ = Q(W diag(s)) diag(s)^-1,    s = m^alpha,  m = sqrt(diag(G) / n),  G = X^T X

and alpha is the one with the smallest loss |X (W^ - W)^T|^2 = tr(D G D^T), D = W^ - W: to try one
takes no forward. Where the paper (arXiv:2306.00978) takes the mean of |X| for m, this takes the
root mean square, which G holds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from slim.calibration.sequential import LinearGroup
from slim.core.lazy import LazyModule
from slim.quantization.formats import Format
from slim.quantization.methods.block_method import QuantizationMethod
from slim.quantization.scheme import Scheme
from slim.quantization.solvers.grid import Quantized, layer_loss, minmax, search

if TYPE_CHECKING:
    import torch
else:
    torch = LazyModule("torch")

SEARCH_ROWS = 512  # rows of a layer that the search for alpha looks at; the loss is a sum over rows
# intervals tried while searching alpha; the final grid is searched finely
SEARCH_FACTORS = (1.0, 0.85, 0.7)


def channel_scales(
    hessian: torch.Tensor, tokens: int, channel_map: torch.Tensor, alpha: float
) -> torch.Tensor:
    """Return s = m^alpha per channel of the feeder, float32 [largest of feeds + 1], with sqrt(max s
    min s) = 1.

    hessian: [in, in]. feeds: [in], the feeder's channel of every input channel; inputs that share
    one share its scale. Channels that feed no input (queries and keys in a fused layer) get 1."""
    channels = int(channel_map.max()) + 1
    square = hessian.diagonal() / tokens
    total = torch.zeros(channels, device=hessian.device).index_add_(0, channel_map, square)
    shared = torch.bincount(channel_map, minlength=channels)
    feeding = shared > 0
    magnitude = (total[feeding] / shared[feeding]).sqrt()
    # channels that are never used stay finite
    magnitude = magnitude.clamp(min=float(magnitude.max()) * 1e-4 + 1e-12)
    scales = magnitude.pow(alpha)
    return torch.ones_like(total).masked_scatter(
        feeding, scales / (scales.max() * scales.min()).sqrt()
    )


def folded_norm(view: LinearGroup, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return the weight of the norm that feeds a segment, divided by ``scales`` and as stored, both
    [channels].

    A norm that multiplies by 1 + w stores w: (1 + w) / s - 1.
    """
    offset = view.spec.offset
    return ((view.scale_module.weight + offset) / scales - offset).to(dtype)


class ScaledMethod(QuantizationMethod):
    """Base of the calibrated methods: ``solve`` rounds layers with a common input; scales are tried
    around it.

    grid: how many values of alpha from 0 to 1 are tried; 1: no scaling. Others as for
    :class:`QuantizationMethod`."""

    def __init__(
        self, schemes: Mapping[str, Scheme], dtype: str, form: Format | None = None, grid: int = 1
    ):
        super().__init__(schemes, dtype, form)
        self.alphas = [index / max(1, grid - 1) for index in range(grid)]

    def solve(
        self,
        weights: dict[str, torch.Tensor],
        hessian: torch.Tensor,
        schemes: dict[str, Scheme],
        where: str,
    ) -> dict[str, Quantized]:
        """Round layers, each float32 [out, in], under G, [in, in]. where: the segment's name, for
        notes."""
        raise NotImplementedError

    def quantize(self, view: LinearGroup) -> dict[str, torch.Tensor]:
        weights = self.weights(view)
        schemes = {name: self.scheme(view, name) for name in weights}
        where = f"{view.prefix}.{', '.join(weights)}"
        if not weights:
            return {}
        if not bool((view.hessian.diagonal() > 0).any()):
            self.notes.append(
                f"{where}: no calibration token reached it with an input other than 0; rounded to nearest."
            )
            chosen, scales = self._nearest(weights, schemes), None
        else:
            chosen, scales = None, None
            if len(self.alphas) > 1 and self._foldable(view, weights):
                chosen, scales = self._try_scaling(view, weights, schemes, where)
            if chosen is None:
                chosen = self.solve(weights, view.hessian, schemes, where)
        self.done.update(chosen)
        if scales is not None:
            self.scaled.update(dict.fromkeys(chosen, scales))
        return {name: self.finished_weight(name) for name in chosen}

    def _nearest(
        self, weights: dict[str, torch.Tensor], schemes: dict[str, Scheme]
    ) -> dict[str, Quantized]:
        return {
            name: minmax(weight, schemes[name], self.scale_dtype)
            for name, weight in weights.items()
        }

    def _foldable(self, view: LinearGroup, weights: dict) -> bool:
        """Whether 1/s has a place: a norm or a packed layer feeds the segment, and all its layers
        are quantised."""
        return len(weights) == len(view.linears) and (
            view.scale_into in self.done or view.scale_module.weight.dim() == 1
        )

    def _try_scaling(
        self, view: LinearGroup, weights: dict, schemes: dict, where: str
    ) -> tuple[dict[str, Quantized] | None, torch.Tensor | None]:
        """Return the layers with channels scaled and s, [in]; None, None where scaling does not
        pay."""
        alpha = self._search_alpha(view, weights, schemes)
        if alpha == 0:
            return None, None
        fold = self._fold(view, channel_scales(view.hessian, view.tokens, view.channel_map, alpha))
        scales = fold[view.channel_map]
        scaled = {name: weight * scales for name, weight in weights.items()}
        layers = self.solve(scaled, view.hessian / scales / scales.unsqueeze(1), schemes, where)
        if not self._pays(weights, schemes, layers, scales, view.hessian, where):
            return None, None
        self._store_fold(view, fold)
        return layers, scales

    def _search_alpha(
        self, view: LinearGroup, weights: dict[str, torch.Tensor], schemes: dict[str, Scheme]
    ) -> float:
        """Return the alpha with the smallest summed loss over a sample of rows of the segment's
        layers."""
        rows = {name: weight[:: -(-len(weight) // SEARCH_ROWS)] for name, weight in weights.items()}
        losses = {}
        for alpha in self.alphas:
            scales = channel_scales(view.hessian, view.tokens, view.channel_map, alpha)[
                view.channel_map
            ]
            importance = view.hessian.diagonal() / scales.square()
            losses[alpha] = sum(
                float(
                    layer_loss(
                        self._trial(weight * scales, schemes[name], importance) / scales - weight,
                        view.hessian,
                    ).sum()
                )
                * (len(weights[name]) / len(weight))
                for name, weight in rows.items()
            )
        return min(losses, key=losses.get)

    def _trial(
        self, weight: torch.Tensor, scheme: Scheme, importance: torch.Tensor
    ) -> torch.Tensor:
        return search(
            weight, scheme, self.scale_dtype, importance, SEARCH_FACTORS, each_end=False
        ).dequantize()

    def _pays(
        self,
        weights: dict[str, torch.Tensor],
        schemes: dict[str, Scheme],
        scaled: dict[str, Quantized],
        scales: torch.Tensor,
        hessian: torch.Tensor,
        where: str,
    ) -> bool:
        """Whether scaled layers are used: not if that leaves any of them above round to nearest."""
        nearest = self._nearest(weights, schemes)
        return all(
            float(layer_loss(scaled[name].dequantize() / scales - weight, hessian).sum())
            <= float(layer_loss(nearest[name].dequantize() - weight, hessian).sum())
            for name, weight in weights.items()
        )

    def _fold(self, view: LinearGroup, scales: torch.Tensor) -> torch.Tensor:
        """Return the scales, [feeder channels], that the feeder divides by once 1/s is folded into
        it and rounded.

        For a norm that is w / round(w / s), so rounding costs nothing: the weights are quantised
        against it. For a packed layer the scale of each group is rounded by itself, and s stays
        what it is."""
        packed = self.done.get(view.scale_into)
        channels = len(view.scale_module.weight if packed is None else packed.codes)
        scales = torch.nn.functional.pad(scales, (0, channels - len(scales)), value=1.0)
        if packed is not None:
            return scales
        weight = view.scale_module.weight + view.spec.offset
        stored = folded_norm(view, scales, self.dtype).float() + view.spec.offset
        return torch.where(stored != 0, weight / stored, torch.ones_like(scales))

    def _store_fold(self, view: LinearGroup, scales: torch.Tensor) -> None:
        """Divide the feeder's output channels by ``scales``: a norm's weight, or the row's scales,
        codes unchanged."""
        if view.scale_into not in self.done:
            self.plain[f"{view.scale_into}.weight"] = folded_norm(view, scales, self.dtype)
            return
        layer = self.done[view.scale_into]
        self.unfolded[view.scale_into] = layer.scale
        layer.scale = (layer.scale.float() / scales.unsqueeze(-1)).to(self.scale_dtype)
        if view.scale_module.bias is not None:
            self.plain[f"{view.scale_into}.bias"] = view.scale_module.bias / scales

"""Activation-aware weight quantisation: scale input channels, clip, refit. Lin et al., arXiv:2306.00978.

Weights that meet large inputs matter most. Multiplying their columns by s > 1, and dividing the input channel by s,
leaves the function as it is but makes their rounding error smaller by s; 1/s is folded into whatever feeds the input (a
norm, or the rows of the linear layer before it). Per group of layers with one input X:

    W^ = Q(W diag(s)) diag(s)^-1,    s = m^alpha,  m = sqrt(diag(G) / n),  G = X^T X

and alpha is the one with the smallest loss |X (W^ - W)^T|^2 = tr(D G D^T), D = W^ - W: to try one takes no forward.
Where the paper takes the mean of |X| for m, this takes the root mean square, which G holds. Then, as there, every group
of weights is clipped to the interval with the smallest loss of that group, e G_gg e^T. Beyond the paper, scales are
refitted by least squares under G for the codes as they are, weights are rounded again, and so on; each row keeps its
best state.

alpha = 0 with the plain grid is round to nearest and always among the candidates, so no layer's loss is above RTN's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from slim.blockwise import SegmentView
from slim.data.calibration import Calibration
from slim.lazy import LazyModule
from slim.quantization.grid import Quantised, encode, grouped, layer_loss, minmax, search, shrink_factors
from slim.quantization.method import Quantization
from slim.quantization.scheme import Scheme
from slim.quantization.visitor import QuantVisitor
from slim.settings import require_flag, require_number

if TYPE_CHECKING:
    import torch

    from slim.architecture import ModelDescription
    from slim.checkpoint import Checkpoint
else:
    torch = LazyModule("torch")

SEARCH_ROWS = 512  # rows of a layer that the search for alpha looks at; the loss is a sum over rows
REFITS = 3  # rounds of refitting scales and rounding again
SEARCH_FACTORS = (1.0, 0.85, 0.7)  # intervals tried while searching alpha; the final grid is searched finely


def channel_scales(gram: torch.Tensor, tokens: int, feeds: torch.Tensor, alpha: float) -> torch.Tensor:
    """Return s = m^alpha per channel of the feeder, float32 [feeder channels], with sqrt(max s min s) = 1.

    gram: [in, in]. feeds: [in], the feeder's channel of every input channel; inputs that share one share its scale.
    """
    channels = int(feeds.max()) + 1
    square = gram.diagonal() / tokens
    total = torch.zeros(channels, device=gram.device).index_add_(0, feeds, square)
    shared = torch.bincount(feeds, minlength=channels)
    magnitude = (total / shared).sqrt()
    magnitude = magnitude.clamp(min=float(magnitude.max()) * 1e-4 + 1e-12)  # channels that are never used stay finite
    scales = magnitude.pow(alpha)
    return scales / (scales.max() * scales.min()).sqrt()


def diagonal_blocks(gram: torch.Tensor, group: int) -> torch.Tensor:
    """Return the blocks G_gg on the diagonal, [groups, group, group]."""
    groups = gram.shape[0] // group
    return gram.view(groups, group, groups, group).diagonal(dim1=0, dim2=2).permute(2, 0, 1).contiguous()


def refit_scales(weight: torch.Tensor, layer: Quantised, gram: torch.Tensor) -> Quantised:
    """Return ``layer`` with the scales that are best for its codes under ``gram``, per row where that is a gain.

    With u_g the row of integers (c - zero) inside group g and 0 elsewhere, w^ = sum_g s_g u_g; least squares under G
    gives A s = b with A_gh = u_g G u_h^T, b_g = u_g G w^T. A fit that turns a sign round is not taken.
    """
    groups = layer.scale.shape[-1]
    steps = grouped(layer.codes, groups).float() - layer.zero.unsqueeze(-1).float()
    size = steps.shape[-1]
    normal = torch.stack(
        [
            torch.einsum(
                "rgi,rgi->rg", (steps[:, h] @ gram[h * size : (h + 1) * size]).unflatten(-1, (groups, size)), steps
            )
            for h in range(groups)
        ],
        dim=1,
    )
    target = torch.einsum("rgi,rgi->rg", grouped(weight @ gram, groups), steps)
    damping = normal.diagonal(dim1=1, dim2=2).mean(-1).clamp(min=1e-12)[:, None, None] * 1e-6
    normal = normal + damping * torch.eye(groups, device=weight.device)
    # Least squares around the present scales: a group that the inputs never reach keeps its own.
    present = layer.scale.float()
    residual = target - (normal @ present.unsqueeze(-1)).squeeze(-1)
    fitted = (present + torch.linalg.solve(normal, residual)).to(layer.scale.dtype)
    usable = torch.isfinite(fitted) & (fitted > 0.5 * present) & (fitted < 2 * present)
    fitted = torch.where(usable, fitted, layer.scale)
    return better_rows(weight, gram, [layer, Quantised(layer.codes, fitted, layer.zero, layer.scheme)])


def better_rows(weight: torch.Tensor, gram: torch.Tensor, candidates: list[Quantised]) -> Quantised:
    """Return, row by row, the candidate with the smallest loss (the first of equals)."""
    losses = torch.stack([layer_loss(item.dequantise() - weight, gram) for item in candidates])
    best = losses.argmin(0)
    codes, scale, zero = candidates[0].codes.clone(), candidates[0].scale.clone(), candidates[0].zero.clone()
    for index, item in enumerate(candidates[1:], 1):
        rows = best == index
        codes[rows], scale[rows], zero[rows] = item.codes[rows], item.scale[rows], item.zero[rows]
    return Quantised(codes, scale, zero, candidates[0].scheme)


@dataclass
class AWQ(Quantization):
    """Settings of AWQ, beside those of every method.

    calibration: the text that G is taken over. grid: how many values of alpha from 0 to 1 are tried; 1: no scaling.
    clip: how many intervals are tried per group; 1: none is clipped. refit: whether scales are refitted after rounding.
    """

    calibration: Calibration | None = None
    grid: int = 20
    clip: int = 15
    refit: bool = True

    version: ClassVar[int] = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        require_number("quant.grid", self.grid, 1, 200, integer=True)
        require_number("quant.clip", self.clip, 1, 100, integer=True)
        require_flag("quant.refit", self.refit)

    def tokens(self, source: Checkpoint) -> torch.Tensor:
        from slim.checkpoint import load_tokenizer

        return self.calibration.tokens(load_tokenizer(source.folder), source.description.context_length)

    def visitor(self, model: ModelDescription) -> ActivationAware:
        return ActivationAware(self.scheme, getattr(torch, model.dtype), self.grid, self.clip, self.refit)

    def peak_bytes(self, model: ModelDescription, device: str) -> int:
        from slim.blockwise import walk_bytes

        samples, length = self.calibration.samples, min(self.calibration.length, model.context_length)
        return super().peak_bytes(model, device) + walk_bytes(model, samples, length)


class ActivationAware(QuantVisitor):
    """AWQ on the walk."""

    def __init__(self, scheme: Scheme, dtype: torch.dtype, grid: int = 20, clip: int = 15, refit: bool = True):
        super().__init__(dtype)
        self.scheme, self.refit = scheme, refit
        self.alphas = [index / max(1, grid - 1) for index in range(grid)]
        self.factors = shrink_factors(clip)

    def quantise(self, view: SegmentView) -> dict[str, torch.Tensor]:
        weights = {name: linear.weight for name, linear in view.linears.items()}
        chosen, scales = {name: self._plain(weight, view.gram) for name, weight in weights.items()}, None
        alpha = self._search_alpha(view, weights)
        if alpha > 0:
            fold = self._fold(view, channel_scales(view.gram, view.tokens, view.feeds, alpha))
            scaled = self._scaled(weights, view.gram, fold[view.feeds])
            if self._is_better(weights, scaled, chosen, fold[view.feeds], view.gram):
                chosen, scales = scaled, fold[view.feeds]
                self._store_fold(view, fold)
        self.done.update(chosen)
        dense = {name: layer.dequantise() for name, layer in chosen.items()}
        return dense if scales is None else {name: weight / scales for name, weight in dense.items()}

    def _plain(self, weight: torch.Tensor, gram: torch.Tensor) -> Quantised:
        """Quantise without scaling: row by row the best of round to nearest, clipped, and refitted."""
        rounded = minmax(weight, self.scheme, self.dtype)
        return better_rows(weight, gram, [rounded, *self._clipped(weight, gram)])

    def _scaled(self, weights: dict, gram: torch.Tensor, scales: torch.Tensor) -> dict[str, Quantised]:
        """Quantise W diag(s) under the Gram matrix of X diag(s)^-1. scales: s, [in]."""
        gram = gram / torch.outer(scales, scales)
        return {
            name: better_rows(weight * scales, gram, self._clipped(weight * scales, gram))
            for name, weight in weights.items()
        }

    def _clipped(self, weight: torch.Tensor, gram: torch.Tensor) -> list[Quantised]:
        blocks = diagonal_blocks(gram, self.scheme.group(weight.shape[-1]))
        candidates = [search(weight, self.scheme, self.dtype, blocks, self.factors)]
        for _ in range(REFITS if self.refit else 0):
            last = candidates[-1]
            codes = encode(weight, last.scale, last.zero, self.scheme.levels)
            candidates.append(refit_scales(weight, Quantised(codes, last.scale, last.zero, self.scheme), gram))
        return candidates

    def _search_alpha(self, view: SegmentView, weights: dict[str, torch.Tensor]) -> float:
        """Return the alpha with the smallest summed loss over a sample of rows of the segment's layers."""
        rows = {name: weight[:: -(-len(weight) // SEARCH_ROWS)] for name, weight in weights.items()}
        losses = {}
        for alpha in self.alphas:
            scales = channel_scales(view.gram, view.tokens, view.feeds, alpha)[view.feeds]
            importance = view.gram.diagonal() / scales.square()
            losses[alpha] = sum(
                float(layer_loss(self._trial(weight * scales, importance) / scales - weight, view.gram).sum())
                * (len(weights[name]) / len(weight))
                for name, weight in rows.items()
            )
        return min(losses, key=losses.get)

    def _trial(self, weight: torch.Tensor, importance: torch.Tensor) -> torch.Tensor:
        return search(weight, self.scheme, self.dtype, importance, SEARCH_FACTORS, each_end=False).dequantise()

    def _is_better(
        self, weights: dict, scaled: dict[str, Quantised], plain: dict[str, Quantised], scales: torch.Tensor, gram
    ) -> bool:
        """Whether scaling lowers the summed loss, and leaves no single layer above round to nearest."""
        total = 0.0
        for name, weight in weights.items():
            rounded = minmax(weight, self.scheme, self.dtype).dequantise()
            loss = float(layer_loss(scaled[name].dequantise() / scales - weight, gram).sum())
            if loss > float(layer_loss(rounded - weight, gram).sum()):
                return False
            total += loss - float(layer_loss(plain[name].dequantise() - weight, gram).sum())
        return total < 0

    def _fold(self, view: SegmentView, scales: torch.Tensor) -> torch.Tensor:
        """Return the scales that the feeder really divides by once 1/s is folded into it and rounded.

        For a norm that is w / round(w / s), so rounding costs nothing: the weights are quantised against it. For a
        packed layer the scale of each group is rounded by itself, and s stays what it is.
        """
        if view.fed_by in self.done:
            return scales
        weight = view.feeder.weight
        stored = (weight / scales).to(self.dtype).float()
        return torch.where(stored != 0, weight / stored, torch.ones_like(scales))

    def _store_fold(self, view: SegmentView, scales: torch.Tensor) -> None:
        """Divide the feeder's output channels by ``scales``: a norm's weight, or the row's scales, codes unchanged."""
        if view.fed_by not in self.done:
            self.plain[f"{view.fed_by}.weight"] = (view.feeder.weight / scales).to(self.dtype)
            return
        layer = self.done[view.fed_by]
        folded = (layer.scale.float() / scales.unsqueeze(-1)).to(self.dtype)
        self.done[view.fed_by] = Quantised(layer.codes, folded, layer.zero, layer.scheme)
        if view.feeder.bias is not None:
            self.plain[f"{view.fed_by}.bias"] = view.feeder.bias / scales

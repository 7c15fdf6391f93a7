"""Width scores by activation: how large the values are that a unit gives to the layer after it.

    score(channel) = mean over calibration tokens of |x|

with x the input of o_proj for heads and of down_proj for MLP channels, summed over the channels of
a key/value group. A unit that is hardly active hardly matters, however large its weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from slim.calibration.loaded_blocks import BlockChain, batches
from slim.checkpoints.checkpoint import Checkpoint
from slim.checkpoints.stage import Context
from slim.core.console import progress_bar
from slim.core.lazy import LazyModule
from slim.pruning.width import CalibratedWidthPruning
from slim.pruning.width_scores import UnitScores, coupled_tensors, unit_scores

if TYPE_CHECKING:
    import torch

    from slim.models.spec import Family
else:
    torch = LazyModule("torch")


def mean_absolute_inputs(
    model,
    family: Family,
    tokens: torch.Tensor,
    blocks: Sequence[int],
    advance: Callable[[], object] = lambda: None,
) -> dict[int, dict[str, torch.Tensor]]:
    """Return the mean |x| of what units give to the layers that read them.

    Args:
        model: loaded.
        family: of the model.
        tokens: int64 [samples, length].
        blocks: that are scored.
        advance: called after every batch.

    Returns:
        Block -> name of the layer within it -> float64 [in].
    """
    chain = BlockChain(model, family)
    readers = [tensor.name for tensor in coupled_tensors(family) if not tensor.rows]
    sums: dict[int, dict[str, torch.Tensor]] = {}
    hooks = []
    for block in blocks:
        sums[block] = dict.fromkeys(readers, 0.0)
        for name in readers:
            layer = chain.blocks[block].get_submodule(name)
            hooks.append(layer.register_forward_pre_hook(_adding_to(sums[block], name)))
    try:
        with torch.no_grad():
            for batch in batches(tokens):
                hidden = chain.enter(batch)
                for block in range(max(blocks) + 1):
                    hidden = chain.step(block, hidden)
                advance()
    finally:
        for hook in hooks:
            hook.remove()
    means = {}
    for block, totals in sums.items():
        means[block] = {name: total / tokens.numel() for name, total in totals.items()}
    return means


def _adding_to(totals: dict[str, torch.Tensor], name: str) -> Callable:
    """Return a hook that adds |x|, summed over tokens, to ``totals[name]``."""

    def add(module, inputs):
        total = inputs[0].float().abs().flatten(0, -2).sum(0)
        totals[name] = totals[name] + total.double().cpu()

    return add


@dataclass(kw_only=True)
class WidthActivation(CalibratedWidthPruning):
    """``pruner=width_activation``. Settings: see :class:`CalibratedWidthPruning`."""

    cache_name: ClassVar[str] = "WidthActivation"

    criterion: ClassVar[str] = "activation"

    def scores(self, source: Checkpoint, blocks: range, context: Context) -> dict[int, UnitScores]:
        model, tokens = self.load(source, context)
        spec = source.spec
        title = "Activations of heads and channels"
        with progress_bar(title, total=len(batches(tokens))) as advance:
            inputs = mean_absolute_inputs(model, spec.family, tokens, blocks, advance)
        scores = {}
        for block, channels in inputs.items():
            scores[block] = unit_scores(channels, spec, block, self.folding)
        return scores

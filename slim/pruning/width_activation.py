"""Width scores by activation: how large the values are that a unit gives to the layer behind it.

    score(channel) = mean over calibration tokens of |x|,   x: the input of o_proj (heads), of down_proj (MLP channels)

summed over the channels of a key/value group. A unit that is hardly active hardly matters, however
large its weights."""

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
    """Return block -> layer that reads units -> mean |x| of its inputs, float64 [in].

    tokens: int64 [samples, length].
    """
    chain = BlockChain(model, family)
    readers = [tensor.name for tensor in coupled_tensors(family) if not tensor.rows]
    sums: dict[int, dict[str, torch.Tensor]] = {
        block: dict.fromkeys(readers, 0.0) for block in blocks
    }
    hooks = []
    for block in blocks:
        for name in readers:

            def add(module, inputs, block=block, name=name):
                sums[block][name] = (
                    sums[block][name] + inputs[0].float().abs().flatten(0, -2).sum(0).double().cpu()
                )

            hooks.append(chain.blocks[block].get_submodule(name).register_forward_pre_hook(add))
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
    return {
        block: {name: total / tokens.numel() for name, total in found.items()}
        for block, found in sums.items()
    }


@dataclass(kw_only=True)
class WidthActivation(CalibratedWidthPruning):
    """``pruner=width_activation``. Settings: see :class:`CalibratedWidthPruning`."""

    cache_name: ClassVar[str] = "WidthActivation"

    criterion: ClassVar[str] = "activation"

    def scores(self, source: Checkpoint, blocks: range, context: Context) -> dict[int, UnitScores]:
        model, tokens = self.load(source, context)
        spec = source.spec
        with progress_bar(
            "Activations of heads and channels", total=len(batches(tokens))
        ) as advance:
            found = mean_absolute_inputs(model, spec.family, tokens, blocks, advance)
        return {
            block: unit_scores(sizes, spec, block, self.folding) for block, sizes in found.items()
        }

"""Block scores by influence: how much a block turns the hidden state on its way through.

    BI_l = 1 - E[ x_l . x_{l+1} / (|x_l| |x_{l+1}|) ]

with x_l the input of block l (the residual stream, before any norm) and the mean over all tokens of
all samples. Men et al., "ShortGPT" (arXiv:2403.03853), equation 1. The blocks with the least
influence are removed, wherever they stand; ``pruner=angular`` measures the angle over a run of
blocks, at the last token alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from slim.calibration.loaded_blocks import BlockChain, batches
from slim.checkpoints.checkpoint import Checkpoint
from slim.checkpoints.stage import Context
from slim.core.console import progress_bar
from slim.core.lazy import LazyModule
from slim.models.spec import ModelSpec
from slim.pruning.depth import CalibratedDepthPruning

if TYPE_CHECKING:
    import torch

    from slim.models.spec import Family
else:
    torch = LazyModule("torch")


def block_influences(
    model, family: Family, tokens: torch.Tensor, advance: Callable[[], object] = lambda: None
) -> list[float]:
    """Return the influence of every block, from 0 (the state keeps its direction) to 2.

    Args:
        model: loaded.
        family: of the model.
        tokens: int64 [samples, length].
        advance: called after every batch.
    """
    chain = BlockChain(model, family)
    # float64: the sum over all tokens of numbers close to 1
    total = torch.zeros(len(chain), dtype=torch.float64)
    with torch.no_grad():
        for batch in batches(tokens):
            hidden = chain.enter(batch)
            for block in range(len(chain)):
                output = chain.step(block, hidden)
                similar = torch.cosine_similarity(hidden.float(), output.float(), dim=-1)
                total[block] += similar.double().sum().cpu()
                hidden = output
            advance()
    return (1 - total / tokens.numel()).tolist()


@dataclass(kw_only=True)
class BlockInfluence(CalibratedDepthPruning):
    """``pruner=block_influence``. Settings: see :class:`CalibratedDepthPruning`."""

    cache_name: ClassVar[str] = "BlockInfluence"

    criterion: ClassVar[str] = "block_influence"
    score_label: ClassVar[str] = "1 - cosine of input and output"

    def scores(self, source: Checkpoint, context: Context) -> list[float]:
        model, tokens = self.load(source, context)
        with progress_bar("Influence of blocks", total=len(batches(tokens))) as advance:
            return block_influences(model, source.spec.family, tokens, advance)

    def scoring_bytes(self, spec: ModelSpec, device: str) -> int:
        return self.batch_bytes(spec, device)

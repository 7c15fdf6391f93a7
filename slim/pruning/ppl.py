"""Block scores by perplexity: the perplexity of the calibration samples with only that block removed.

    score(block) = exp(mean of -log p(token | tokens before it, model without the block))

Kim et al., "Shortened LLaMA" (arXiv:2402.02834), section 2.1 ("PPL").

Removing block l changes nothing before it, so its input is computed once and only the blocks behind l run again:
L + (L-1) + ... + 0 = L(L+1)/2 block calls per sample with the full model's own pass, which is (L+1)/2 forwards.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from slim.architecture import ModelDescription
from slim.checkpoint import Checkpoint
from slim.lazy import LazyModule
from slim.progress import progress_bar
from slim.pruning.depth import CalibratedDepthPruning, Choice
from slim.pruning.forward import BlockChain, batches
from slim.stage import Context

if TYPE_CHECKING:
    import torch

    from slim.architecture import Family
else:
    torch = LazyModule("torch")


def perplexities_without(
    model, family: Family, tokens: torch.Tensor, advance: Callable[[], object] = lambda: None
) -> tuple[list[float], float]:
    """Return the perplexity without block 0, 1, ..., L-1, and that of the whole model.

    tokens: int64 [samples, length]; every token but the first of a sample is predicted. ``advance`` is called
    ``L + 1`` times per batch.
    """
    chain = BlockChain(model, family)
    total = torch.zeros(len(chain) + 1, dtype=torch.float64)
    with torch.no_grad():
        for batch in batches(tokens):
            hidden = chain.enter(batch)
            for block in range(len(chain)):
                total[block] += loss_from(chain, hidden, block + 1, batch)
                hidden = chain.step(block, hidden)
                advance()
            total[-1] += loss_from(chain, hidden, len(chain), batch)
            advance()
    *without, whole = torch.exp(total / (tokens.shape[0] * (tokens.shape[1] - 1))).tolist()
    return without, whole


def loss_from(chain: BlockChain, hidden: torch.Tensor, first: int, tokens: torch.Tensor) -> float:
    """Return the summed loss (nats) of ``tokens`` when ``hidden`` goes through the blocks from ``first`` on."""
    for index in range(first, len(chain)):
        hidden = chain.step(index, hidden)
    return sum(loss.item() for loss in chain.losses(hidden, tokens))


@dataclass(kw_only=True)
class Perplexity(CalibratedDepthPruning):
    """``pruner=ppl``. Settings: see :class:`CalibratedDepthPruning`; 10 samples of 128 tokens as in Shortened LLaMA."""

    samples: int | None = 10
    length: int | None = 128

    criterion: ClassVar[str] = "ppl"
    score_label: ClassVar[str] = "perplexity without the block"

    def choose(self, source: Checkpoint, context: Context) -> Choice:
        model, tokens = self.load(source, context)
        steps = len(batches(tokens)) * (source.description.blocks + 1)
        with progress_bar("Perplexity without each block", total=steps) as advance:
            scores, whole = perplexities_without(model, source.description.family, tokens, advance)
        choice = self.choose_by(scores, source.description.blocks)
        choice.details["unpruned"] = whole
        return choice

    def scoring_bytes(self, model: ModelDescription, device: str) -> int:
        return self.batch_bytes(model, device)

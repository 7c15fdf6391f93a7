"""Block scores by perplexity: the perplexity of the calibration samples with only that block
removed.

    score(block) = exp(mean of -log p(token | tokens before it, model without the block))

Kim et al., "Shortened LLaMA" (arXiv:2402.02834), section 2.1 ("PPL").

Removing block l changes nothing before it, so its input is computed once and only the blocks after
l run again: L + (L-1) + ... + 0 = L(L+1)/2 block calls per sample with the full model's own pass,
which is (L+1)/2 forward passes.

Greedy removal (``iterative``) scores again after each removed block, on what is left of the model.
The inputs of all blocks stay where they are valid, before the removed block, and only those after
it are computed anew."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from slim.calibration.loaded_blocks import BlockChain, batches
from slim.checkpoints.checkpoint import Checkpoint
from slim.checkpoints.stage import Context
from slim.core.console import progress_bar
from slim.core.lazy import LazyModule
from slim.core.settings import require_flag
from slim.models.spec import ModelSpec
from slim.pruning.depth import CalibratedDepthPruning, Choice
from slim.pruning.rules import require_numbers

if TYPE_CHECKING:
    import torch

    from slim.models.spec import Family
else:
    torch = LazyModule("torch")


def perplexities_without(
    model, family: Family, tokens: torch.Tensor, advance: Callable[[], object] = lambda: None
) -> tuple[list[float], float]:
    """Return the perplexity without block 0, 1, ..., L-1, and that of the whole model.

    Args:
        model: loaded.
        family: of the model.
        tokens: int64 [samples, length]; every token but the first of a sample is predicted.
        advance: called ``L + 1`` times per batch.
    """
    chain = BlockChain(model, family)
    total = torch.zeros(len(chain) + 1, dtype=torch.float64)
    with torch.no_grad():
        for batch in batches(tokens):
            hidden = chain.enter(batch)
            for block in range(len(chain)):
                total[block] += loss_through(chain, hidden, range(block + 1, len(chain)), batch)
                hidden = chain.step(block, hidden)
                advance()
            total[-1] += loss_through(chain, hidden, (), batch)
            advance()
    predicted = tokens.shape[0] * (tokens.shape[1] - 1)
    perplexities = torch.exp(total / predicted).tolist()
    return perplexities[:-1], perplexities[-1]


def loss_through(
    chain: BlockChain, hidden: torch.Tensor, blocks: Iterable[int], tokens: torch.Tensor
) -> float:
    """Return the summed loss of tokens, in nats.

    Args:
        chain: the model's blocks.
        hidden: the input of the first of ``blocks``, [samples, length, hidden].
        blocks: that it goes through, in order.
        tokens: int64 [samples, length].
    """
    for index in blocks:
        hidden = chain.step(index, hidden)
    return sum(loss.item() for loss in chain.losses(hidden, tokens))


class Greedy:
    """Removal of one block after the other, each time the one without which the perplexity is
    smallest.

    Attributes:
        kept: the blocks that are left, ascending.
        inputs: per batch the inputs of all of them, on the CPU.
    """

    def __init__(self, model, family: Family, tokens: torch.Tensor):
        """Compute the inputs of all blocks.

        Args:
            model: loaded.
            family: of the model.
            tokens: int64 [samples, length].
        """
        self.chain = BlockChain(model, family)
        self.batches = batches(tokens)
        self.predicted = tokens.shape[0] * (tokens.shape[1] - 1)
        self.kept = list(range(len(self.chain)))
        self.inputs: list[list[torch.Tensor]] = []
        with torch.no_grad():
            for batch in self.batches:
                self.inputs.append(self._inputs_from(self.chain.enter(batch), self.kept))

    def _inputs_from(self, hidden: torch.Tensor, blocks: list[int]) -> list[torch.Tensor]:
        """Return the inputs of ``blocks`` when ``hidden`` enters the first of them."""
        inputs = []
        for position, block in enumerate(blocks):
            inputs.append(hidden.cpu())
            if position + 1 < len(blocks):  # nobody reads the last one's output
                hidden = self.chain.step(block, hidden)
        return inputs

    def scores(
        self, candidates: Collection[int], advance: Callable[[], object] = lambda: None
    ) -> dict[int, float]:
        """Return candidate -> perplexity of what is left without it.

        Args:
            candidates: blocks that may go.
            advance: called once per batch.
        """
        total = {block: 0.0 for block in self.kept if block in candidates}
        with torch.no_grad():
            for batch, inputs in zip(self.batches, self.inputs, strict=True):
                self.chain.enter(batch)  # how blocks are called depends on the batch
                for position, block in enumerate(self.kept):
                    if block in total:
                        hidden = inputs[position].to(self.chain.model.device)
                        total[block] += loss_through(
                            self.chain, hidden, self.kept[position + 1 :], batch
                        )
                advance()
        return {block: math.exp(loss / self.predicted) for block, loss in total.items()}

    def remove(self, block: int) -> None:
        """Take a block out; inputs before it stay, those after it are computed anew."""
        position = self.kept.index(block)
        del self.kept[position]
        with torch.no_grad():
            for batch, inputs in zip(self.batches, self.inputs, strict=True):
                self.chain.enter(batch)
                hidden = inputs[position].to(self.chain.model.device)
                inputs[position:] = self._inputs_from(hidden, self.kept[position:])


@dataclass(kw_only=True)
class Perplexity(CalibratedDepthPruning):
    """``pruner=ppl``. Other settings: see :class:`CalibratedDepthPruning`.

    Attributes:
        iterative: score again after each removed block, instead of once for all.
        samples: windows for the scores; 10 as in Shortened LLaMA.
        length: tokens per window for the scores; 128 as in Shortened LLaMA.
    """

    cache_name: ClassVar[str] = "Perplexity"

    iterative: bool = False
    samples: int | None = 10
    length: int | None = 128

    criterion: ClassVar[str] = "ppl"
    score_label: ClassVar[str] = "perplexity without the block"
    needs_loss: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        require_flag("pruner.iterative", self.iterative)

    def choose(self, source: Checkpoint, context: Context) -> Choice:
        model, tokens = self.load(source, context)
        spec = source.spec
        if self.iterative:
            return self.choose_greedily(Greedy(model, spec.family, tokens), spec.blocks)
        steps = len(batches(tokens)) * (spec.blocks + 1)
        with progress_bar("Perplexity without each block", total=steps) as advance:
            scores, whole = perplexities_without(model, spec.family, tokens, advance)
        choice = self.choose_by(scores, spec.blocks)
        choice.details["unpruned"] = whole
        return choice

    def choose_greedily(self, greedy: Greedy, depth: int) -> Choice:
        """Remove the wanted number of blocks one by one; the scores of all blocks are those of the
        first step.

        Args:
            greedy: with all blocks.
            depth: their number.
        """
        protected = self.protected(depth)
        steps = []
        total = self.wanted(depth) * len(greedy.batches)
        with progress_bar("Greedy removal", total=total) as advance:
            for step in range(self.wanted(depth)):
                removable = [block for block in greedy.kept if block not in protected]
                # the first step scores the protected blocks as well, for the picture
                scores = greedy.scores(greedy.kept if step == 0 else removable, advance)
                require_numbers(list(scores.values()))
                block = min(removable, key=scores.__getitem__)
                greedy.remove(block)
                steps.append(
                    {"removed": block, "perplexity": scores[block], "scores": list(scores.items())}
                )
        first_scores = [score for _, score in steps[0]["scores"]]
        order = [step["removed"] for step in steps]
        return Choice(sorted(order), first_scores, {"order": order, "steps": steps})

    def scoring_bytes(self, spec: ModelSpec, device: str) -> int:
        kept = 0
        if self.iterative:
            length = min(self.windows.length, spec.context_length)
            kept = 4 * spec.blocks * self.windows.samples * length * spec.hidden_size
        return self.batch_bytes(spec, device) + kept

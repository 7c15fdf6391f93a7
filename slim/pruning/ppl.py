"""Block scores by perplexity: the perplexity of the calibration samples with only that block
removed.

    score(block) = exp(mean of -log p(token | tokens before it, model without the block))

Kim et al., "Shortened LLaMA" (arXiv:2402.02834), section 2.1 ("PPL").

Removing block l changes nothing before it, so its input is computed once and only the blocks behind
l run again: L + (L-1) + ... + 0 = L(L+1)/2 block calls per sample with the full model's own pass,
which is (L+1)/2 forwards.

Greedy removal (``iterative``) scores again after each removed block, on what is left of the model.
The inputs of all blocks stay where they are valid, in front of the removed block, and only those
behind it are computed anew."""

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

    tokens: int64 [samples, length]; every token but the first of a sample is predicted. ``advance``
    is called ``L + 1`` times per batch."""
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
    *without, whole = torch.exp(total / (tokens.shape[0] * (tokens.shape[1] - 1))).tolist()
    return without, whole


def loss_through(
    chain: BlockChain, hidden: torch.Tensor, blocks: Iterable[int], tokens: torch.Tensor
) -> float:
    """Return the summed loss (nats) of ``tokens`` when ``hidden`` goes through ``blocks``."""
    for index in blocks:
        hidden = chain.step(index, hidden)
    return sum(loss.item() for loss in chain.losses(hidden, tokens))


class Greedy:
    """Removal of one block after the other, each time the one without which the perplexity is
    smallest.

    model: loaded. tokens: int64 [samples, length].
    kept: the blocks that are left. inputs: per batch the inputs of all of them, on the CPU.
    """

    def __init__(self, model, family: Family, tokens: torch.Tensor):
        self.chain, self.batches = BlockChain(model, family), batches(tokens)
        self.predicted = tokens.shape[0] * (tokens.shape[1] - 1)
        self.kept = list(range(len(self.chain)))
        self.inputs: list[list[torch.Tensor]] = []
        with torch.no_grad():
            for batch in self.batches:
                self.inputs.append(self._inputs_from(self.chain.enter(batch), self.kept))

    def _inputs_from(self, hidden: torch.Tensor, blocks: list[int]) -> list[torch.Tensor]:
        """Return the inputs of ``blocks`` when ``hidden`` enters the first of them."""
        found = []
        for position, block in enumerate(blocks):
            found.append(hidden.cpu())
            if position + 1 < len(blocks):
                hidden = self.chain.step(block, hidden)
        return found

    def scores(
        self, candidates: Collection[int], advance: Callable[[], object] = lambda: None
    ) -> dict[int, float]:
        """Return candidate -> perplexity of what is left without it. ``advance`` is called once per
        batch."""
        total = dict.fromkeys((block for block in self.kept if block in candidates), 0.0)
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
        """Take a block out; inputs in front of it stay, those behind it are computed anew."""
        position = self.kept.index(block)
        del self.kept[position]
        with torch.no_grad():
            for batch, inputs in zip(self.batches, self.inputs, strict=True):
                self.chain.enter(batch)
                hidden = inputs[position].to(self.chain.model.device)
                inputs[position:] = self._inputs_from(hidden, self.kept[position:])


@dataclass(kw_only=True)
class Perplexity(CalibratedDepthPruning):
    """``pruner=ppl``. iterative: score again after each removed block, in place of once for all.

    Other settings: see :class:`CalibratedDepthPruning`; 10 samples of 128 tokens as in Shortened
    LLaMA."""

    cache_name: ClassVar[str] = "Perplexity"

    iterative: bool = False
    samples: int | None = 10
    length: int | None = 128

    criterion: ClassVar[str] = "ppl"
    score_label: ClassVar[str] = "perplexity without the block"

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
        first step."""
        protected, steps = self.protected(depth), []
        with progress_bar(
            "Greedy removal", total=self.wanted(depth) * len(greedy.batches)
        ) as advance:
            for step in range(self.wanted(depth)):
                candidates = [block for block in greedy.kept if step == 0 or block not in protected]
                scores = greedy.scores(candidates, advance)
                require_numbers(list(scores.values()))
                block = min(
                    (block for block in scores if block not in protected), key=scores.__getitem__
                )
                greedy.remove(block)
                steps.append(
                    {"removed": block, "perplexity": scores[block], "scores": list(scores.items())}
                )
        first = [score for _, score in steps[0]["scores"]]
        order = [step["removed"] for step in steps]
        return Choice(sorted(order), first, {"order": order, "steps": steps})

    def scoring_bytes(self, spec: ModelSpec, device: str) -> int:
        kept = 0
        if self.iterative:
            length = min(self.windows.length, spec.context_length)
            kept = 4 * spec.blocks * self.windows.samples * length * spec.hidden_size
        return self.batch_bytes(spec, device) + kept

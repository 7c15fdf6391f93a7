"""A loaded model taken apart: hidden states go in and out of single decoder blocks.

Sequential calibration reads blocks from disk one at a time. Scoring by gradients or by leaving
blocks out needs the whole model in memory instead; :class:`BlockChain` runs its blocks one by one.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from slim.calibration.capture import BlockCall, block_calls, run_block
from slim.core.lazy import LazyModule
from slim.models.logits import head_logits

if TYPE_CHECKING:
    import torch

    from slim.models.spec import Family
else:
    torch = LazyModule("torch")

TOKENS_PER_BATCH = 4096
LOGITS_AT_ONCE = 2**23  # numbers: bounds the memory of a large vocabulary


class BlockChain:
    """The blocks of a transformers model as functions from hidden states to hidden states.

    Call :meth:`enter` with a batch, then :meth:`step` block by block, then :meth:`losses`.
    """

    def __init__(self, model, family: Family):
        """Take a model apart.

        Args:
            model: a transformers model with its weights.
            family: names its blocks and its final norm.
        """
        self.model = model
        self.family = family
        self.blocks = model.get_submodule(family.blocks)
        self.norm = model.get_submodule(family.final_norm)
        self._calls: list[BlockCall] = []

    def __len__(self) -> int:
        return len(self.blocks)

    def enter(self, tokens: torch.Tensor) -> torch.Tensor:
        """Begin a batch of int64 tokens [batch, length].

        Returns:
            The input of block 0, [batch, length, hidden].
        """
        hidden, self._calls = block_calls(
            self.model.base_model, self.blocks, tokens.to(self.model.device)
        )
        return hidden

    def step(self, index: int, hidden: torch.Tensor) -> torch.Tensor:
        """Run one block on hidden states of the batch that entered last.

        Args:
            index: the block's number.
            hidden: its input, [batch, length, hidden].

        Returns:
            Its output, [batch, length, hidden].
        """
        return run_block(self.blocks[index], hidden, self._calls[index])

    def losses(self, hidden: torch.Tensor, tokens: torch.Tensor) -> Iterator[torch.Tensor]:
        """Yield summed losses (-log p in nats, float32), each over some of the tokens.

        Few logits exist at once that way. Every token but the first of a sample counts.

        Args:
            hidden: the last block's output, [batch, length, hidden].
            tokens: the batch, int64 [batch, length].
        """
        rows = max(1, LOGITS_AT_ONCE // self.model.config.vocab_size)
        inputs = hidden[:, :-1].flatten(0, 1)
        targets = tokens[:, 1:].flatten().to(hidden.device)
        for states, target in zip(inputs.split(rows), targets.split(rows), strict=True):
            logits = head_logits(self.model, self.norm(states)).float()
            yield torch.nn.functional.cross_entropy(logits, target, reduction="sum")


def batches(tokens: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Split samples [samples, length] into batches of about ``TOKENS_PER_BATCH`` tokens."""
    return tokens.split(batch_samples(tokens.shape[1]))


def batch_samples(length: int) -> int:
    """Return how many samples of ``length`` tokens make one batch."""
    return max(1, TOKENS_PER_BATCH // length)

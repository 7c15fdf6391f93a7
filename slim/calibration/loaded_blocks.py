"""A loaded model taken apart: hidden states go in and out of single decoder blocks.

Only the model itself knows how its blocks are called (mask, positions, rotary angles; sliding
windows in some of them). So its own forward is run once per batch with the blocks switched off, and
what each block was called with is kept."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

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
        self.model, self.family = model, family
        self.blocks = model.get_submodule(family.blocks)
        self.norm = model.get_submodule(family.final_norm)
        self._calls: list[tuple[tuple, dict]] = []

    def __len__(self) -> int:
        return len(self.blocks)

    def enter(self, tokens: torch.Tensor) -> torch.Tensor:
        """Take int64 tokens [batch, length] and return the input of block 0, [batch, length,
        hidden]."""
        self._calls, inputs = [], []

        def record(hidden, *args, **kwargs):
            inputs.append(hidden)
            self._calls.append((args, kwargs))
            return hidden

        try:
            for block in self.blocks:
                block.forward = record
            with torch.no_grad():
                self.model.base_model(tokens.to(self.model.device), use_cache=False)
        finally:
            for block in self.blocks:
                block.__dict__.pop("forward", None)
        return inputs[0]

    def step(self, index: int, hidden: torch.Tensor) -> torch.Tensor:
        """Run block ``index`` on hidden states [batch, length, hidden] of the batch that entered
        last."""
        args, kwargs = self._calls[index]
        output = self.blocks[index](hidden, *args, **kwargs)
        return output[0] if isinstance(output, tuple) else output

    def losses(self, hidden: torch.Tensor, tokens: torch.Tensor) -> Iterator[torch.Tensor]:
        """Yield summed losses (-log p in nats, float32) of ``tokens`` [batch, length], given the
        last block's output.

        One sum per some tokens, so that few logits exist at once; every token but the first of a
        sample counts."""
        rows = max(1, LOGITS_AT_ONCE // self.model.config.vocab_size)
        inputs, targets = hidden[:, :-1].flatten(0, 1), tokens[:, 1:].flatten().to(hidden.device)
        for states, target in zip(inputs.split(rows), targets.split(rows), strict=True):
            logits = head_logits(self.model, self.norm(states)).float()
            yield torch.nn.functional.cross_entropy(logits, target, reduction="sum")


def batches(tokens: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Split samples [samples, length] into batches of about ``TOKENS_PER_BATCH`` tokens."""
    return tokens.split(batch_samples(tokens.shape[1]))


def batch_samples(length: int) -> int:
    """Return how many samples of ``length`` tokens make one batch."""
    return max(1, TOKENS_PER_BATCH // length)

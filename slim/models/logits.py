"""From the last hidden states to logits as the model's own forward makes them, for code that runs
the head on a part."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def head_logits(model, hidden: torch.Tensor) -> torch.Tensor:
    """Return the logits of normalised last hidden states.

    Args:
        model: A causal language model of transformers, of a family in ``slim.models.families``: its
            head is one matrix, followed by at most Gemma's soft cap, c tanh(x / c).
        hidden: [..., hidden], after the final norm.

    Returns:
        [..., vocabulary], in the type of ``hidden``.
    """
    logits = model.get_output_embeddings()(hidden)
    return soft_cap(logits, getattr(model.config, "final_logit_softcapping", None))


def soft_cap(logits: torch.Tensor, cap: float | None) -> torch.Tensor:
    """Return c tanh(x / c) for logits x of any shape; x itself where there is no cap c."""
    if cap is None:
        return logits
    return (logits / cap).tanh() * cap

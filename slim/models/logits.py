"""From the last hidden states to logits as the model's own forward makes them, for code that runs
the head on a part."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def head_logits(model, hidden: torch.Tensor) -> torch.Tensor:
    """Return the logits [..., vocabulary], in the type of ``hidden``, for normalised last hidden
    states [..., hidden].

    model: a causal language model of transformers, of a family in ``slim.models.families``: its
    head is one matrix, behind it at most Gemma's soft cap, c tanh(x / c)."""
    logits = model.get_output_embeddings()(hidden)
    cap = getattr(model.config, "final_logit_softcapping", None)
    return logits if cap is None else (logits / cap).tanh() * cap

"""A causal language model on packed windows: its hidden states, and the negative log-likelihood of
the tokens that count."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slim.data.packing import IGNORE
from slim.models.logits import head_logits


def sequence_nll(
    model: nn.Module, tokens: Tensor, labels: Tensor, positions: Tensor | None = None
) -> Tensor:
    """Return the summed negative log-likelihood, in nats, of the tokens whose label is not
    ``IGNORE``.

    tokens, labels, positions: int64 [rows, length]. With positions that start again at 0 inside a
    row, each such piece is a sequence of its own: no mask and no cache may be given then, or
    transformers lets them see each other. The head runs on the outputs that predict a label only,
    which saves most of it where answers are short."""
    hidden, target = counted(last_hidden(model, tokens, positions), labels)
    logits = head_logits(plain_model(model), hidden)
    return F.cross_entropy(logits.float(), target, reduction="sum")


def counted(hidden: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Pick what counts: the hidden states [tokens, hidden] that predict a token with a label, and
    these [tokens]."""
    target = labels[:, 1:]
    counts = target != IGNORE
    return hidden[:, :-1][counts], target[counts]


def plain_model(model: nn.Module) -> nn.Module:
    """Return the transformers model inside PEFT's wrapper, or ``model`` itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def body_outputs(model: nn.Module, tokens: Tensor, positions: Tensor | None = None, **wanted: bool):
    """Return what the model gives below its head; arguments as in :func:`sequence_nll`.

    wanted: ``output_hidden_states``, ``output_attentions``.
    """
    body = plain_model(model).base_model
    return body(
        input_ids=tokens, position_ids=positions, attention_mask=None, use_cache=False, **wanted
    )


def last_hidden(model: nn.Module, tokens: Tensor, positions: Tensor | None = None) -> Tensor:
    """Return the outputs of the final norm, [rows, length, hidden]; arguments as in
    :func:`sequence_nll`."""
    return body_outputs(model, tokens, positions)[0]


@torch.no_grad()
def mean_nll(
    model: nn.Module, batches: Iterable[dict], device: str | torch.device = "cpu"
) -> float:
    """Return the mean negative log-likelihood per counted token over ``batches``, in nats; the
    model's mode is kept."""
    training = model.training
    model.eval()
    nll = lambda batch: sequence_nll(
        model, batch["tokens"], batch["labels"], batch.get("positions")
    )  # noqa: E731
    total, count = summed_nll(nll, batches, device)
    model.train(training)
    return total / count


def summed_nll(
    nll: Callable[[dict], Tensor], batches: Iterable[dict], device: str | torch.device
) -> tuple[float, int]:
    """Return the sum of ``nll(batch)`` over ``batches``, and how many tokens counted."""
    total, count = 0.0, 0
    for batch in batches:
        moved = {key: value.to(device) for key, value in batch.items() if isinstance(value, Tensor)}
        total += nll(moved).double().item()
        count += int((batch["labels"][:, 1:] != IGNORE).sum())
    return total, count

"""A causal language model on packed windows: its hidden states, and the negative log-likelihood of
the tokens that count."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slim.data.packing import IGNORE
from slim.loading.sentence import pooled
from slim.models.logits import head_logits


def sequence_nll(
    model: nn.Module, tokens: Tensor, labels: Tensor, positions: Tensor | None = None
) -> Tensor:
    """Return the summed negative log-likelihood, in nats, of the tokens with a label.

    The head runs on the outputs that predict a label only, which saves most of it where answers are
    short.

    Args:
        model: A causal language model, plain or wrapped by PEFT.
        tokens: int64 [rows, length].
        labels: int64 [rows, length], the tokens again, or ``IGNORE``.
        positions: int64 [rows, length] or None. Where they start again at 0 inside a row, each such
            piece is a sequence of its own.
    """
    hidden, target = counted(last_hidden(model, tokens, positions), labels)
    logits = head_logits(plain_model(model), hidden)
    return F.cross_entropy(logits.float(), target, reduction="sum")


def batch_nll(model: nn.Module, batch: dict) -> Tensor:
    """Return the summed negative log-likelihood, in nats, of what counts in a batch: tokens with a
    label, or classes of texts.

    Args:
        model: A causal language model, or a classifier; plain or wrapped by PEFT.
        batch: ``tokens``, ``labels`` and perhaps ``positions``; or for a classifier what
            :meth:`slim.data.labelled.LabelledWindows.batch` gives.
    """
    if "scores" in batch:
        return pair_loss(model, batch)
    if "mask" not in batch:
        return sequence_nll(model, batch["tokens"], batch["labels"], batch.get("positions"))
    logits = class_outputs(model, batch).logits.float()
    nll = F.cross_entropy(logits, batch["labels"][:, 1], reduction="none")
    if "weights" in batch:
        nll = nll * batch["weights"]
    return nll.sum()


def pair_loss(model: nn.Module, batch: dict) -> Tensor:
    """Return the summed loss of pairs with scores s.

    Of a bi-encoder (cos(u, v) - s)^2, of a cross-encoder with the output z the cross entropy
    -s log sigmoid(z) - (1 - s) log(1 - sigmoid(z)).

    Args:
        model: An encoder without a head, or with one of one output.
        batch: What :meth:`slim.data.scored.PairWindows.batch` gives.
    """
    scores = batch["scores"].float()
    if "second" not in batch:
        logits = class_outputs(model, batch).logits[:, 0].float()
        return F.binary_cross_entropy_with_logits(logits, scores, reduction="sum")
    first = bool(batch["pools_first"].any())
    vectors = []
    for tokens, mask in (("tokens", "mask"), ("second", "second_mask")):
        hidden = model(input_ids=batch[tokens], attention_mask=batch[mask]).last_hidden_state
        vectors.append(pooled(hidden, batch[mask], first))
    return ((vectors[0] * vectors[1]).sum(-1) - scores).square().sum()


def class_outputs(model: nn.Module, batch: dict, **wanted: bool):
    """Return what an encoder with its head gives for a batch of texts.

    Args:
        model: A classifier, plain or wrapped by PEFT.
        batch: ``tokens`` and ``mask``, [rows, length], and perhaps ``types``.
        **wanted: ``output_hidden_states``, ``output_attentions``.
    """
    if "types" in batch:
        wanted["token_type_ids"] = batch["types"]
    return plain_model(model)(input_ids=batch["tokens"], attention_mask=batch["mask"], **wanted)


def counted(hidden: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Pick what counts.

    Args:
        hidden: [rows, length, hidden size], the outputs of the final norm.
        labels: int64 [rows, length].

    Returns:
        The hidden states [tokens, hidden size] that predict a token with a label, and these tokens,
        int64 [tokens].
    """
    target = labels[:, 1:]
    counts = target != IGNORE
    return hidden[:, :-1][counts], target[counts]


def plain_model(model: nn.Module) -> nn.Module:
    """Return the transformers model inside PEFT's wrapper, or the model itself.

    Args:
        model: Plain or wrapped.
    """
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def body_outputs(model: nn.Module, tokens: Tensor, positions: Tensor | None = None, **wanted: bool):
    """Return what the model gives below its head.

    Args:
        model: As in :func:`sequence_nll`.
        tokens: int64 [rows, length].
        positions: int64 [rows, length] or None.
        **wanted: ``output_hidden_states``, ``output_attentions``.
    """
    body = plain_model(model).base_model
    # No mask and no cache: with either, transformers lets packed sequences see each other.
    return body(
        input_ids=tokens, position_ids=positions, attention_mask=None, use_cache=False, **wanted
    )


def last_hidden(model: nn.Module, tokens: Tensor, positions: Tensor | None = None) -> Tensor:
    """Return the outputs of the final norm, [rows, length, hidden size].

    Args:
        model: As in :func:`sequence_nll`.
        tokens: int64 [rows, length].
        positions: int64 [rows, length] or None.
    """
    return body_outputs(model, tokens, positions)[0]


@torch.no_grad()
def mean_nll(
    model: nn.Module, batches: Iterable[dict], device: str | torch.device = "cpu"
) -> float:
    """Return the mean negative log-likelihood per counted token, in nats.

    Args:
        model: Its mode is kept.
        batches: Each with ``tokens``, ``labels`` and perhaps ``positions``.
        device: Where the model is.
    """

    def nll(batch: dict) -> Tensor:
        return batch_nll(model, batch)

    training = model.training
    model.eval()
    total, count = summed_nll(nll, batches, device)
    model.train(training)
    return total / count


def summed_nll(
    nll: Callable[[dict], Tensor], batches: Iterable[dict], device: str | torch.device
) -> tuple[float, int]:
    """Return the negative log-likelihood summed over batches, and how many tokens counted.

    Args:
        nll: Gives that of one batch, whose tensors are on ``device``.
        batches: Each with ``labels``, int64 [rows, length].
        device: Where to compute.
    """
    total = 0.0
    count = 0
    for batch in batches:
        moved = {key: value.to(device) for key, value in batch.items() if isinstance(value, Tensor)}
        total += nll(moved).double().item()
        count += int((batch["labels"][:, 1:] != IGNORE).sum())
    return total, count

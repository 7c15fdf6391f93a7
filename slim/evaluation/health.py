"""What averages hide: where NaN or infinity begins, and whether a model repeats itself.

A model whose figures are not finite is run once more with a hook on every module: the first one, in
the order in which they finish, whose output is not finite is where it starts. Repetition is the
share of n-grams of tokens that were there before, 1 - (different n-grams) / (all n-grams), with n =
4 (Welleck et al., arXiv:1908.04319, call it rep-n)."""

from __future__ import annotations

import math
from collections.abc import Iterable
from contextlib import ExitStack
from typing import TYPE_CHECKING

from slim.core.lazy import LazyModule

if TYPE_CHECKING:
    import torch
else:
    torch = LazyModule("torch")

NGRAM = 4
REPEATING = 0.5  # share of repeated n-grams from which an answer is flagged


def repeated_ngrams(tokens: list[int], n: int = NGRAM) -> float | None:
    """Return the share of n-grams that were there before.

    Args:
        tokens: of a text.
        n: tokens of an n-gram.

    Returns:
        0 to 1, or None for fewer than two n-grams.
    """
    ngrams = [tuple(tokens[start : start + n]) for start in range(len(tokens) - n + 1)]
    if len(ngrams) < 2:
        return None
    return 1 - len(set(ngrams)) / len(ngrams)


def repetition(tokenizer, answers: Iterable[str]) -> dict[str, float]:
    """Return how much answers repeat themselves.

    Args:
        tokenizer: of the model that gave them.
        answers: texts.

    Returns:
        ``repeated_4grams``, the mean share of repeated 4-grams, and ``repeating_answers``, the
        share of answers in which more than half are; empty without long answers.
    """
    shares = []
    for text in answers:
        share = repeated_ngrams(tokenizer(text, add_special_tokens=False)["input_ids"])
        if share is not None:
            shares.append(share)
    if not shares:
        return {}
    flagged = sum(share > REPEATING for share in shares)
    return {
        "repeated_4grams": sum(shares) / len(shares),
        "repeating_answers": flagged / len(shares),
    }


def first_non_finite(model, prompts: Iterable[list[int]]) -> dict[str, str] | None:
    """Return where NaN or infinity starts.

    Args:
        model: a torch module.
        prompts: tokens of inputs worth trying; the first that gives any counts.

    Returns:
        ``module``: name of the first module whose output is not finite; ``value``: ``"nan"`` or
        ``"inf"``; ``cause``: ``"weights"`` if a parameter of that module is not finite itself, else
        ``"activations"``. None where all is finite.
    """
    for ids in prompts:
        noted: list[tuple] = []
        with ExitStack() as hooks, torch.inference_mode():
            for name, module in model.named_modules():
                hook = module.register_forward_hook(_noting(name or "model", noted))
                hooks.callback(hook.remove)
            model(input_ids=torch.tensor([ids], device=model.device), use_cache=False)
        if noted:
            name, module, value = noted[0]
            broken = any(_kind(tensor) is not None for tensor in module.parameters())
            return {"module": name, "value": value, "cause": "weights" if broken else "activations"}
    return None


def _noting(name: str, noted: list[tuple]):
    def note(module, inputs, output) -> None:
        if noted:  # modules finish in order: what comes later only passes it on
            return
        value = _kind(output)
        if value is not None:
            noted.append((name, module, value))

    return note


def _kind(output) -> str | None:
    """Return ``"nan"`` or ``"inf"`` if a tensor, or the first tensor in a tuple, holds one; else
    None."""
    tensor = output[0] if isinstance(output, (tuple, list)) and output else output
    if not isinstance(tensor, torch.Tensor) or not tensor.is_floating_point():
        return None
    if tensor.isnan().any():
        return "nan"
    return "inf" if tensor.isinf().any() else None


def suspects(tokenizer, measured: dict, windows: Iterable[list[int]]) -> list[list[int]]:
    """Return inputs worth trying: windows of the perplexity that are not finite, contexts of such
    questions, a plain one.

    Args:
        tokenizer: of the model.
        measured: what each part of the evaluation returned, by its name.
        windows: tokens of the perplexity's windows, in the order of its records.
    """
    nll = measured.get("perplexity", {}).get("records", {}).get("nll", [])
    inputs = []
    for ids, value in zip(windows, nll, strict=False):
        if not math.isfinite(value):
            inputs.append(ids)
            break
    contexts = []
    for rows in measured.get("tasks", {}).get("records", {}).values():
        for row in rows:
            if not all(map(math.isfinite, row.get("scores", []))):
                contexts.append(row["context"])
    inputs += [tokenizer(text)["input_ids"] for text in contexts[:3]]
    return [*inputs, tokenizer("The")["input_ids"]]


def finite(metrics: dict[str, float]) -> bool:
    """Whether all figures are."""
    return all(math.isfinite(value) for value in metrics.values())

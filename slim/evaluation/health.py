"""What averages hide: where NaN or infinity begins, and whether a model repeats itself.

A model with a metric that is not finite is run once more with a hook on every module: the first
one, in the order in which they finish, whose output is not finite is where it starts. Repetition is
the share of n-grams of tokens that were there before, 1 - (different n-grams) / (all n-grams), with
n = 4 (Welleck et al., arXiv:1908.04319, call it rep-n).
"""

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
    count = len(tokens) - n + 1
    if count < 2:  # a single one repeats nothing
        return None
    different = {tuple(tokens[start : start + n]) for start in range(count)}
    return 1 - len(different) / count


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
            return {"module": name, "value": value, "cause": _cause(module)}
    return None


def _cause(module) -> str:
    """Return ``"weights"`` if a parameter of a module is not finite, else ``"activations"``."""
    for weight in module.parameters():
        if _kind(weight) is not None:
            return "weights"
    return "activations"


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
    tensor = output
    if isinstance(output, (tuple, list)) and output:  # attention returns its weights as well
        tensor = output[0]
    if not isinstance(tensor, torch.Tensor) or not tensor.is_floating_point():
        return None
    if tensor.isnan().any():
        return "nan"
    if tensor.isinf().any():
        return "inf"
    return None


def suspects(tokenizer, measured: dict, windows: Iterable[list[int]]) -> list[list[int]]:
    """Return inputs worth trying: a window of the perplexity that is not finite, contexts of such
    questions, a plain one.

    Args:
        tokenizer: of the model.
        measured: what each part of the evaluation returned, by its name.
        windows: tokens of the perplexity's windows, in the order of its records.
    """
    nll = measured.get("perplexity", {}).get("records", {}).get("nll", [])
    inputs = []
    # one window is enough: the others mostly fail at the same module
    for ids, value in zip(windows, nll, strict=False):
        if not math.isfinite(value):
            inputs.append(ids)
            break
    contexts = []
    for rows in measured.get("tasks", {}).get("records", {}).values():
        for row in rows:
            if not all(map(math.isfinite, row.get("scores", []))):
                contexts.append(row["context"])
    # answers are left out, and a few will do: each is a forward pass of its own
    for text in [*contexts[:3], "The"]:
        inputs.append(tokenizer(text)["input_ids"])
    return inputs


def finite(metrics: dict[str, float]) -> bool:
    """Whether all metrics are finite."""
    return all(map(math.isfinite, metrics.values()))

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
    """Return the share of n-grams that were there before, 0 to 1; None for fewer than two
    n-grams."""
    hessians = [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
    return None if len(hessians) < 2 else 1 - len(set(hessians)) / len(hessians)


def repetition(tokenizer, answers: Iterable[str]) -> dict[str, float]:
    """Return the mean share of repeated 4-grams and the share of answers that are flagged; empty
    without long answers."""
    shares = [
        repeated_ngrams(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in answers
    ]
    known = [share for share in shares if share is not None]
    if not known:
        return {}
    return {
        "repeated_4grams": sum(known) / len(known),
        "repeating_answers": sum(share > REPEATING for share in known) / len(known),
    }


def first_non_finite(model, prompts: Iterable[list[int]]) -> dict[str, str] | None:
    """Return where NaN or infinity starts for the first of ``prompts`` that gives any, or None.

    ``module``: name of the first module whose output is not finite; ``value``: ``"nan"`` or
    ``"inf"``; ``cause``: ``"weights"`` if a parameter of that module is not finite itself, else
    ``"activations"``."""
    for ids in prompts:
        found: list[tuple] = []
        with ExitStack() as hooks, torch.inference_mode():
            for name, module in model.named_modules():
                hook = module.register_forward_hook(_noting(name or "model", found))
                hooks.callback(hook.remove)
            model(input_ids=torch.tensor([ids], device=model.device), use_cache=False)
        if found:
            name, module, value = found[0]
            broken = any(_kind(tensor) is not None for tensor in module.parameters())
            return {"module": name, "value": value, "cause": "weights" if broken else "activations"}
    return None


def _noting(name: str, found: list[tuple]):
    def note(module, inputs, output) -> None:
        value = None if found else _kind(output)
        if value is not None:
            found.append((name, module, value))

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


def suspects(tokenizer, found: dict, windows: Iterable[list[int]]) -> list[list[int]]:
    """Return inputs worth trying: windows of the perplexity that are not finite, contexts of such
    questions, a plain one."""
    nll = found.get("perplexity", {}).get("records", {}).get("nll", [])
    tried = [ids for ids, value in zip(windows, nll, strict=False) if not math.isfinite(value)][:1]
    rows = (row for task in found.get("tasks", {}).get("records", {}).values() for row in task)
    texts = (row["context"] for row in rows if not all(map(math.isfinite, row.get("scores", []))))
    tried += [tokenizer(text)["input_ids"] for text in texts][:3]
    return [*tried, tokenizer("The")["input_ids"]]


def finite(metrics: dict[str, float]) -> bool:
    """Whether all figures are."""
    return all(math.isfinite(value) for value in metrics.values())

"""A teacher's distributions on disk: the k most likely tokens of every position, and one number for
all others.

What is kept per token with a label, at the temperature T that is used: the tokens' ids (int32) and
log-probabilities (float16), the log-probability of all others together and log Z = log sum exp(z /
T) (float32, with which the logits can be had back: z = T (log p + log Z)). The student's
distribution is put into the same k + 1 classes. At k = 64 that is 392 bytes a token, where all of
128k float16 logits are 256 kB.

A cache is a folder of safetensors with ``cache.json``, whose ``cache_key`` names teacher,
tokenizer, template and data."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from itertools import accumulate
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor
from torch.autograd.function import once_differentiable

from slim.core.errors import SlimError
from slim.core.io import read_header, read_json, save_tensors
from slim.data.packing import Windows

RECORD = "cache.json"
PART_TOKENS = 2**17  # tokens per file, about
TENSORS = ("indices", "log_probs", "others", "log_z")


def top_classes(logits: Tensor, temperature: float, k: int) -> dict[str, Tensor]:
    """Return what is kept of ``logits`` [tokens, vocabulary], by the names in ``TENSORS``; k is
    below the vocabulary."""
    scaled = logits.float() / temperature
    log_z = scaled.logsumexp(-1)
    values, indices = scaled.topk(k, -1)
    others = scaled.scatter(-1, indices, -torch.inf).logsumexp(-1) - log_z
    return {
        "indices": indices.int(),
        "log_probs": (values - log_z[:, None]).half(),
        "others": others,
        "log_z": log_z,
    }


def teacher_classes(log_probs: Tensor, others: Tensor) -> Tensor:
    """Return the teacher's k + 1 log-probabilities [tokens, k + 1], made to sum to 1 again after
    rounding."""
    return torch.cat([log_probs.float(), others.float()[:, None]], -1).log_softmax(-1)


class _Lumped(torch.autograd.Function):
    """log softmax(z) with all classes but some in one: few passes over the vocabulary, and no
    difference of near-equals.

    With q = softmax(z), r the sum of q over the others, and g the gradient of the k + 1 results, G
    their sum: dz_i = g_i - q_i G for the kept ones, dz_i = q_i (g_others / r - G) for the others.
    """

    @staticmethod
    def forward(ctx, scaled: Tensor, indices: Tensor) -> Tensor:
        log_z = scaled.logsumexp(-1, keepdim=True)
        kept = scaled.gather(-1, indices) - log_z
        rest = (scaled - log_z).exp_().scatter_(-1, indices, 0.0)  # q of the others
        others = rest.sum(-1, keepdim=True).clamp_min(torch.finfo(rest.dtype).tiny)
        ctx.save_for_backward(rest, kept, others, indices)
        return torch.cat([kept, others.log()], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        rest, kept, others, indices = ctx.saved_tensors
        total = gradient.sum(-1, keepdim=True)
        moved = rest * (gradient[:, -1:] / others - total)
        return moved.scatter_(-1, indices, gradient[:, :-1] - kept.exp() * total), None


def student_classes(logits: Tensor, indices: Tensor, temperature: float) -> Tensor:
    """Return the student's log-probabilities [tokens, k + 1] of the tokens ``indices`` [tokens, k]
    and of all others."""
    return _Lumped.apply(logits.float() / temperature, indices.long())


def windows_digest(windows: Windows) -> str:
    """Return the SHA-256 of the tokens, labels and positions."""
    found = hashlib.sha256()
    for tensor in (windows.tokens, windows.labels, windows.positions):
        found.update(
            b"none"
            if tensor is None
            else str(tuple(tensor.shape)).encode() + tensor.int().numpy().tobytes()
        )
    return found.hexdigest()


def write_cache(
    folder: Path, rows: Iterator[dict[str, Tensor]], cache_key: dict, facts: dict
) -> None:
    """Write what :func:`top_classes` gives for one piece of the tokens after another into the empty
    ``folder``."""
    pending: list[dict[str, Tensor]] = []
    lengths: list[int] = []

    def flush() -> None:
        joined = {
            name: torch.cat([piece[name] for piece in pending]).cpu().contiguous()
            for name in TENSORS
        }
        save_tensors(joined, folder / part_name(len(lengths)))
        lengths.append(len(joined["indices"]))
        pending.clear()

    for piece in rows:
        pending.append(piece)
        if sum(len(some["indices"]) for some in pending) >= PART_TOKENS:
            flush()
    if pending:
        flush()
    record = {"identity": cache_key, "facts": facts, "lengths": lengths}
    (folder / RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def part_name(number: int) -> str:
    return f"part-{number:05d}.safetensors"


class TeacherCache:
    """Reads a cache made for ``windows``, one window at a time, without loading the rest.

    Raises ``SlimError`` if it was made for something else than ``cache_key`` says, or is damaged.
    """

    def __init__(self, folder: Path, windows: Windows, cache_key: dict):
        record = read_json(folder / RECORD)
        require_cache_key(folder, record["identity"], cache_key)
        self.facts: dict = record["facts"]
        self.starts = [0, *accumulate(windows.loss_tokens.tolist())]
        self.bounds = [0, *accumulate(record["lengths"])]
        paths = [folder / part_name(number) for number in range(len(record["lengths"]))]
        for path in paths:
            read_header(path)  # refuses a file that is cut short
        self.parts = [safe_open(path, framework="pt") for path in paths]

    def rows(self, windows: Tensor) -> dict[str, Tensor]:
        """Return the tokens of the windows with these numbers, one after the other, by the names in
        ``TENSORS``."""
        pieces = [piece for number in windows.tolist() for piece in self._pieces(number)]
        return {name: torch.cat([piece[name] for piece in pieces]) for name in TENSORS}

    def _pieces(self, window: int) -> Iterator[dict[str, Tensor]]:
        start, end = self.starts[window], self.starts[window + 1]
        for part, low, high in zip(self.parts, self.bounds, self.bounds[1:], strict=False):
            if low < end and start < high:
                cut = slice(max(start, low) - low, min(end, high) - low)
                yield {name: part.get_slice(name)[cut] for name in TENSORS}


def require_cache_key(folder: Path, found: dict, wanted: dict) -> None:
    """Raise ``SlimError`` naming what a cache was made with that is not what is to be used now."""
    different = [name for name in wanted if found.get(name) != wanted[name]]
    if different:
        raise SlimError(
            f"The teacher cache {folder} was made with another {' and another '.join(different)}. "
            "Use teacher.cache=true, which finds or makes the right one, or give another folder."
        )


def teach(
    hidden_of: Callable[[dict], Tensor],
    head: Callable[[Tensor], Tensor],
    batches: list[dict],
    temperature: float,
    k: int,
    chunk: int,
) -> Iterator[dict[str, Tensor]]:
    """Yield what is kept of the teacher, ``chunk`` tokens at a time.

    hidden_of: gives the hidden states [tokens, hidden] that predict a batch's labels. head: gives
        their logits.
    """  # fmt: skip
    for batch in batches:
        for hidden in hidden_of(batch).split(chunk):
            yield top_classes(head(hidden), temperature, k)

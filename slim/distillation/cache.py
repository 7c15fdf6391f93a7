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
    """Return what is kept of a teacher's predictions.

    Args:
        logits: [tokens, vocabulary].
        temperature: The distributions are softened by it.
        k: Tokens kept of each position, below the vocabulary.

    Returns:
        ``indices``, int32 [tokens, k]; ``log_probs``, float16 [tokens, k]; ``others`` and
        ``log_z``, float32 [tokens].
    """
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
    """Return the teacher's log-probabilities, float32 [tokens, k + 1], made to sum to 1 again after
    rounding.

    Args:
        log_probs: float16 [tokens, k], of the likely tokens.
        others: float32 [tokens], of all others together.
    """
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
    """Return the student's log-probabilities of some tokens and of all others, [tokens, k + 1].

    Args:
        logits: [tokens, vocabulary].
        indices: int [tokens, k], ids of the tokens.
        temperature: The distributions are softened by it.
    """
    return _Lumped.apply(logits.float() / temperature, indices.long())


def windows_digest(windows: Windows) -> str:
    """Return the SHA-256 of the tokens, labels and positions.

    Args:
        windows: The data.
    """
    checksum = hashlib.sha256()
    for tensor in (windows.tokens, windows.labels, windows.positions):
        if tensor is None:
            checksum.update(b"none")
        else:
            checksum.update(str(tuple(tensor.shape)).encode() + tensor.int().numpy().tobytes())
    return checksum.hexdigest()


class CacheWriter:
    """Collects pieces of a cache and writes them in files of about ``PART_TOKENS`` tokens.

    Attributes:
        lengths: Tokens in each file so far.
    """

    def __init__(self, folder: Path):
        """Write nothing yet.

        Args:
            folder: Empty.
        """
        self.folder = folder
        self.lengths: list[int] = []
        self.pending: list[dict[str, Tensor]] = []

    def add(self, piece: dict[str, Tensor]) -> None:
        """Take a piece.

        Args:
            piece: What :func:`top_classes` gives.
        """
        self.pending.append(piece)
        if sum(len(kept["indices"]) for kept in self.pending) >= PART_TOKENS:
            self.flush()

    def flush(self) -> None:
        """Write what has been collected, if anything."""
        if not self.pending:
            return
        joined = {
            name: torch.cat([piece[name] for piece in self.pending]).cpu().contiguous()
            for name in TENSORS
        }
        save_tensors(joined, self.folder / part_name(len(self.lengths)))
        self.lengths.append(len(joined["indices"]))
        self.pending.clear()


def write_cache(
    folder: Path, rows: Iterator[dict[str, Tensor]], cache_key: dict, metadata: dict
) -> None:
    """Write a cache.

    Args:
        folder: Empty.
        rows: What :func:`top_classes` gives for one piece of the tokens after another.
        cache_key: What determines it, as plain JSON values.
        metadata: What is known of the teacher, as plain JSON values.
    """
    writer = CacheWriter(folder)
    for piece in rows:
        writer.add(piece)
    writer.flush()
    record = {"identity": cache_key, "facts": metadata, "lengths": writer.lengths}
    (folder / RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def part_name(number: int) -> str:
    """Return the name of a file of a cache.

    Args:
        number: From 0.
    """
    return f"part-{number:05d}.safetensors"


class TeacherCache:
    """Reads a cache one window at a time, without loading the rest.

    Attributes:
        metadata: What is known of the teacher: ``validation_loss``.
    """

    def __init__(self, folder: Path, windows: Windows, cache_key: dict):
        """Open the files.

        Args:
            folder: Of the cache.
            windows: What it was made for.
            cache_key: What must have determined it.

        Raises:
            SlimError: It was made for something else, or is damaged.
        """
        record = read_json(folder / RECORD)
        require_cache_key(folder, record["identity"], cache_key)
        self.metadata: dict = record["facts"]
        self.starts = [0, *accumulate(windows.loss_tokens.tolist())]
        self.bounds = [0, *accumulate(record["lengths"])]
        paths = [folder / part_name(number) for number in range(len(record["lengths"]))]
        for path in paths:
            read_header(path)  # refuses a file that is cut short
        self.parts = [safe_open(path, framework="pt") for path in paths]

    def rows(self, windows: Tensor) -> dict[str, Tensor]:
        """Return the tokens of some windows, one after the other, by the names in ``TENSORS``.

        Args:
            windows: int64 [windows], their numbers.
        """
        pieces: list[dict[str, Tensor]] = []
        for number in windows.tolist():
            pieces += self._pieces(number)
        return {name: torch.cat([piece[name] for piece in pieces]) for name in TENSORS}

    def _pieces(self, window: int) -> Iterator[dict[str, Tensor]]:
        """Yield the tokens of one window, which may lie in several files."""
        start, end = self.starts[window], self.starts[window + 1]
        for part, low, high in zip(self.parts, self.bounds, self.bounds[1:], strict=False):
            if low < end and start < high:
                cut = slice(max(start, low) - low, min(end, high) - low)
                yield {name: part.get_slice(name)[cut] for name in TENSORS}


def require_cache_key(folder: Path, recorded: dict, wanted: dict) -> None:
    """Check that a cache was made with what is to be used now.

    Args:
        folder: Of the cache.
        recorded: What it was made with, by the names that a message can use.
        wanted: What is to be used.

    Raises:
        SlimError: They differ.
    """
    different = [name for name in wanted if recorded.get(name) != wanted[name]]
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
    """Yield what is kept of the teacher, some tokens at a time.

    Args:
        hidden_of: Gives the hidden states [tokens, hidden size] that predict a batch's labels.
        head: Gives their logits [tokens, vocabulary].
        batches: All windows in their order.
        temperature: The distributions are softened by it.
        k: Tokens kept of each position.
        chunk: Tokens at a time.
    """
    for batch in batches:
        for hidden in hidden_of(batch).split(chunk):
            yield top_classes(head(hidden), temperature, k)

"""The same texts in two tokenizers: the student's windows, and beside every window what the teacher
reads.

A conversation is put into each model's own chat template. Plain text is cut into windows of the
student's tokens first; the teacher gets the text of a window (a character that is cut in two at a
window's edge is lost)."""

from __future__ import annotations

from itertools import tee

import torch
from torch import Tensor

from slim.core.errors import SlimError
from slim.data.chat import require_chat_template
from slim.data.encoding import encode_conversations, end_token
from slim.data.examples import Conversations, TrainingData
from slim.data.packing import IGNORE, Example, Windows, best_fit, separate

Rows = list[list[Example]]  # for every window the sequences in it, in their order


def paired_windows(
    data: TrainingData, part: str, student, teacher, window: int, tokens: int | None, longest: int
) -> tuple[Windows, Rows]:
    """Return the student's windows of ``part`` and what the teacher reads beside each.

    student, teacher: tokenizers. tokens: about how many are enough, None for all. longest: the
    teacher's context."""
    if isinstance(data, Conversations):
        require_chat_template(
            teacher,
            "Distil on plain text (data=text data.text=FILE), or put a chat_template into its "
            "tokenizer_config.json.",
            "The teacher's tokenizer",
        )
        return _conversations(data, part, student, teacher, window, tokens, longest)
    windows = data.windows(part, student, window, tokens)
    return windows, [[_as_read(row, student, teacher, longest)] for row in windows.tokens.tolist()]


def _conversations(data, part, student, teacher, window, tokens, longest) -> tuple[Windows, Rows]:
    one, other = tee(filter(None, data.conversations(part)))
    ours: list[Example] = []
    theirs: list[Example] = []
    seen = dropped = 0
    for own, read in zip(
        encode_conversations(student, one), encode_conversations(teacher, other), strict=True
    ):
        if tokens is not None and seen >= tokens:
            break
        if (
            len(own.tokens) > window
            or len(read.tokens) > longest
            or not (own.has_loss() and read.has_loss())
        ):
            dropped += 1  # what is cut off one of them would be there in the other
            continue
        seen += len(own.tokens)
        ours.append(own), theirs.append(read)
    if not ours:
        raise SlimError(
            f"{data.title} has no {part} example that fits into {window} tokens ({dropped} do not)."
        )
    windows = separate(ours, window, end_token(student))
    bins = best_fit([len(example.tokens) for example in ours], window)  # as in separate
    windows.counts["dropped"] = dropped
    return windows, [[theirs[index] for index in sorted(members)] for members in bins]


def _as_read(row: list[int], student, teacher, longest: int) -> Example:
    """Return a window of plain text in the teacher's tokens; every document ends with the teacher's
    own end token."""
    end, documents = end_token(student), [[]]
    for token in row:
        documents[-1].append(token)
        if token == end:
            documents.append([])
    tokens: list[int] = []
    # no text; other marks may be written in a text
    around = {student.bos_token_id, end, student.pad_token_id}
    for document in filter(None, documents):
        text = student.decode(
            [token for token in document if token not in around], clean_up_tokenization_spaces=False
        )
        tokens += teacher(text, verbose=False)["input_ids"]
        if document[-1] == end and (not tokens or tokens[-1] != end_token(teacher)):
            tokens.append(end_token(teacher))
    return Example(tokens[:longest], tokens[:longest])


def teacher_batch(rows: Rows, pad: int) -> dict[str, Tensor]:
    """Return what the teacher reads beside some windows as ``tokens``, ``labels``, ``positions``,
    ``segments``.

    All int64 [rows, length of the longest]. segments: number of the sequence within its row; -1 for
    what fills it up."""
    columns: dict[str, list[list[int]]] = {
        "tokens": [],
        "labels": [],
        "positions": [],
        "segments": [],
    }
    length = max(sum(len(example.tokens) for example in row) for row in rows)
    for row in rows:
        free = length - sum(len(example.tokens) for example in row)
        columns["tokens"].append(
            [token for example in row for token in example.tokens] + [pad] * free
        )
        labels = [label for example in row for label in (IGNORE, *example.labels[1:])]
        columns["labels"].append(labels + [IGNORE] * free)
        sizes = [*(len(example.tokens) for example in row), free]
        columns["positions"].append([place for size in sizes for place in range(size)])
        segments = [number for number, example in enumerate(row) for _ in example.tokens]
        columns["segments"].append(segments + [-1] * free)
    return {name: torch.tensor(values) for name, values in columns.items()}


def segments_of(positions: Tensor | None, tokens: Tensor) -> Tensor:
    """Return the number of every token's sequence within its row, int64 [rows, length]."""
    return torch.zeros_like(tokens) if positions is None else (positions == 0).long().cumsum(1) - 1

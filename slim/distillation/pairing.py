"""The same texts in two tokenizers: the student's windows, and for every window what the teacher
reads.

A conversation is put into each model's own chat template. Plain text is cut into windows of the
student's tokens first; the teacher gets the text of a window (a character that is cut in two at a
window's edge is lost).
"""

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
    """Return the student's windows and what the teacher reads for each.

    Args:
        data: What is learned.
        part: ``TRAIN`` or ``VALIDATION``.
        student: The student's tokenizer.
        teacher: The teacher's tokenizer.
        window: Tokens of the student's per window.
        tokens: About how many are enough; None for all.
        longest: The teacher's context.

    Raises:
        SlimError: The data are conversations, and the teacher has no chat template; or nothing
            fits.
    """
    if isinstance(data, Conversations):
        require_chat_template(
            teacher,
            "Distil on plain text (data=text data.text=FILE), or put a chat_template into its "
            "tokenizer_config.json.",
            "The teacher's tokenizer",
        )
        return _conversations(data, part, student, teacher, window, tokens, longest)
    windows = data.windows(part, student, window, tokens)
    rows = [[_as_read(row, student, teacher, longest)] for row in windows.tokens.tolist()]
    return windows, rows


def _conversations(data, part, student, teacher, window, tokens, longest) -> tuple[Windows, Rows]:
    for_student, for_teacher = tee(filter(None, data.conversations(part)))
    student_examples: list[Example] = []
    teacher_examples: list[Example] = []
    seen = dropped = 0
    for example, read in zip(
        encode_conversations(student, for_student, data.title),
        encode_conversations(teacher, for_teacher, data.title),
        strict=True,
    ):
        if tokens is not None and seen >= tokens:
            break
        fits = len(example.tokens) <= window and len(read.tokens) <= longest
        if not fits or not (example.has_loss() and read.has_loss()):
            dropped += 1  # what is cut off one of them would be there in the other
            continue
        seen += len(example.tokens)
        student_examples.append(example)
        teacher_examples.append(read)
    if not student_examples:
        raise SlimError(
            f"{data.title} has no {part} example that fits into {window} tokens ({dropped} do not)."
            " Use a longer window."
        )
    windows = separate(student_examples, window, end_token(student))
    windows.counts["dropped"] = dropped
    bins = best_fit([len(example.tokens) for example in student_examples], window)  # as in separate
    return windows, [[teacher_examples[index] for index in sorted(members)] for members in bins]


def _as_read(row: list[int], student, teacher, longest: int) -> Example:
    """Return a window of plain text in the teacher's tokens; every document ends with the teacher's
    own end token."""
    end, teacher_end = end_token(student), end_token(teacher)
    # These are no text; other marks may be written in a text.
    silent = {student.bos_token_id, end, student.pad_token_id}
    tokens: list[int] = []
    for document in _documents(row, end):
        spoken = [token for token in document if token not in silent]
        text = student.decode(spoken, clean_up_tokenization_spaces=False)
        tokens += teacher(text, verbose=False)["input_ids"]
        if document[-1] == end and (not tokens or tokens[-1] != teacher_end):
            tokens.append(teacher_end)
    return Example(tokens[:longest], tokens[:longest])


def _documents(row: list[int], end: int) -> list[list[int]]:
    """Cut a row of tokens after every end token."""
    documents: list[list[int]] = [[]]
    for token in row:
        documents[-1].append(token)
        if token == end:
            documents.append([])
    return [document for document in documents if document]


def teacher_batch(rows: Rows, pad: int) -> dict[str, Tensor]:
    """Return what the teacher reads for some windows as tensors.

    Args:
        rows: The sequences of every window.
        pad: A token that fills shorter rows up.

    Returns:
        ``tokens``, ``labels``, ``positions`` and ``segments`` (number of the sequence within its
        row; -1 for what fills it up), each int64 [rows, length of the longest].
    """
    columns: dict[str, list[list[int]]] = {
        "tokens": [],
        "labels": [],
        "positions": [],
        "segments": [],
    }
    length = max(sum(len(example.tokens) for example in row) for row in rows)
    for row in rows:
        for name, values in _row_columns(row, length, pad).items():
            columns[name].append(values)
    return {name: torch.tensor(values) for name, values in columns.items()}


def _row_columns(row: list[Example], length: int, pad: int) -> dict[str, list[int]]:
    """Return the values of one row of :func:`teacher_batch`."""
    tokens: list[int] = []
    labels: list[int] = []
    positions: list[int] = []
    segments: list[int] = []
    for number, example in enumerate(row):
        size = len(example.tokens)
        tokens += example.tokens
        labels += [IGNORE, *example.labels[1:]]  # nothing predicts the first token of a sequence
        positions += range(size)
        segments += [number] * size
    free = length - len(tokens)
    return {
        "tokens": tokens + [pad] * free,
        "labels": labels + [IGNORE] * free,
        "positions": [*positions, *range(free)],
        "segments": segments + [-1] * free,
    }


def segments_of(positions: Tensor | None, tokens: Tensor) -> Tensor:
    """Return the number of every token's sequence within its row, int64 [rows, length].

    Args:
        positions: int64 [rows, length], 0 where a sequence begins; None: one sequence per row.
        tokens: int64 [rows, length].
    """
    if positions is None:
        return torch.zeros_like(tokens)
    return (positions == 0).long().cumsum(1) - 1

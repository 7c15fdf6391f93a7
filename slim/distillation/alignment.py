"""Where two tokenizers agree: pairs of tokens of one text before which both models have read
exactly the same.

At such a place both models predict how the same text continues, so their hidden states can be
compared one by one. (The improved DSKD, arXiv:2504.11426, aligns so as well, and asks besides that
the next tokens be equal.) Between them, inside a word that one model reads in two tokens and the
other in one, there is nothing to compare.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from slim.data.packing import IGNORE, Windows
from slim.distillation.pairing import Rows

# place among the tokens that count in the loss (-1: counts not), token
Labelled = list[tuple[int, int]]
BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")


def token_bytes(tokenizer) -> list[bytes]:
    """Return the text that every token of a fast tokenizer stands for, in bytes.

    Nothing for what begins, ends and fills texts. A model that lacks other marks, such as those of
    turns, reads them as text.

    Args:
        tokenizer: A fast tokenizer of transformers.
    """
    added = tokenizer.added_tokens_decoder
    silent = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}
    by_byte = "ByteLevel" in str(tokenizer.backend_tokenizer.decoder)
    table = byte_table() if by_byte else None
    texts: list[bytes] = []
    for number, token in enumerate(tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))):
        if number in silent or token is None:
            texts.append(b"")
        elif number in added:
            texts.append(str(added[number]).encode())
        else:
            texts.append(_plain_token_bytes(token, table))
    return texts


def _plain_token_bytes(token: str, table: dict[str, int] | None) -> bytes:
    """Return the bytes of a token that is no mark, by the table of byte-level BPE or as
    SentencePiece writes it."""
    if table is not None:
        return bytes(table[character] for character in token)
    if match := BYTE_TOKEN.fullmatch(token):
        return bytes([int(match[1], 16)])
    return token.replace("\u2581", " ").encode()


def byte_table() -> dict[str, int]:
    """Return character -> byte of byte-level BPE: printable ones stand for themselves, others from
    U+0100 on in their order."""
    table: dict[str, int] = {}
    shifted = 0
    for byte in range(256):
        if 33 <= byte <= 126 or 161 <= byte <= 172 or byte >= 174:
            table[chr(byte)] = byte
        else:
            table[chr(256 + shifted)] = byte
            shifted += 1
    return table


def aligned_windows(windows: Windows, read: Rows, student, teacher) -> list[Tensor]:
    """Return for every window the pairs of tokens that can be compared.

    Args:
        windows: The student's.
        read: For every window what the teacher reads.
        student: The student's tokenizer.
        teacher: The teacher's tokenizer.

    Returns:
        int64 [2, pairs] for every window. First row: places among the student's tokens in the
        window that count in the loss; second row: among those of what the teacher reads; both
        from 0.
    """
    texts = token_bytes(student), token_bytes(teacher)
    ends = student.eos_token_id, teacher.eos_token_id
    pairs: list[Tensor] = []
    for number in range(len(windows)):
        student_runs = list(own_runs(windows, number, ends[0]))
        teacher_runs = list(read_runs(read[number], ends[1]))
        pairs.append(aligned(student_runs, teacher_runs, texts, ends))
    return pairs


def aligned(
    student_runs: list[Labelled],
    teacher_runs: list[Labelled],
    texts: tuple[Sequence[bytes], Sequence[bytes]],
    ends: tuple[int, int],
) -> Tensor:
    """Return the pairs in runs of text that correspond.

    Args:
        student_runs: The student's, in their order.
        teacher_runs: The teacher's, in the same order.
        texts: The bytes of every token, student's and teacher's.
        ends: The token that ends a text, student's and teacher's.

    Returns:
        int64 [2, pairs], as :func:`aligned_windows` gives them.
    """
    pairs: list[tuple[int, int]] = []
    for student_run, teacher_run in zip(student_runs, teacher_runs, strict=False):
        common = _common_length(student_run, teacher_run, texts)
        teacher_places: dict[tuple[int, bool], int] = {}
        for key, place in _beginnings(teacher_run, texts[1], ends[1]):
            if key[0] <= common and place >= 0:
                teacher_places[key] = place
        for key, place in _beginnings(student_run, texts[0], ends[0]):
            if place >= 0 and key in teacher_places:
                pairs.append((place, teacher_places[key]))
    return torch.tensor(pairs, dtype=torch.long).view(-1, 2).T


def _beginnings(
    run: Labelled, texts: Sequence[bytes], end: int
) -> Iterator[tuple[tuple[int, bool], int]]:
    """Yield, for every token that is text or ends it, how many bytes precede it and whether it
    ends; and its place."""
    at = -_leading(run, texts)
    for place, token in run:
        if texts[token] or token == end:
            yield (max(at, 0), token == end), place
        at += len(texts[token])


def _leading(run: Labelled, texts: Sequence[bytes]) -> int:
    """Count the blanks in front: templates and tokenizers differ in them."""
    text = b"".join(texts[token] for _, token in run)
    return len(text) - len(text.lstrip())


def _common_length(
    student_run: Labelled,
    teacher_run: Labelled,
    texts: tuple[Sequence[bytes], Sequence[bytes]],
) -> int:
    """Return how many bytes, after the blanks in front, are the same in both."""
    student_text = b"".join(texts[0][token] for _, token in student_run).lstrip()
    teacher_text = b"".join(texts[1][token] for _, token in teacher_run).lstrip()
    for place, (ours, theirs) in enumerate(zip(student_text, teacher_text, strict=False)):
        if ours != theirs:
            return place
    return min(len(student_text), len(teacher_text))


def own_runs(windows: Windows, number: int, end: int) -> Iterator[Labelled]:
    """Yield the runs of tokens with labels in a window: an answer, or a document of plain text.

    Args:
        windows: The student's.
        number: Of the window.
        end: The token that ends a text.
    """
    tokens, labels = windows.tokens[number].tolist(), windows.labels[number].tolist()
    starts = [0]
    if windows.positions is not None:
        positions = windows.positions[number].tolist()
        starts = [place for place, position in enumerate(positions) if position == 0]
    bounds = pairwise([*starts, len(tokens)])
    yield from _runs([(tokens[first:last], labels[first:last]) for first, last in bounds], end)


def read_runs(examples: list, end: int) -> Iterator[Labelled]:
    """Yield the runs in what the teacher reads for a window.

    Args:
        examples: The sequences in it.
        end: The token that ends a text.
    """
    yield from _runs([(example.tokens, example.labels) for example in examples], end)


def _runs(sequences: list[tuple[list[int], list[int]]], end: int) -> Iterator[Labelled]:
    """Cut sequences at what has no label and after every end token; number the tokens that count
    in the loss."""
    count = 0
    for tokens, labels in sequences:
        run: Labelled = []
        for place, (token, label) in enumerate(zip(tokens, labels, strict=True)):
            if label != IGNORE:
                # Nothing predicts the first token of a sequence.
                run.append((count if place else -1, token))
                count += place > 0
            if run and (label == IGNORE or token == end):
                yield run
                run = []
        if run:
            yield run

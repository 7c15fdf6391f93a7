"""Where two tokenizers agree: pairs of tokens of one text before which both models have read
exactly the same.

At such a place both models predict how the same text goes on, so that their hidden states can be
compared one by one. (The improved DSKD, arXiv:2504.11426, aligns so as well, and asks besides that
the next tokens be equal.) Between them, inside a word that one model reads in two tokens and the
other in one, there is nothing to compare."""

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
    turns, reads them as text."""
    added = tokenizer.added_tokens_decoder
    around = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}
    by_byte = "ByteLevel" in str(tokenizer.backend_tokenizer.decoder)
    table = byte_table() if by_byte else {}
    found = []
    for number, token in enumerate(tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))):
        if number in around or token is None:
            found.append(b"")
        elif number in added:
            found.append(str(added[number]).encode())
        elif by_byte:
            found.append(bytes(table[character] for character in token))
        elif match := BYTE_TOKEN.fullmatch(token):
            found.append(bytes([int(match[1], 16)]))
        else:
            found.append(token.replace("\u2581", " ").encode())
    return found


def byte_table() -> dict[str, int]:
    """Return character -> byte of byte-level BPE: printable ones stand for themselves, others from
    U+0100 on in their order."""
    plain = [byte for byte in range(256) if 33 <= byte <= 126 or 161 <= byte <= 172 or byte >= 174]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {
        chr(256 + place): byte for place, byte in enumerate(others)
    }


def aligned_windows(windows: Windows, read: Rows, student, teacher) -> list[Tensor]:
    """Return for every window the pairs of tokens that can be compared, int64 [2, pairs].

    student, teacher: tokenizers. First row: places among the student's tokens in the window that
        count in the loss, second
    row: among those of what the teacher reads beside it (``read``), both from 0.
    """
    texts = token_bytes(student), token_bytes(teacher)
    ends = student.eos_token_id, teacher.eos_token_id
    return [
        aligned(
            list(own_runs(windows, number, ends[0])),
            list(read_runs(read[number], ends[1])),
            texts,
            ends,
        )
        for number in range(len(windows))
    ]


def aligned(
    own: list[Labelled],
    other: list[Labelled],
    texts: tuple[Sequence[bytes], ...],
    ends: tuple[int, int],
) -> Tensor:
    """Return the pairs in runs of text that stand beside each other."""
    pairs = []
    for one, two in zip(own, other, strict=False):
        common = _common_length(one, two, texts)
        starts = {
            key: place
            for key, place in _beginnings(two, texts[1], ends[1])
            if key[0] <= common and place >= 0
        }
        pairs += [
            (place, starts[key])
            for key, place in _beginnings(one, texts[0], ends[0])
            if place >= 0 and key in starts
        ]
    return torch.tensor(pairs, dtype=torch.long).view(-1, 2).T


def _beginnings(
    run: Labelled, texts: Sequence[bytes], end: int
) -> Iterator[tuple[tuple[int, bool], int]]:
    """Yield, for every token that is text or ends it, how many bytes are in front of it and whether
    it ends; and its place."""
    at = -_leading(run, texts)
    for place, token in run:
        if texts[token] or token == end:
            yield (max(at, 0), token == end), place
        at += len(texts[token])


def _leading(run: Labelled, texts: Sequence[bytes]) -> int:
    """Count the blanks in front: templates and tokenizers differ in them."""
    text = b"".join(texts[token] for _, token in run)
    return len(text) - len(text.lstrip())


def _common_length(one: Labelled, two: Labelled, texts: tuple[Sequence[bytes], ...]) -> int:
    """Return how many bytes, behind the blanks in front, are the same in both."""
    a, b = (
        b"".join(known[token] for _, token in run).lstrip()
        for run, known in zip((one, two), texts, strict=True)
    )
    return next(
        (place for place, (x, y) in enumerate(zip(a, b, strict=False)) if x != y),
        min(len(a), len(b)),
    )


def own_runs(windows: Windows, number: int, end: int) -> Iterator[Labelled]:
    """Yield the runs of tokens with labels in a window: an answer, or a document of plain text."""
    tokens, labels = windows.tokens[number].tolist(), windows.labels[number].tolist()
    positions = (
        range(len(tokens)) if windows.positions is None else windows.positions[number].tolist()
    )
    starts = [place for place, position in enumerate(positions) if position == 0]
    yield from _runs([(tokens[a:b], labels[a:b]) for a, b in pairwise([*starts, len(tokens)])], end)


def read_runs(examples: list, end: int) -> Iterator[Labelled]:
    """Yield the runs in what the teacher reads beside a window."""
    yield from _runs([(example.tokens, example.labels) for example in examples], end)


def _runs(sequences: list[tuple[list[int], list[int]]], end: int) -> Iterator[Labelled]:
    """Cut sequences at what has no label and behind every end token; number the tokens that count
    in the loss."""
    count = 0
    for tokens, labels in sequences:
        run: Labelled = []
        for place, (token, label) in enumerate(zip(tokens, labels, strict=True)):
            if label != IGNORE:
                # nothing predicts the first token of a sequence
                run.append((count if place else -1, token))
                count += place > 0
            if run and (label == IGNORE or token == end):
                yield run
                run = []
        if run:
            yield run

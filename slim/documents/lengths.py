"""Pieces of about equal length: long pages are split at sentences, short neighbors joined."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

from slim.documents.pages import Picture

LONG = 1.5  # times the length, from which a page is split
SHORT = 0.5  # times the length, below which a page is joined with the next
ABBREVIATIONS = (
    "z. B", "z.B", "d. h", "d.h", "u. a", "u.a", "vgl", "Abb", "Nr", "Dr", "Prof", "Tab", "Kap",
    "bzw", "ca", "usw", "etc", "e.g", "i.e", "Fig", "Eq", "cf", "vs", "St", "Mr", "Mrs", "al",
)  # fmt: skip
SENTENCE_END = re.compile(r"[.!?…][\"'”“»)\]]*\s+(?=[\"'„“»(\[]?[A-ZÄÖÜ0-9])")


@dataclass
class Passage:
    """The text of a page, or of several, or a piece of one.

    Attributes:
        text: of the pages.
        first: number of the first page.
        last: number of the last one.
        part: number of the piece, from 1; 0 for whole pages.
        confidence: lowest confidence of OCR among the pages in per cent; None without OCR.
        pictures: of the pages, each with its page's number.
    """

    text: str
    first: int
    last: int
    part: int = 0
    confidence: float | None = None
    pictures: list[tuple[int, Picture]] = field(default_factory=list)


def fitted(passages: list[Passage], length: float, join: int) -> list[Passage]:
    """Return the pages of a document in pieces of about ``join`` times ``length`` characters.

    Args:
        passages: one for each page.
        length: characters of a page.
        join: pages of a record; further ones are joined while it is short.
    """
    target = join * length
    result: list[Passage] = []
    for group in _groups(passages, target, join):
        joined = _joined(group)
        if len(joined.text) <= LONG * target:
            result.append(joined)
            continue
        for number, text in enumerate(split_text(joined.text, target), 1):
            pictures = joined.pictures if number == 1 else []
            result.append(
                Passage(text, joined.first, joined.last, number, joined.confidence, pictures)
            )
    return result


def _groups(passages: list[Passage], target: float, join: int) -> Iterator[list[Passage]]:
    """Yield the pages that make a record."""
    group: list[Passage] = []
    size = 0
    for passage in passages:
        is_enough = len(group) >= join and size >= SHORT * target
        if group and (is_enough or size + len(passage.text) > LONG * target):
            yield group
            group = []
            size = 0
        group.append(passage)
        size += len(passage.text)
    if group:
        yield group


def _joined(group: list[Passage]) -> Passage:
    if len(group) == 1:
        return group[0]
    confidences = []
    pictures = []
    for passage in group:
        pictures += passage.pictures
        if passage.confidence is not None:
            confidences.append(passage.confidence)
    text = "\n\n".join(passage.text for passage in group)
    confidence = min(confidences, default=None)
    return Passage(text, group[0].first, group[-1].last, 0, confidence, pictures)


def split_text(text: str, length: float) -> list[str]:
    """Split a text at sentences into pieces of about equal length.

    Args:
        text: with paragraphs, tables and code between empty lines.
        length: characters of a piece, about; a longer sentence stays whole.
    """
    count = max(1, round(len(text) / length))
    target = len(text) / count
    pieces = []
    piece = ""
    for unit in units(text):
        # on which side of the unit the piece is nearer to its length
        if piece.strip() and len(piece) + len(unit) / 2 > target:
            pieces.append(piece.strip())
            piece = ""
        piece += unit
    if piece.strip():
        pieces.append(piece.strip())
    return pieces


def units(text: str) -> Iterator[str]:
    """Yield what is not to be divided, with what follows it up to the next: sentences, lines of
    lists and tables, code."""
    for block in _blocks(text):
        if block.startswith("```"):
            yield block
        elif block.startswith("|"):
            yield from block.splitlines(keepends=True)
        else:
            yield from _sentences(block)


def _blocks(text: str) -> Iterator[str]:
    """Yield paragraphs, tables and whole pieces of code with the empty line that follows."""
    code = ""
    for block in re.split(r"(?<=\n\n)", text):
        if code or block.startswith("```"):
            code += block
            if not code.rstrip().endswith("```") or code.rstrip() == "```":
                continue
            block = code
            code = ""
        yield block
    if code:
        yield code


def _sentences(block: str) -> Iterator[str]:
    start = 0
    for match in SENTENCE_END.finditer(block):
        before = block[start : match.start()]
        if before.endswith(ABBREVIATIONS) or re.search(r"(?:^|\s)(?:\w|\d{1,2})$", before):
            continue
        yield block[start : match.end()]
        start = match.end()
    if start < len(block):
        yield block[start:]

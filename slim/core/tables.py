"""Tables of text that fit any width: nothing is cut, nothing is colour alone.

What is too wide goes into further blocks below the first, each with the first columns repeated;
a cell that is too wide by itself goes over several lines.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field

from slim.core.console import results_console

GAP = 2  # spaces between two columns
HEADING_LINES = 3  # a heading takes no more, unless its words are longer than the cells below
NARROWEST = 12  # a column of text is folded to no less
# where a word may be parted, the mark staying with the first part
PARTS = re.compile(r"[^\s\-_/,.=]*[\-_/,.=]+|[^\s\-_/,.=]+")
# what slim itself writes, for outputs that have ASCII only
PLAIN = str.maketrans({"─": "-", "±": "~", "→": ">", "×": "x", "…": "...", "≥": ">="})


@dataclass
class Table:
    """Headings and rows of text.

    Attributes:
        headings: one per column.
        rows: cells in the order of the headings; a cell may have several lines.
        keys: how many columns say what a row is: aligned to the left, repeated in every block.
        fold: columns of text, by number, which become narrower before others move to a new block.
        title: line above the table.
        notes: lines below it, wrapped to the width.
    """

    headings: list[str]
    rows: list[list[str]]
    keys: int = 1
    fold: Sequence[int] = ()
    title: str = ""
    notes: list[str] = field(default_factory=list)

    def lines(self, width: int) -> list[str]:
        """Return the lines of the table, none longer than ``width`` (at least 20)."""
        width = max(width, 20)
        lines = []
        if self.title:
            lines = wrapped(self.title, width)
        widths = self._widths(width)
        for number, columns in enumerate(self._blocks(widths, width)):
            if number:
                lines.append("")
            lines += self._block(columns, widths)
        for note in self.notes:
            lines += wrapped(note, width)
        return lines

    def _widths(self, width: int) -> list[int]:
        widths = []
        for index, heading in enumerate(self.headings):
            content = 1
            for row in self.rows:
                content = max(content, *map(text_width, row[index].split("\n")))
            widths.append(max(content, heading_width(heading, content)))
        self._fold_text(widths, width)
        self._fold_keys(widths, width)
        # what is left for a single column next to the keys
        most = width - sum(widths[: self.keys]) - GAP * self.keys
        for index in range(self.keys, len(widths)):
            widths[index] = min(widths[index], most)
        return widths

    def _fold_text(self, widths: list[int], width: int) -> None:
        """Make columns of text narrower, the widest first, until all fit; leave them alone where
        that is not enough."""
        total = sum(widths) + GAP * (len(widths) - 1)
        spare = sum(max(0, widths[index] - NARROWEST) for index in self.fold)
        if total - spare > width:  # the table is parted anyway, so the text keeps its room
            return
        while total > width:
            widest = max(self.fold, key=lambda index: widths[index])
            widths[widest] -= 1
            total -= 1

    def _fold_keys(self, widths: list[int], width: int) -> None:
        """Leave at least half of the width to what is not a key."""
        most = width // 2 - GAP * self.keys
        while sum(widths[: self.keys]) > most:
            widest = max(range(self.keys), key=lambda index: widths[index])
            if widths[widest] == 1:
                return
            widths[widest] -= 1

    def _blocks(self, widths: list[int], width: int) -> list[list[int]]:
        """Return the columns of every block, by number: as many as fit."""
        keys = list(range(self.keys))
        start = sum(widths[: self.keys]) + GAP * (self.keys - 1)
        blocks: list[list[int]] = []
        room = 0
        for index in range(self.keys, len(widths)):
            needed = widths[index] + GAP
            if not blocks or needed > room:
                blocks.append(list(keys))
                room = width - start
            blocks[-1].append(index)
            room -= needed
        return blocks or [keys]

    def _block(self, columns: list[int], widths: list[int]) -> list[str]:
        heads = [wrapped(self.headings[index], widths[index]) for index in columns]
        height = max(map(len, heads))
        # headings stand on the line below them
        above = [[""] * (height - len(head)) + head for head in heads]
        lines = self._joined(above, columns, widths)
        total = sum(widths[index] for index in columns) + GAP * (len(columns) - 1)
        lines.append("─" * total)
        for row in self.rows:
            cells = []
            for index in columns:
                cell = []
                for part in row[index].split("\n"):
                    cell += wrapped(part, widths[index])
                cells.append(cell)
            lines += self._joined(cells, columns, widths)
        return lines

    def _joined(self, cells: list[list[str]], columns: list[int], widths: list[int]) -> list[str]:
        """Return the lines of one row whose cells have several lines each."""
        lines = []
        for number in range(max(map(len, cells))):
            parts = []
            for cell, index in zip(cells, columns, strict=True):
                text = ""
                if number < len(cell):
                    text = cell[number]
                space = " " * (widths[index] - text_width(text))
                # text begins on the left; numbers end on the right, under each other
                if index < self.keys or index in self.fold:
                    parts.append(text + space)
                else:
                    parts.append(space + text)
            lines.append((" " * GAP).join(parts).rstrip())
        return lines


def text_width(text: str) -> int:
    """Return how many columns of a terminal a text takes."""
    if text.isascii():
        return len(text)
    from rich.cells import cell_len  # local: --help does without rich

    return cell_len(text)


def heading_width(heading: str, content: int) -> int:
    """Return the least width, ``content`` or more, at which a heading takes few lines."""
    width = max([content, *map(text_width, PARTS.findall(heading))])
    while len(wrapped(heading, width)) > HEADING_LINES:
        width += 1
    return width


def wrapped(text: str, width: int) -> list[str]:
    """Return a text as lines of at most ``width``: parted between words, then at ``- _ / , . =``,
    then anywhere."""
    if text_width(text) <= width:
        return [text]
    lines, line = [], ""
    for word in text.split():
        spaced = f"{line} {word}" if line else word
        if text_width(spaced) <= width:
            line = spaced
            continue
        if line:
            lines.append(line)
        *full, line = _parted(word, width)
        lines += full
    return [*lines, line] if line or not lines else lines


def _parted(word: str, width: int) -> list[str]:
    lines, line = [], ""
    for part in PARTS.findall(word) or [word]:
        for piece in _pieces(part, width):
            if line and text_width(line + piece) > width:
                lines.append(line)
                line = ""
            line += piece
    return [*lines, line]


def _pieces(part: str, width: int) -> list[str]:
    """Cut what is longer than a line by itself."""
    pieces, piece = [], ""
    for letter in part:
        if piece and text_width(piece + letter) > width:
            pieces.append(piece)
            piece = ""
        piece += letter
    return [*pieces, piece]


def print_table(table: Table) -> None:
    """Print a table on standard output, as wide as that is."""
    out = results_console()
    for number, line in enumerate(table.lines(out.width)):
        style = "bold" if number == 0 and table.title else None
        out.print(printable(line), style=style, highlight=False, markup=False, soft_wrap=True)


def printable(line: str) -> str:
    """Replace the signs that slim writes where standard output cannot show them."""
    try:
        line.encode(getattr(sys.stdout, "encoding", None) or "utf-8")
    except UnicodeEncodeError:
        return line.translate(PLAIN)
    return line

"""From pieces of text somewhere on a page to lines in reading order, and from lines to text."""

from __future__ import annotations

import re
import unicodedata
from statistics import median

from slim.documents.pages import CODE, HEADING, TABLE, Line

# Lengths are shares of a line's height.
WORD_GAP = 0.15  # a wider gap between two pieces is a space
COLUMN_GAP = 1.2  # a wider gap separates lines of two columns
SAME_LINE = 0.5  # how much of the lower piece overlaps the other one in height
PARAGRAPH_GAP = 0.75  # a higher gap begins another paragraph
OTHER_SIZE = 0.2  # difference in height that begins another paragraph

LEAST_IN_COLUMN = 3  # lines
CROSSING = 0.4  # most lines, as a share, that may cross the gap between two columns
MIDDLE = (0.15, 0.85)  # where the gap may be, as shares of the text's width
SPARE = 1.3  # times the width of a word, which may have letters wider than those of its line

BULLET = re.compile(r"^\s*([•‣◦▪■●○–—*·\-]|\(?\d{1,2}[.)]|\(?[a-z][.)])\s+")
# how PDFs mark a hyphen that ends a line
HYPHENS = ("\x02", "\ufffe", "\xad")
LIGATURES = {"ﬀ": "ff", "ﬁ": "fi", "ﬂ": "fl", "ﬃ": "ffi", "ﬄ": "ffl", "ﬅ": "st", "ﬆ": "st"}
# LaTeX's older fonts write an umlaut as two characters
UMLAUT = re.compile(r"¨\s?([aouAOU])")
UNWANTED = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ufffd\ud800-\udfff]")


def clean(text: str) -> str:
    """Return text with whole characters: umlauts in one, no ligatures, no control characters."""
    for hyphen in HYPHENS:
        text = text.replace(hyphen, "-")
    for ligature, letters in LIGATURES.items():
        text = text.replace(ligature, letters)
    text = UMLAUT.sub("\\1\u0308", text)
    return unicodedata.normalize("NFC", UNWANTED.sub("", text))


def in_lines(pieces: list[Line]) -> list[Line]:
    """Join pieces that stand next to each other on one line.

    Args:
        pieces: in any order.

    Returns:
        Lines from top to bottom; those of two columns stay apart.
    """
    lines: list[Line] = []
    for piece in sorted(pieces, key=lambda piece: (piece.left, piece.top)):
        line = _neighbor(lines, piece)
        if line is None:
            lines.append(piece)
            continue
        is_word = piece.left - line.right > WORD_GAP * line.height
        is_spaced = line.text.endswith(" ") or piece.text.startswith(" ")
        line.text += " " + piece.text if is_word and not is_spaced else piece.text
        line.right = max(line.right, piece.right)
        line.top = min(line.top, piece.top)
        line.bottom = max(line.bottom, piece.bottom)
    return sorted(lines, key=lambda line: (line.top, line.left))


def _neighbor(lines: list[Line], piece: Line) -> Line | None:
    """Return the line that ``piece`` continues to the right."""
    for line in reversed(lines):
        overlap = min(line.bottom, piece.bottom) - max(line.top, piece.top)
        lower = min(line.height, piece.height)
        gap = piece.left - line.right
        is_near = overlap > SAME_LINE * lower and -lower < gap < COLUMN_GAP * line.height
        if is_near and (line.kind == CODE) == (piece.kind == CODE):
            return line
    return None


def in_reading_order(lines: list[Line]) -> list[Line]:
    """Return lines column by column; a line across the columns ends those above it.

    Args:
        lines: from top to bottom. Their ``edge`` is set to that of their column.
    """
    gap = _column_gap(lines)
    if gap is None:
        right = max((line.right for line in lines), default=0.0)
        for line in lines:
            line.edge = right
        return lines
    ordered: list[Line] = []
    left: list[Line] = []
    right_column: list[Line] = []
    across: list[Line] = []

    def flush() -> None:
        for column in (across, left, right_column):
            ordered.extend(in_reading_order(list(column)))
            column.clear()

    for line in lines:
        if across and not left and not right_column and _follows(across[-1], line):
            across.append(line)
        elif line.right <= gap:
            left.append(line)
        elif line.left >= gap:
            right_column.append(line)
        else:
            if left or right_column:
                flush()
            across.append(line)
    flush()
    return ordered


def _follows(previous: Line, line: Line) -> bool:
    """Whether a line stands directly below another one, as the last line of a paragraph does."""
    height = min(line.height, previous.height)
    is_below = line.top - previous.top >= 0 and line.top - previous.bottom < PARAGRAPH_GAP * height
    is_same_size = abs(line.height - previous.height) <= OTHER_SIZE * height
    return is_below and is_same_size and abs(line.left - previous.left) < height


def _column_gap(lines: list[Line]) -> float | None:
    """Return where two columns are separated, or None where there is one column."""
    if len(lines) < 2 * LEAST_IN_COLUMN:
        return None
    lefts = {line.left for line in lines}
    height = median(line.height for line in lines)
    start = min(lefts)
    width = max(line.right for line in lines) - start
    best = None
    for candidate in sorted(lefts):
        if not MIDDLE[0] * width < candidate - start < MIDDLE[1] * width:
            continue
        place = candidate - 0.1 * height
        left = []
        right = []
        for line in lines:
            if line.right <= place:
                left.append(line)
            elif line.left >= place:
                right.append(line)
        crossing = len(lines) - len(left) - len(right)
        if min(len(left), len(right)) < LEAST_IN_COLUMN or crossing > CROSSING * len(lines):
            continue
        if not _side_by_side(left, right):
            continue
        if best is None or crossing < best[0]:
            best = (crossing, place)
    if best is None:
        return None
    return best[1]


def _side_by_side(left: list[Line], right: list[Line]) -> bool:
    """Whether two columns share most of their height: indented lines below others are no column."""
    left_top, left_bottom = _extent(left)
    right_top, right_bottom = _extent(right)
    shared = min(left_bottom, right_bottom) - max(left_top, right_top)
    return shared > 0.5 * min(left_bottom - left_top, right_bottom - right_top)


def _extent(column: list[Line]) -> tuple[float, float]:
    """Return top and bottom of a column."""
    top = column[0].top
    bottom = column[0].bottom
    for line in column:
        top = min(top, line.top)
        bottom = max(bottom, line.bottom)
    return top, bottom


def page_text(lines: list[Line]) -> str:
    """Return the text of lines in reading order: paragraphs with an empty line between them, words
    that were divided at a line's end in one piece.

    Args:
        lines: of one page.
    """
    paragraphs: list[str] = []
    previous: Line | None = None
    for line in lines:
        text = line.text.rstrip() if line.kind == CODE else line.text.strip()
        if not text:
            continue
        between = _between(previous, line)
        if not paragraphs or between == "\n\n":
            paragraphs.append(_opened(line, text))
        else:
            paragraphs[-1] = _continued(paragraphs[-1], between, line, text)
        previous = line
    return "\n\n".join(_closed(text) for text in paragraphs)


def _opened(line: Line, text: str) -> str:
    """Return the beginning of a paragraph."""
    if line.kind == CODE and not text.startswith("```"):
        return f"```\n{text}"
    return text


def _closed(text: str) -> str:
    """Return a paragraph; code gets its closing fence where it has none."""
    if text.startswith("```") and not text.endswith("\n```"):
        return f"{text}\n```"
    return text


def _continued(paragraph: str, between: str, line: Line, text: str) -> str:
    """Return a paragraph with another line of it."""
    if between == "\n":
        return f"{paragraph}\n{text}"
    is_divided = re.search(r"[^\W\d_]-$", paragraph) is not None
    if is_divided and text[0].islower() and not re.match(r"(und|oder|and|or)\b", text):
        return paragraph[:-1] + text
    if is_divided:
        return paragraph + text if text[0].isupper() else f"{paragraph} {text}"
    return f"{paragraph} {text}"


def _between(previous: Line | None, line: Line) -> str:
    """Return what separates two lines: a space, a line's end, or an empty line."""
    if previous is None or previous.kind != line.kind or line.kind in (TABLE, HEADING):
        return "\n\n"
    if line.paragraph is not None or previous.paragraph is not None:
        if line.paragraph != previous.paragraph:
            return "\n\n"
        return "\n" if line.kind == CODE or BULLET.match(line.text) else " "
    height = min(line.height, previous.height)
    gap = line.top - previous.bottom
    is_same_size = abs(line.height - previous.height) <= OTHER_SIZE * height
    if gap < -2 * height and is_same_size:  # the next column
        return _over_columns(previous, line)
    if gap > PARAGRAPH_GAP * height or line.edge != previous.edge:
        return "\n\n"
    if line.kind == CODE:
        return "\n"
    if not is_same_size:
        return "\n\n"
    return "\n" if BULLET.match(line.text) or _is_short(previous, line) else " "


def _over_columns(previous: Line, line: Line) -> str:
    """Return what separates the end of a column from the beginning of the next."""
    if line.kind != CODE and not previous.text.rstrip().endswith((".", "!", "?", ":")):
        return " "
    return "\n\n"


def _is_short(previous: Line, line: Line) -> bool:
    """Whether a line ends before its column does although the next word would have fitted."""
    width = (previous.right - previous.left) / max(len(previous.text), 1)
    word = line.text.split(maxsplit=1)[0]
    return previous.right + SPARE * width * (len(word) + 1) < previous.edge

"""What readers return: pages of lines, each with its kind and its place on the page."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field

TEXT, HEADING, TABLE, CODE = "text", "heading", "table", "code"


@dataclass
class Line:
    """A line of a page, or a whole paragraph, table or piece of code where the file has such.

    Attributes:
        text: without the line's end; of tables and code with line ends.
        kind: ``"text"``, ``"heading"``, ``"table"`` or ``"code"``.
        left: place on the page from its left edge, in the page's unit.
        top: place from the page's top, as ``bottom``.
        right: as ``left``.
        bottom: as ``top``.
        edge: right edge of the column that the line stands in, as ``left``.
        paragraph: number of the paragraph within its page; None where the place on the page has to
            tell.
    """

    text: str
    kind: str = TEXT
    left: float = 0.0
    top: float = 0.0
    right: float = 0.0
    bottom: float = 0.0
    edge: float = 0.0
    paragraph: int | None = None

    @property
    def height(self) -> float:
        return self.bottom - self.top


@dataclass
class Picture:
    """A picture on a page.

    Attributes:
        width: pixels.
        height: pixels.
        name: SHA-256 of its data, which tells pictures apart.
    """

    width: int
    height: int
    name: str


@dataclass
class Page:
    """A page or slide.

    Attributes:
        number: from 1; a file without pages is page 1.
        height: in any unit, the one of the lines' places; 0 where there are no places.
        lines: in reading order.
        pictures: of the page; the scan of a page read by OCR is none of them.
        confidence: mean confidence of OCR in per cent; None where the page has its own text.
        problem: why the page could not be read; empty where it could.
        askew: characters at another angle than the page's text, which are left out.
    """

    number: int
    height: float = 0.0
    lines: list[Line] = field(default_factory=list)
    pictures: list[Picture] = field(default_factory=list)
    confidence: float | None = None
    problem: str = ""
    askew: int = 0


def as_json(pages: list[Page]) -> list[dict]:
    """Return pages as plain JSON values."""
    return [asdict(page) for page in pages]


def from_json(rows: list[dict]) -> list[Page]:
    """Return the pages that :func:`as_json` wrote."""
    pages = []
    for row in rows:
        lines = [Line(**line) for line in row["lines"]]
        pictures = [Picture(**picture) for picture in row["pictures"]]
        pages.append(Page(**{**row, "lines": lines, "pictures": pictures}))
    return pages


class Unreadable(Exception):
    """A file that cannot be read; the message says why, without the file's name."""

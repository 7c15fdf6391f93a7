"""Headers, footers and page numbers: what stands at the edges of page after page."""

from __future__ import annotations

import re
from collections import Counter

from slim.documents.pages import HEADING, TEXT, Line, Page

EDGE = 0.14  # share of the page's height, at its top and at its bottom
LEAST_PAGES = 3  # on which the same stands
SHARE = 0.3  # of a document's pages
NUMBER = re.compile(
    r"^\W*(?:page|p\.|seite|s\.|slide|folie|blatt)?\s*\d{1,4}\s*(?:(?:/|of|von|\|)\s*\d{1,4})?\W*$",
    re.IGNORECASE,
)


def remove_repeats(pages: list[Page]) -> Counter:
    """Remove what repeats at the edges of a document's pages, and page numbers there.

    Lines are the same if they differ in digits alone. A page keeps its lines where its file says
    nothing of places.

    Args:
        pages: of one document; their lines are changed.

    Returns:
        The lines that were removed, digits as ``#``, and from how many pages.
    """
    on_pages: Counter = Counter()
    for page in pages:
        on_pages.update({_pattern(line) for line in page.lines if _is_at_edge(line, page)})
    least = max(LEAST_PAGES, SHARE * len(pages))
    repeating = {pattern for pattern, count in on_pages.items() if count >= least}
    removed: Counter = Counter()
    for page in pages:
        kept = []
        for line in page.lines:
            pattern = _pattern(line)
            is_number = NUMBER.match(line.text) is not None
            if _is_at_edge(line, page) and (pattern in repeating or is_number):
                removed[pattern] += 1
            else:
                kept.append(line)
        page.lines = kept
    return removed


def _is_at_edge(line: Line, page: Page) -> bool:
    if not page.height or line.kind not in (TEXT, HEADING):
        return False
    return line.bottom <= EDGE * page.height or line.top >= (1 - EDGE) * page.height


def _pattern(line: Line) -> str:
    return re.sub(r"\d+", "#", " ".join(line.text.split()))

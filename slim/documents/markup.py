"""Files without pages: Markdown, HTML (through Beautiful Soup and markdownify, both MIT), plain
text."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from slim.core.errors import SlimError
from slim.data.files import read_text
from slim.documents.layout import clean
from slim.documents.pages import CODE, HEADING, TABLE, TEXT, Line, Page, Unreadable

# of a page of the web, what is not its text
NOT_TEXT = (
    "script", "style", "noscript", "template", "nav", "header", "footer", "aside", "form", "svg",
    "iframe", "button", "head",
)  # fmt: skip
ROLES = ("navigation", "banner", "contentinfo", "complementary", "search")
FENCE = re.compile(r"^\s{0,3}(```+|~~~+)")
TABLE_LINE = re.compile(r"^\s*\|.*\|\s*$")
PAGE_END = "\f"


def read_markdown(path: Path) -> list[Page]:
    """Return a Markdown file as one page. Raises ``Unreadable``."""
    return [Page(1, lines=list(markdown_lines(_text(path))))]


def read_html(path: Path) -> list[Page]:
    """Return the text of a page of the web, without navigation, headers and footers. Raises
    ``Unreadable``."""
    from bs4 import BeautifulSoup
    from markdownify import MarkdownConverter

    # bytes: the page may name its encoding itself
    soup = BeautifulSoup(_bytes(path), "html.parser")
    for element in soup(NOT_TEXT):
        element.decompose()
    for role in ROLES:
        for element in soup(attrs={"role": role}):
            element.decompose()
    body = soup.find("main") or soup.find("article") or soup.body or soup
    converter = MarkdownConverter(heading_style="ATX", bullets="-", strip=["a", "img"])
    text = converter.convert_soup(body)
    if "\ufffd" in text and text.count("\ufffd") > 0.01 * len(text):
        raise Unreadable("no text in a known encoding")
    return [Page(1, lines=list(markdown_lines(text)))]


def read_plain(path: Path) -> list[Page]:
    """Return a text file; form feeds divide it into pages. Raises ``Unreadable``."""
    pages = []
    for number, text in enumerate(_text(path).split(PAGE_END), 1):
        lines = []
        for paragraph, block in enumerate(re.split(r"\n\s*\n", text)):
            # lines are kept: who wrote plain text has set them
            lines.append(Line(clean(block.strip("\n")), paragraph=paragraph))
        pages.append(Page(number, lines=lines))
    return pages


def _text(path: Path) -> str:
    try:
        return read_text(path)
    except SlimError as error:
        raise Unreadable(str(error).removeprefix(str(path)).lstrip(",: ")) from error


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise Unreadable(error.strerror or str(error)) from error


def markdown_lines(text: str) -> Iterator[Line]:
    """Yield the paragraphs, headings, tables and pieces of code of Markdown text, each as one.

    Args:
        text: with ``#`` headings, tables of ``|``, and code between fences.
    """
    number = 0
    block: list[str] = []
    kind = TEXT
    fence = ""
    for line in [*text.splitlines(), ""]:
        mark = FENCE.match(line)
        if fence:
            block.append(line)
            if mark and line.strip().startswith(fence) and not line.strip().strip(fence[0]):
                fence = ""
                yield from _block(block, CODE, number)
                number += 1
                block = []
                kind = TEXT
            continue
        line_kind = _kind(line)
        if block and (not line.strip() or line_kind != kind or line_kind == HEADING or mark):
            yield from _block(block, kind, number)
            number += 1
            block = []
        if mark:
            fence = mark[1]
            block = [line]
        elif line.strip():
            block.append(line)
            kind = line_kind
    if block:
        yield from _block(block, CODE if fence else kind, number)


def _kind(line: str) -> str:
    if TABLE_LINE.match(line):
        return TABLE
    return HEADING if re.match(r"^#{1,6}\s", line) else TEXT


def _block(block: list[str], kind: str, number: int) -> Iterator[Line]:
    text = clean("\n".join(block)).strip("\n")
    if text.strip():
        yield Line(text, kind, paragraph=number)

"""PowerPoint and Word files, read with python-pptx and python-docx (both MIT)."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from slim.documents.layout import clean
from slim.documents.pages import CODE, HEADING, TABLE, TEXT, Line, Page, Picture, Unreadable
from slim.documents.pdf import MONOSPACED, SMALLEST_PICTURE, markdown_table

CODE_STYLES = ("code", "preformatted", "quelltext", "listing")
COMPOUND_FILE = b"\xd0\xcf\x11\xe0"  # encrypted, or of before 2007


def read_pptx(path: Path, pictures: Path | None = None) -> list[Page]:
    """Return the slides of a PowerPoint file; its own footers, dates and slide numbers are left
    out.

    Args:
        path: the file.
        pictures: folder to save pictures to, as ``NAME.png``; None: they are only described.

    Raises:
        Unreadable: when it cannot be opened.
    """
    from pptx import Presentation

    presentation = _opened(path, Presentation)
    pages = []
    for number, slide in enumerate(presentation.slides, 1):
        page = Page(number, float(presentation.slide_height or 0))
        for shape in _shapes(slide.shapes):
            _read_shape(shape, page, pictures)
        pages.append(page)
    return pages


def _shapes(shapes: Any) -> Iterator[Any]:
    """Yield shapes from top to bottom, those of groups in their place."""
    from pptx.enum.shapes import MSO_SHAPE_TYPE

    def place(shape: Any) -> tuple[bool, int, int]:
        is_title = shape.is_placeholder and shape.placeholder_format.type in _titles()
        return (not is_title, shape.top or 0, shape.left or 0)

    for shape in sorted(shapes, key=place):
        if shape.shape_type == MSO_SHAPE_TYPE.GROUP:
            yield from _shapes(shape.shapes)
        else:
            yield shape


def _titles() -> tuple:
    from pptx.enum.shapes import PP_PLACEHOLDER

    return (PP_PLACEHOLDER.TITLE, PP_PLACEHOLDER.CENTER_TITLE)


def _furniture() -> tuple:
    from pptx.enum.shapes import PP_PLACEHOLDER

    return (
        PP_PLACEHOLDER.FOOTER,
        PP_PLACEHOLDER.HEADER,
        PP_PLACEHOLDER.DATE,
        PP_PLACEHOLDER.SLIDE_NUMBER,
    )


def _read_shape(shape: Any, page: Page, pictures: Path | None) -> None:
    """Add what a shape holds to its page."""
    kind = shape.placeholder_format.type if shape.is_placeholder else None
    if kind in _furniture():
        return
    number = len(page.lines)
    top = float(shape.top or 0)
    bottom = top + float(shape.height or 0)
    if shape.has_text_frame and shape.text_frame.text.strip():
        title = kind in _titles()
        text, line_kind = _frame_text(shape.text_frame, title)
        page.lines.append(Line(text, line_kind, top=top, bottom=bottom, paragraph=number))
    elif getattr(shape, "has_table", False) and shape.has_table:
        table = _table(shape.table)
        page.lines.append(Line(table, TABLE, top=top, bottom=bottom, paragraph=number))
    elif hasattr(shape, "image"):
        picture = _picture(shape, pictures)
        if picture is not None:
            page.pictures.append(picture)


def _table(table: Any) -> str:
    """Return a table of either library as Markdown."""
    rows = []
    for row in table.rows:
        rows.append([cell.text for cell in row.cells])
    return markdown_table(rows)


def _is_monospaced(runs: Any) -> bool:
    """Whether all runs of text are set in a font of fixed width that they name."""
    fonts = []
    for run in runs:
        if run.text.strip():
            fonts.append(run.font.name or "")
    return bool(fonts) and all(map(MONOSPACED.search, fonts))


def _frame_text(frame: Any, is_title: bool) -> tuple[str, str]:
    """Return the text of a text frame, one paragraph a line, and its kind."""
    lines = []
    runs: list = []
    for paragraph in frame.paragraphs:
        text = clean("".join(run.text for run in paragraph.runs) or paragraph.text)
        text = text.replace("\v", "\n")
        if text.strip():
            lines.append("  " * paragraph.level + text)
            runs += paragraph.runs
    if is_title:
        return "# " + " ".join(line.strip() for line in lines), HEADING
    if _is_monospaced(runs):
        return "\n".join(lines), CODE
    return "\n".join(lines), TEXT


def _picture(shape: Any, folder: Path | None) -> Picture | None:
    """Describe a picture, and save it to ``folder``; None for icons and what is no picture."""
    try:
        image = shape.image
        width, height = image.size
    except (ValueError, KeyError, OSError, AttributeError):  # linked, or in a form Pillow lacks
        return None
    if min(width, height) < SMALLEST_PICTURE:
        return None
    picture = Picture(width, height, hashlib.sha256(image.blob).hexdigest())
    if folder is not None:
        _save(image.blob, folder / f"{picture.name}.png")
    return picture


def _save(content: bytes, path: Path) -> None:
    """Save a picture as PNG, where Pillow can read it."""
    import io

    from PIL import Image

    if path.is_file():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        Image.open(io.BytesIO(content)).convert("RGB").save(path)
    except (OSError, ValueError):
        return


def read_docx(path: Path, pictures: Path | None = None) -> list[Page]:
    """Return the pages of a Word file, as far as it says where they end; headers and footers are
    left out.

    Args:
        path: the file.
        pictures: as for :func:`read_pptx`.

    Raises:
        Unreadable: when it cannot be opened.
    """
    from docx import Document
    from docx.table import Table

    document = _opened(path, Document)
    pages = [Page(1)]
    for item in document.iter_inner_content():
        page = pages[-1]
        if isinstance(item, Table):
            page.lines.append(Line(_table(item), TABLE, paragraph=len(page.lines)))
            continue
        line = _paragraph(item, len(page.lines))
        if _begins_page(item) and (page.lines or page.pictures):
            page = Page(len(pages) + 1)
            pages.append(page)
        if line is not None:
            page.lines.append(line)
        page.pictures += _docx_pictures(item, document, pictures)
    return pages


def _begins_page(paragraph: Any) -> bool:
    """Whether a page ends before a paragraph or within it."""
    if paragraph.paragraph_format.page_break_before or paragraph.rendered_page_breaks:
        return True
    return 'w:type="page"' in paragraph._p.xml


def _paragraph(paragraph: Any, number: int) -> Line | None:
    """Return a paragraph as a line; None for an empty one."""
    text = clean(paragraph.text)
    if not text.strip():
        return None
    style = (paragraph.style.name or "").lower() if paragraph.style is not None else ""
    if _is_monospaced(paragraph.runs) or any(name in style for name in CODE_STYLES):
        return Line(text, CODE, paragraph=-1)  # paragraphs of code belong together
    if style.startswith(("heading", "überschrift", "title", "titel")):
        level = int(style[-1]) if style[-1].isdigit() else 1
        return Line("#" * level + " " + text.strip(), HEADING, paragraph=number)
    if style.startswith("list"):
        return Line("- " + text.strip(), TEXT, paragraph=-2)
    return Line(text, TEXT, paragraph=number)


def _docx_pictures(paragraph: Any, document: Any, folder: Path | None) -> list[Picture]:
    """Return the pictures of a paragraph."""
    pictures = []
    for blip in paragraph._p.xpath(".//a:blip/@r:embed"):
        part = document.part.related_parts.get(blip)
        try:
            width, height = part.image.px_width, part.image.px_height
        except (AttributeError, ValueError, KeyError):
            continue
        except Exception:  # the library's own errors for forms that it does not know
            continue
        if min(width, height) < SMALLEST_PICTURE:
            continue
        picture = Picture(width, height, hashlib.sha256(part.blob).hexdigest())
        if folder is not None:
            _save(part.blob, folder / f"{picture.name}.png")
        pictures.append(picture)
    return pictures


def _opened(path: Path, library: Any) -> Any:
    """Open a file with its library. Raises ``Unreadable``."""
    with path.open("rb") as file:
        start = file.read(4)
    if not start:
        raise Unreadable("empty file")
    if start == COMPOUND_FILE:
        raise Unreadable(
            "encrypted or of before 2007: save it without a password as .pptx or .docx"
        )
    try:
        return library(str(path))
    except Exception as error:  # zip, XML and the libraries' own errors for one thing
        raise Unreadable(f"damaged or another kind of file ({type(error).__name__})") from error

"""PDF files, read with PDFium (Apache-2.0 and BSD): text with its place, pictures, pages as images.

Tables with ruled lines are found by pdfplumber (MIT), which is far slower and therefore asked only
about pages with lines drawn on them."""

from __future__ import annotations

import ctypes
import hashlib
import logging
import math
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median

from slim.documents.layout import clean, in_lines, in_reading_order
from slim.documents.pages import CODE, TABLE, Line, Page, Picture, Unreadable

SMALLEST_PICTURE = 48  # pixels of the shorter side; smaller ones are bullets and icons
LEAST_DRAWN = 4  # paths on a page that may be the lines of a table
DPI = 300  # of pages rendered for OCR
LARGEST_SIDE = 5000  # pixels of a rendered page
FEW_CHARACTERS = 25  # a page with fewer, and a picture, is a scan
SCAN_SHARE = 0.4  # of the page's area that the picture of a scan covers
OUTLINES = 50  # paths on a page without text, which are then letters
SCAN = "scan"  # problem of a page that has to be read by OCR
ANGLE_SAMPLES = 200  # characters that tell at which angle a page is written
LEVEL = 15  # degrees by which text may slant
CHARACTERS_A_PAGE = 100_000  # more are no page that anybody reads

MONOSPACED = re.compile(r"courier|mono|consol|menlo|typewriter|cmtt|inconsolata", re.IGNORECASE)
FIXED_PITCH = 1  # PDF 32000-1, table 123
SAME_BASELINE = 0.5  # of a character's height
GAP = 1.2  # of a character's height, that ends a piece


@contextmanager
def opened(path: Path) -> Iterator:
    """Open a PDF.

    Args:
        path: the file.

    Yields:
        The document, as pypdfium2 has it.

    Raises:
        Unreadable: when it is encrypted, damaged or empty.
    """
    import pypdfium2

    if path.stat().st_size == 0:
        raise Unreadable("empty file")
    try:
        document = pypdfium2.PdfDocument(path)
    except pypdfium2.PdfiumError as error:
        if "password" in str(error).lower():
            raise Unreadable("encrypted: save it without a password") from error
        raise Unreadable(f"damaged or no PDF ({_reason(error)})") from error
    try:
        yield document
    finally:
        document.close()


def _reason(error: Exception) -> str:
    """Return PDFium's reason without what the library puts around it."""
    reason = str(error).rstrip(".").rpartition("PDFium: ")[2]
    return reason.rstrip(")") or type(error).__name__


def count_pages(path: Path) -> int:
    """Return the number of pages. Raises ``Unreadable`` as :func:`opened` does."""
    with opened(path) as document:
        pages = len(document)
    if not pages:
        raise Unreadable("no pages")
    return pages


def read_pages(path: Path, numbers: range, pictures: Path | None = None) -> Iterator[Page]:
    """Yield pages of a PDF with their text; scans have none.

    Args:
        path: the file.
        numbers: of the pages, from 1.
        pictures: folder to save pictures to, as ``NAME.png``; None: they are only described.
    """
    with opened(path) as document:
        tables = _Tables(path)
        for number in numbers:
            yield _page(document, number, tables, pictures)
        tables.close()


def _page(document, number: int, tables: _Tables, pictures: Path | None) -> Page:
    import pypdfium2

    try:
        page = document[number - 1]
        width, height = page.get_size()
        textpage = page.get_textpage()
    except pypdfium2.PdfiumError as error:
        return Page(number, problem=f"damaged page ({_reason(error)})")
    if textpage.count_chars() > CHARACTERS_A_PAGE:
        return Page(number, height, problem=f"more than {CHARACTERS_A_PAGE} characters")
    angle = _reading_angle(textpage)
    if page.get_rotation() in (90, 270):  # places are those of the page as it is stored
        width, height = height, width
    result = Page(number, width if angle in (90, 270) else height)
    pieces = list(_pieces(textpage, angle, width, height, result))
    ruled = []
    if angle == 0 and page.get_rotation() == 0 and _drawn(page) >= LEAST_DRAWN:
        ruled = tables.on(number)
        pieces = [piece for piece in pieces if not any(_inside(piece, table) for table in ruled)]
    lines = in_lines(pieces)
    _indent_code(lines)
    result.lines = _with_tables(in_reading_order(lines), ruled)
    if _is_scan(page, result, width, height):
        result.problem = SCAN
    else:
        result.pictures = list(_pictures(page, pictures))
    textpage.close()
    page.close()
    return result


def _reading_angle(textpage) -> int:
    """Return the angle at which most of a page's text stands: 0, 90, 180 or 270 degrees."""
    import pypdfium2.raw as pdfium

    count = textpage.count_chars()
    angles: Counter[int] = Counter()
    for index in range(0, count, max(1, count // ANGLE_SAMPLES)):
        angle = _angle(pdfium, textpage, index)
        if angle is not None and pdfium.FPDFText_IsGenerated(textpage, index) != 1:
            angles[angle] += 1
    return angles.most_common(1)[0][0] if angles else 0


def _angle(pdfium, textpage, index: int) -> int | None:
    """Return the angle of a character in degrees counterclockwise; None where that is not near 0,
    90, 180 or 270."""
    degrees = -math.degrees(pdfium.FPDFText_GetCharAngle(textpage, index))
    nearest = round(degrees / 90) * 90
    if abs(degrees - nearest) > LEVEL:
        return None
    return nearest % 360


def _pieces(textpage, angle: int, width: float, height: float, page: Page) -> Iterator[Line]:
    """Yield runs of characters that stand on one line without a wide gap.

    Args:
        textpage: of PDFium.
        angle: of the text that is read; what stands at another one is counted in ``page``.
        width: of the page as it is stored, in points.
        height: as ``width``.
        page: its ``askew`` grows.
    """
    import pypdfium2.raw as pdfium

    turned = _turner(angle, width, height)
    piece: Line | None = None
    for index in range(textpage.count_chars()):
        character = pdfium.FPDFText_GetUnicode(textpage, index)
        if character in (10, 13):  # where PDFium sees a line's end
            if piece is not None:
                yield _cleaned(piece)
            piece = None
            continue
        if pdfium.FPDFText_IsGenerated(textpage, index) == 1:
            if piece is not None:
                piece.text += " "
            continue
        if _angle(pdfium, textpage, index) != angle:
            page.askew += 1
            continue
        left, top, right, bottom = turned(*textpage.get_charbox(index, loose=True))
        if piece is not None and _continues(piece, left, top, bottom):
            piece.text += chr(character)
            piece.right = max(piece.right, right)
            continue
        if piece is not None:
            yield _cleaned(piece)
        kind = CODE if _is_monospaced(pdfium, textpage, index) else "text"
        piece = Line(chr(character), kind, left, top, right, bottom)
    if piece is not None:
        yield _cleaned(piece)


def _cleaned(piece: Line) -> Line:
    piece.text = clean(piece.text)
    return piece


def _continues(piece: Line, left: float, top: float, bottom: float) -> bool:
    """Whether a character at this place follows a piece on its line."""
    height = max(piece.height, 1e-6)
    if abs(top - piece.top) > SAME_BASELINE * height or bottom - top < 0:
        return False
    return -height < left - piece.right < GAP * height


def _turner(angle: int, width: float, height: float):
    """Return what turns a box of the page as it is stored so that text at ``angle`` is level, with
    places from the top.

    Args:
        angle: degrees counterclockwise.
        width: of the page as it is stored, in points.
        height: as ``width``.
    """

    def turned(left: float, bottom: float, right: float, top: float) -> tuple[float, ...]:
        if angle == 90:
            return bottom, left, top, right
        if angle == 180:
            return width - right, bottom, width - left, top
        if angle == 270:
            return height - top, width - right, height - bottom, width - left
        return left, height - top, right, height - bottom

    return turned


def _is_monospaced(pdfium, textpage, index: int) -> bool:
    """Whether a character is set in a font of fixed width."""
    name = ctypes.create_string_buffer(128)
    flags = ctypes.c_int()
    pdfium.FPDFText_GetFontInfo(textpage, index, name, 128, ctypes.byref(flags))
    is_named = MONOSPACED.search(name.value.decode("utf-8", "replace")) is not None
    return is_named or bool(flags.value & FIXED_PITCH)


def _indent_code(lines: list[Line]) -> None:
    """Give lines of code the spaces that their place on the page stands for; a line of code alone
    becomes text, being a word or a name."""
    run: list[Line] = []
    for line in [*lines, Line("")]:
        if line.kind == CODE:
            run.append(line)
            continue
        if len(run) == 1:
            run[0].kind = "text"
        elif run:
            start = min(line.left for line in run)
            width = median(
                (line.right - line.left) / max(len(line.text.strip()), 1) for line in run
            )
            for code in run:
                spaces = round((code.left - start) / max(width, 1e-6))
                code.text = " " * spaces + code.text.strip()
        run = []


def _drawn(page) -> int:
    """Count the paths drawn on a page, up to the number that matters."""
    import pypdfium2.raw as pdfium

    count = 0
    for _ in page.get_objects(filter=[pdfium.FPDF_PAGEOBJ_PATH], max_depth=2):
        count += 1
        if count == LEAST_DRAWN:
            break
    return count


class _Tables:
    """Finds the tables of a PDF. The file is opened a second time at the first question."""

    def __init__(self, path: Path):
        self.path = path
        self._document = None

    def on(self, number: int) -> list[Line]:
        """Return the tables with ruled lines on a page, as Markdown."""
        import pdfplumber

        logging.getLogger("pdfminer").setLevel(logging.ERROR)
        try:
            if self._document is None:
                self._document = pdfplumber.open(self.path)
            page = self._document.pages[number - 1]
            tables = []
            for table in page.find_tables():
                rows = table.extract()
                if len(rows) < 2 or max(len(row) for row in rows) < 2:
                    continue  # a frame around text
                left, top, right, bottom = table.bbox
                tables.append(Line(markdown_table(rows), TABLE, left, top, right, bottom, right))
            page.close()
        except Exception:  # pdfminer raises whatever a broken file leads to; the text is there
            return []
        return tables

    def close(self) -> None:
        if self._document is not None:
            self._document.close()


def markdown_table(rows: list[list[str | None]]) -> str:
    """Return rows of cells as a Markdown table whose first row is the heading.

    Args:
        rows: of equal or different length; None is an empty cell.
    """
    columns = max(len(row) for row in rows)
    lines = []
    for number, row in enumerate(rows):
        cells = [clean(" ".join((cell or "").split())).replace("|", "\\|") for cell in row]
        cells += [""] * (columns - len(cells))
        lines.append("| " + " | ".join(cells) + " |")
        if number == 0:
            lines.append("|" + " --- |" * columns)
    return "\n".join(lines)


def _inside(piece: Line, table: Line) -> bool:
    middle = (piece.left + piece.right) / 2
    height = (piece.top + piece.bottom) / 2
    return table.left <= middle <= table.right and table.top <= height <= table.bottom


def _with_tables(lines: list[Line], tables: list[Line]) -> list[Line]:
    """Return lines with each table before the first line below it."""
    ordered = list(lines)
    for table in tables:
        place = len(ordered)
        for index, line in enumerate(ordered):
            overlaps = line.left < table.right and line.right > table.left
            if overlaps and line.top >= table.bottom - 1:
                place = index
                break
        ordered.insert(place, table)
    return ordered


def _pictures(page, folder: Path | None) -> Iterator[Picture]:
    """Yield the pictures on a page, and save them to ``folder``."""
    import pypdfium2
    import pypdfium2.raw as pdfium

    seen = set()
    for picture in page.get_objects(filter=[pdfium.FPDF_PAGEOBJ_IMAGE], max_depth=3):
        try:
            pixels = picture.get_px_size()
            name = hashlib.sha256(bytes(picture.get_data())).hexdigest()
            if min(pixels) < SMALLEST_PICTURE or name in seen:
                continue
            seen.add(name)
            if folder is not None and not (folder / f"{name}.png").is_file():
                folder.mkdir(parents=True, exist_ok=True)
                picture.get_bitmap().to_pil().convert("RGB").save(folder / f"{name}.png")
        except (pypdfium2.PdfiumError, OSError, ValueError):
            continue  # a picture in a form that PDFium does not know
        yield Picture(*pixels, name)


def _is_scan(shown, page: Page, width: float, height: float) -> bool:
    """Whether a page has hardly any text, and something to see."""
    import pypdfium2.raw as pdfium

    characters = sum(len(line.text.strip()) for line in page.lines)
    if characters >= FEW_CHARACTERS:
        return False
    covered = 0.0
    for picture in shown.get_objects(filter=[pdfium.FPDF_PAGEOBJ_IMAGE], max_depth=3):
        left, bottom, right, top = picture.get_bounds()
        covered += abs((right - left) * (top - bottom))
    # letters drawn as outlines are text that only OCR can read
    outlines = sum(1 for _ in shown.get_objects(filter=[pdfium.FPDF_PAGEOBJ_PATH], max_depth=3))
    return covered > SCAN_SHARE * width * height or (characters == 0 and outlines > OUTLINES)


def rendered(path: Path, number: int):
    """Return a page as a gray Pillow image of ``DPI`` dots per inch, less where that were huge.

    Args:
        path: the file.
        number: of the page, from 1.
    """
    with opened(path) as document:
        page = document[number - 1]
        scale = min(DPI / 72, LARGEST_SIDE / max(page.get_size()))
        return page.render(scale=scale, grayscale=True).to_pil().convert("L")

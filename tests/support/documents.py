"""Documents made for tests: PDFs with what may be in them, slides, Word files, scans."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

from reportlab.lib.pagesizes import A4
from reportlab.lib.utils import simpleSplit
from reportlab.pdfgen.canvas import Canvas

WIDTH, HEIGHT = A4
MARGIN = 72
SENTENCES = [
    "Die Größe einer Übung hängt von der Zahl der Aufgaben ab.",
    "Straßen und Brücken gehören zum Verkehrsnetz einer Stadt.",
    "Ein Modell lernt aus Beispielen, die jemand ausgewählt hat.",
    "Der Lärm am Fluss störte die Gäste während der Vorlesung.",
    "Große Häuser brauchen im Winter mehr Wärme als kleine.",
    "Am Ende des Semesters schreiben alle eine schriftliche Prüfung.",
    "Jede Messung enthält einen Fehler, der sich schätzen lässt.",
    "Über den Äckern kreisen im Frühling viele Vögel.",
]


def pdf(path: Path, draw: Iterable[Callable[[Canvas], None]], size=A4, **settings) -> Path:
    """Write a PDF, one page for each function that draws."""
    path.parent.mkdir(parents=True, exist_ok=True)
    canvas = Canvas(str(path), pagesize=size, invariant=1, **settings)
    for page in draw:
        page(canvas)
        canvas.showPage()
    canvas.save()
    return path


def column(
    canvas: Canvas,
    text: str,
    left: float = MARGIN,
    top: float = HEIGHT - 150,
    width: float = WIDTH - 2 * MARGIN,
    font: str = "Helvetica",
    size: float = 11,
) -> None:
    """Draw a text in lines of at most ``width`` points, as a typesetter breaks them."""
    canvas.setFont(font, size)
    for line in simpleSplit(text, font, size, width):
        canvas.drawString(left, top, line)
        top -= 1.3 * size


def text_pdf(path: Path, texts: list[str], header: str = "", footer: str = "", **settings) -> Path:
    """Write a PDF with a text on each page, and the same header and footer on all; ``{}`` in them
    stands for the page's number."""

    def page(number: int, text: str) -> Callable[[Canvas], None]:
        def draw(canvas: Canvas) -> None:
            canvas.setFont("Helvetica", 9)
            canvas.drawString(MARGIN, HEIGHT - 40, header.format(number))
            canvas.drawString(MARGIN, 30, footer.format(number))
            column(canvas, text)

        return draw

    pages = [page(number, text) for number, text in enumerate(texts, 1)]
    return pdf(path, pages, **settings)


def scan_pdf(path: Path, source: Path, angle: float = 0.0, noise: float = 8.0) -> Path:
    """Write a PDF whose pages are images of another one's, turned by ``angle`` degrees, as a
    scanner leaves them."""
    import numpy
    import pypdfium2
    from PIL import Image

    images = []
    document = pypdfium2.PdfDocument(source)
    random = numpy.random.default_rng(0)
    for page in document:
        image = page.render(scale=200 / 72, grayscale=True).to_pil().convert("L")
        image = image.rotate(angle, Image.Resampling.BICUBIC, fillcolor=255)
        pixels = numpy.asarray(image, dtype=numpy.float32)
        pixels = pixels + random.normal(0, noise, pixels.shape)
        images.append(Image.fromarray(pixels.clip(0, 255).astype(numpy.uint8)))
    document.close()
    images[0].save(path, "PDF", resolution=200, save_all=True, append_images=images[1:])
    return path


def edits(first: str, second: str) -> int:
    """Return the Levenshtein distance of two texts."""
    row = list(range(len(second) + 1))
    for i, a in enumerate(first, 1):
        diagonal, row[0] = row[0], i
        for j, b in enumerate(second, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (a != b))
    return row[-1]

"""Scanned pages, read with Tesseract through pytesseract (both Apache-2.0)."""

from __future__ import annotations

import re
import shutil
from typing import TYPE_CHECKING

from slim.core.errors import SlimError
from slim.documents.layout import clean
from slim.documents.pages import Line, Page

if TYPE_CHECKING:
    from PIL.Image import Image

PROGRAM = "tesseract"
SECONDS = 180  # for one page
LEAST_CONFIDENCE = 30  # per cent; words below are specks
LARGEST_ANGLE = 10.0  # degrees that a page may be askew
COARSE, FINE = 1.0, 0.1  # degrees between two tries
SMALL_SIDE = 800  # pixels, for finding the angle
STRAIGHT = 0.15  # degrees that Tesseract does not mind


def require_tesseract(languages: str) -> None:
    """Require the program and its languages.

    Args:
        languages: as Tesseract names them, such as ``deu+eng``.

    Raises:
        SlimError: with the line that installs what is missing.
    """
    if shutil.which(PROGRAM) is None:
        raise SlimError(
            f"Scanned pages need Tesseract: apt-get install {_packages(languages)} (macOS: brew "
            "install tesseract tesseract-lang).\nOr leave such pages out with --ocr never "
            "(data.ocr=never)."
        )
    import pytesseract

    known = pytesseract.get_languages()
    missing = [name for name in languages.split("+") if name not in known]
    if missing:
        raise SlimError(
            f"Tesseract has no language {', '.join(missing)} (has: {', '.join(known)}). Install "
            f"it: apt-get install {_packages('+'.join(missing))}"
        )


def _packages(languages: str) -> str:
    """Return Debian's packages for the program and its languages."""
    names = [f"tesseract-ocr-{name.replace('_', '-')}" for name in languages.split("+")]
    return " ".join(["tesseract-ocr", *names])


def read_scan(image: Image, number: int, languages: str) -> Page:
    """Read a page from its image.

    Args:
        image: gray, 300 dots per inch or so.
        number: of the page.
        languages: as Tesseract names them.

    Returns:
        The page with Tesseract's paragraphs; ``problem`` says why nothing could be read.
    """
    import pytesseract

    image = straightened(image)
    try:
        table = pytesseract.image_to_data(
            image, lang=languages, timeout=SECONDS, output_type=pytesseract.Output.DICT
        )
    except RuntimeError as error:  # the library's error for a timeout, and Tesseract's own
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        return Page(number, problem=f"OCR failed: {reason}")
    page = Page(number, float(image.height))
    confidences = []
    last = None
    for index, word in enumerate(table["text"]):
        confidence = float(table["conf"][index])
        if not word.strip() or confidence < LEAST_CONFIDENCE:
            continue
        confidences.append(confidence)
        left = float(table["left"][index])
        top = float(table["top"][index])
        right = left + table["width"][index]
        bottom = top + table["height"][index]
        paragraph = 1000 * table["block_num"][index] + table["par_num"][index]
        place = (paragraph, table["line_num"][index])
        if place != last:
            page.lines.append(Line(clean(word), "text", left, top, right, bottom, 0.0, paragraph))
        else:
            line = page.lines[-1]
            line.text += " " + clean(word)
            line.right = max(line.right, right)
            line.top = min(line.top, top)
            line.bottom = max(line.bottom, bottom)
        last = place
    # a page of specks gives single letters and signs
    if not re.search(r"\w{2}", " ".join(line.text for line in page.lines)):
        return Page(number, problem="nothing that OCR can read")
    page.confidence = round(sum(confidences) / len(confidences), 1)
    return page


def straightened(image: Image) -> Image:
    """Return a page turned so that its lines are level.

    Args:
        image: gray; white is the paper.
    """
    angle = skew(image)
    if abs(angle) < STRAIGHT:
        return image
    from PIL import Image as images

    return image.rotate(angle, images.Resampling.BICUBIC, expand=True, fillcolor=255)


def skew(image: Image) -> float:
    """Return by how many degrees a page has to be turned, counterclockwise, so that its lines are
    level: at that angle the rows of pixels differ most in darkness (Postl's projection profile).

    Args:
        image: gray; white is the paper.
    """
    small = image.copy()
    small.thumbnail((SMALL_SIDE, SMALL_SIDE))
    angle = _best_angle(small, 0.0, LARGEST_ANGLE, COARSE)
    return _best_angle(small, angle, COARSE, FINE)


def _best_angle(image: Image, center: float, reach: float, step: float) -> float:
    """Return the angle around ``center`` at which the rows of pixels differ most."""
    import numpy

    best = (-1.0, 0.0)
    for index in range(-round(reach / step), round(reach / step) + 1):
        angle = center + index * step
        pixels = numpy.asarray(image.rotate(angle, fillcolor=255), dtype=numpy.float32)
        rows = pixels.mean(axis=1)
        score = float(((rows[1:] - rows[:-1]) ** 2).sum())
        if score > best[0]:
            best = (score, angle)
    return best[1]

"""Pages that are images, through Tesseract; skipped where it is missing."""

from __future__ import annotations

import shutil

import pytest

from slim.core.errors import SlimError
from slim.documents import ocr
from slim.documents.layout import page_text
from slim.documents.pages import Page
from slim.documents.pdf import rendered
from tests.support.documents import SENTENCES, edits, scan_pdf, text_pdf

TEXT = " ".join(SENTENCES)


def has_language(name: str) -> bool:
    if shutil.which(ocr.PROGRAM) is None:
        return False
    import pytesseract

    return name in pytesseract.get_languages()


needs_tesseract = pytest.mark.skipif(
    not has_language("deu"), reason="apt-get install tesseract-ocr tesseract-ocr-deu"
)


def error_rate(tmp_path, angle: float) -> float:
    source = text_pdf(tmp_path / "text.pdf", [TEXT])
    scan = scan_pdf(tmp_path / "scan.pdf", source, angle)
    image = rendered(scan, 1)
    image = image.crop((0, 0, image.width, image.height // 2))
    text = page_text(ocr.read_scan(image, 1, "deu").lines)
    return edits(text, TEXT) / len(TEXT)


@needs_tesseract
def test_a_scan_askew_is_read_almost_without_an_error(tmp_path):
    assert error_rate(tmp_path, 4.0) < 0.01


@needs_tesseract
@pytest.mark.slow
@pytest.mark.parametrize("angle", [-9.0, -2.0, 0.0, 1.0, 7.0])
def test_any_angle_up_to_ten_degrees_is_put_straight(tmp_path, angle):
    assert error_rate(tmp_path, angle) < 0.01


@pytest.mark.parametrize("angle", [-7.0, 0.0, 3.0])
def test_the_angle_is_found(tmp_path, angle):
    source = text_pdf(tmp_path / "text.pdf", [TEXT])
    image = rendered(source, 1).reduce(3).rotate(angle, fillcolor=255)
    assert ocr.skew(image) == pytest.approx(-angle, abs=0.2)


def test_without_tesseract_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setattr(ocr, "PROGRAM", "no-such-program")
    with pytest.raises(
        SlimError, match=r"apt-get install tesseract-ocr tesseract-ocr-deu tesseract-ocr-eng"
    ):
        ocr.require_tesseract("deu+eng")


@needs_tesseract
def test_a_language_that_is_missing_is_named():
    with pytest.raises(SlimError, match="has no language xyz.*tesseract-ocr-xyz"):
        ocr.require_tesseract("deu+xyz")


@needs_tesseract
def test_a_page_of_specks_has_nothing_to_read():
    from PIL import Image

    page = ocr.read_scan(Image.new("L", (600, 800), 255), 3, "deu")
    assert page == Page(3, problem="nothing that OCR can read")

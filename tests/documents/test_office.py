"""PowerPoint and Word files made here, and what is read from them."""

from __future__ import annotations

import io

import pytest

from slim.documents import office
from slim.documents.layout import page_text
from slim.documents.pages import Unreadable


@pytest.fixture
def slides(tmp_path):
    from PIL import Image
    from pptx import Presentation
    from pptx.util import Inches

    picture = io.BytesIO()
    Image.new("RGB", (200, 100), "green").save(picture, "PNG")
    presentation = Presentation()
    for title, points in (("Größen", ["Länge", "Masse"]), ("Einheiten", ["Meter", "Gramm"])):
        slide = presentation.slides.add_slide(presentation.slide_layouts[1])
        slide.shapes.title.text = title
        frame = slide.placeholders[1].text_frame
        frame.text = points[0]
        frame.add_paragraph().text = points[1]
        frame.paragraphs[1].level = 1
    table = slide.shapes.add_table(2, 2, Inches(1), Inches(5), Inches(4), Inches(1)).table
    for row, cells in enumerate((("Name", "Zeichen"), ("Meter", "m"))):
        for number, text in enumerate(cells):
            table.cell(row, number).text = text
    code = slide.shapes.add_textbox(Inches(1), Inches(6), Inches(4), Inches(1)).text_frame
    run = code.paragraphs[0].add_run()
    run.text = "print(1)"
    run.font.name = "Courier New"
    picture.seek(0)
    slide.shapes.add_picture(picture, Inches(6), Inches(5))
    presentation.save(tmp_path / "a.pptx")
    return tmp_path / "a.pptx"


def test_slides_have_title_points_table_and_code(slides):
    pages = office.read_pptx(slides)
    assert [page_text(page.lines) for page in pages] == [
        "# Größen\n\nLänge\n  Masse",
        "# Einheiten\n\nMeter\n  Gramm\n\n| Name | Zeichen |\n| --- | --- |\n| Meter | m |\n\n"
        "```\nprint(1)\n```",
    ]


def test_a_slides_picture_is_described_and_saved(slides, tmp_path):
    pages = office.read_pptx(slides, tmp_path / "pictures")
    [picture] = pages[1].pictures
    assert (picture.width, picture.height) == (200, 100)
    assert (tmp_path / "pictures" / f"{picture.name}.png").is_file()


@pytest.fixture
def letter(tmp_path):
    from docx import Document

    document = Document()
    document.sections[0].header.paragraphs[0].text = "Briefkopf"
    document.add_heading("Über Maße", 1)
    document.add_paragraph("Ein Absatz über Länge.")
    for text in ("erstens", "zweitens"):
        document.add_paragraph(text, style="List Bullet")
    table = document.add_table(2, 2)
    for row, cells in enumerate((("a", "b"), ("1", "2"))):
        for number, text in enumerate(cells):
            table.cell(row, number).text = text
    document.add_page_break()
    for text in ("x = 1", "y = 2"):
        document.add_paragraph().add_run(text).font.name = "Consolas"
    document.save(tmp_path / "a.docx")
    return tmp_path / "a.docx"


def test_a_letter_has_its_pages_without_the_header(letter):
    pages = office.read_docx(letter)
    assert [page_text(page.lines) for page in pages] == [
        "# Über Maße\n\nEin Absatz über Länge.\n\n- erstens\n- zweitens\n\n"
        "| a | b |\n| --- | --- |\n| 1 | 2 |",
        "```\nx = 1\ny = 2\n```",
    ]


@pytest.mark.parametrize("read", [office.read_pptx, office.read_docx])
@pytest.mark.parametrize(
    "content, reason",
    [(b"", "empty file"), (b"PK\x03\x04 no zip", "damaged"), (office.COMPOUND_FILE, "encrypted")],
)
def test_what_cannot_be_read_says_why(tmp_path, read, content, reason):
    path = tmp_path / "a.bin"
    path.write_bytes(content)
    with pytest.raises(Unreadable, match=reason):
        read(path)

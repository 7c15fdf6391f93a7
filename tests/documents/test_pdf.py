"""PDFs made here, and what is read from them: nothing lost, nothing added, in order."""

from __future__ import annotations

import pytest

from slim.documents import pdf
from slim.documents.layout import page_text
from slim.documents.pages import Unreadable
from tests.support.documents import HEIGHT, SENTENCES, WIDTH, column, text_pdf
from tests.support.documents import pdf as write

LEFT = " ".join(SENTENCES[:4])
RIGHT = " ".join(SENTENCES[4:])


def texts(path) -> list[str]:
    numbers = range(1, pdf.count_pages(path) + 1)
    return [page_text(page.lines) for page in pdf.read_pages(path, numbers)]


def test_text_comes_back_with_its_umlauts_and_without_line_breaks(tmp_path):
    path = text_pdf(tmp_path / "a.pdf", [LEFT, RIGHT])
    assert texts(path) == [LEFT, RIGHT]


def test_two_columns_are_read_one_after_the_other(tmp_path):
    def page(canvas):
        canvas.setFont("Helvetica-Bold", 16)
        canvas.drawString(72, HEIGHT - 100, "Ein Titel, der über beiden Spalten steht")
        column(canvas, LEFT, 72, HEIGHT - 150, 210)
        column(canvas, RIGHT, 310, HEIGHT - 150, 210)

    expected = f"Ein Titel, der über beiden Spalten steht\n\n{LEFT}\n\n{RIGHT}"
    assert texts(write(tmp_path / "a.pdf", [page])) == [expected]


def test_three_columns_and_text_below_them(tmp_path):
    def page(canvas):
        for number in range(3):
            text = " ".join(SENTENCES[2 * number : 2 * number + 2])
            column(canvas, text, 60 + 170 * number, HEIGHT - 150, 140)
        column(canvas, RIGHT, top=HEIGHT - 350)

    expected = [" ".join(SENTENCES[2 * number : 2 * number + 2]) for number in range(3)]
    assert texts(write(tmp_path / "a.pdf", [page])) == ["\n\n".join([*expected, RIGHT])]


def test_a_divided_word_is_put_together(tmp_path):
    def page(canvas):
        canvas.setFont("Helvetica", 11)
        lines = ("Die Vorlesung über die Grundlagen der Daten-", "verarbeitung findet heute statt.")
        for number, line in enumerate(lines):
            canvas.drawString(72, 700 - 14 * number, line)

    expected = "Die Vorlesung über die Grundlagen der Datenverarbeitung findet heute statt."
    assert texts(write(tmp_path / "a.pdf", [page])) == [expected]


def test_bullets_keep_their_lines(tmp_path):
    def page(canvas):
        canvas.setFont("Helvetica", 18)
        for number, line in enumerate(("• Daten sammeln", "• Modell anpassen", "• Messen")):
            canvas.drawString(72, 600 - 24 * number, line)

    assert texts(write(tmp_path / "a.pdf", [page])) == [
        "• Daten sammeln\n• Modell anpassen\n• Messen"
    ]


def table_and_code(canvas):
    column(canvas, SENTENCES[0])
    for place in (72, 200, 330):
        canvas.line(place, 600, place, 640)
    for place in (600, 620, 640):
        canvas.line(72, place, 330, place)
    canvas.setFont("Helvetica", 10)
    cells = {"Größe": (76, 625), "Wert": (204, 625), "Länge": (76, 605), "3 m": (204, 605)}
    for text, place in cells.items():
        canvas.drawString(*place, text)
    column(canvas, SENTENCES[1], top=560)
    canvas.setFont("Courier", 10)
    for number, (indent, text) in enumerate(((0, "for x in y:"), (4, "print(x)"), (0, "done()"))):
        canvas.drawString(72 + 6 * indent, 500 - 12 * number, text)
    column(canvas, SENTENCES[2], top=440)


def test_a_table_and_code_stand_where_they_were(tmp_path):
    expected = "\n\n".join(
        [
            SENTENCES[0],
            "| Größe | Wert |\n| --- | --- |\n| Länge | 3 m |",
            SENTENCES[1],
            "```\nfor x in y:\n    print(x)\ndone()\n```",
            SENTENCES[2],
        ]
    )
    assert texts(write(tmp_path / "a.pdf", [table_and_code])) == [expected]


@pytest.mark.parametrize("rotation", [90, 180, 270])
def test_a_turned_page_reads_as_if_it_were_not(tmp_path, rotation):
    import pypdfium2

    document = pypdfium2.PdfDocument(text_pdf(tmp_path / "a.pdf", [LEFT]))
    document[0].set_rotation(rotation)
    document.save(tmp_path / "turned.pdf")
    document.close()
    assert texts(tmp_path / "turned.pdf") == [LEFT]


@pytest.mark.parametrize("angle", [90, 180, 270])
def test_a_page_written_at_an_angle_is_read(tmp_path, angle):
    def page(canvas):
        canvas.translate(WIDTH / 2, HEIGHT / 2)
        canvas.rotate(angle)
        column(canvas, LEFT, -200, 100, 400)

    assert texts(write(tmp_path / "a.pdf", [page])) == [LEFT]


def test_a_stamp_across_the_page_is_left_out_and_counted(tmp_path):
    def page(canvas):
        column(canvas, LEFT)
        canvas.translate(100, 100)
        canvas.rotate(45)
        canvas.drawString(0, 0, "ENTWURF")

    [page] = pdf.read_pages(write(tmp_path / "a.pdf", [page]), range(1, 2))
    assert (page_text(page.lines), page.askew) == (LEFT, 7)


def test_a_picture_is_described_by_its_size(tmp_path):
    from PIL import Image

    Image.new("RGB", (120, 80), "red").save(tmp_path / "p.png")
    Image.new("RGB", (16, 16), "blue").save(tmp_path / "icon.png")

    def page(canvas):
        column(canvas, LEFT)
        canvas.drawImage(str(tmp_path / "p.png"), 72, 300, 120, 80)
        canvas.drawImage(str(tmp_path / "icon.png"), 300, 300, 16, 16)

    [page] = pdf.read_pages(write(tmp_path / "a.pdf", [page]), range(1, 2), tmp_path / "out")
    assert [(picture.width, picture.height) for picture in page.pictures] == [(120, 80)]
    saved = Image.open(tmp_path / "out" / f"{page.pictures[0].name}.png")
    assert saved.size == (120, 80) and saved.getpixel((5, 5))[0] > 200


@pytest.mark.parametrize(
    "content, reason",
    [
        (b"", "empty file"),
        (b"%PDF-1.4 nonsense", r"damaged or no PDF \(Data format error\)"),
        (b"\x00" * 5000, "damaged or no PDF"),
    ],
)
def test_what_cannot_be_read_says_why(tmp_path, content, reason):
    path = tmp_path / "a.pdf"
    path.write_bytes(content)
    with pytest.raises(Unreadable, match=reason):
        pdf.count_pages(path)


def test_an_encrypted_file_says_so(tmp_path):
    path = text_pdf(tmp_path / "a.pdf", [LEFT], encrypt="geheim")
    with pytest.raises(Unreadable, match="encrypted"):
        pdf.count_pages(path)


def test_a_truncated_file_gives_an_error_or_its_pages_but_no_crash(tmp_path):
    content = text_pdf(tmp_path / "a.pdf", [LEFT, RIGHT]).read_bytes()
    outcomes = set()
    for share in (0.3, 0.6, 0.9, 0.99):
        (tmp_path / "b.pdf").write_bytes(content[: int(share * len(content))])
        try:
            texts(tmp_path / "b.pdf")
            outcomes.add("read")
        except Unreadable:
            outcomes.add("error")
    assert "error" in outcomes


def test_a_scan_is_told_from_an_empty_page(tmp_path):
    from PIL import Image

    Image.new("L", (800, 1100), 200).save(tmp_path / "p.png")

    def scan(canvas):
        canvas.drawImage(str(tmp_path / "p.png"), 0, 0, WIDTH, HEIGHT)

    path = write(tmp_path / "a.pdf", [scan, lambda canvas: None])
    problems = [page.problem for page in pdf.read_pages(path, range(1, 3))]
    assert problems == [pdf.SCAN, ""]

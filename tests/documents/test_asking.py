"""Translation and descriptions, against a stub server that fails in the ways servers do."""

from __future__ import annotations

import pytest
from reportlab.pdfgen.canvas import Canvas

from slim.core.errors import SlimError
from slim.documents.convert import Conversion
from slim.documents.settings import DocumentSettings
from tests.support.documents import SENTENCES, column, text_pdf
from tests.support.documents import pdf as write


@pytest.fixture
def document(tmp_path):
    return text_pdf(tmp_path / "a.pdf", SENTENCES[:4])


def convert(path, tmp_path, server=None, **settings) -> tuple[list[dict], Conversion]:
    settings = {"jobs": 1, "length": 60, "validation_fraction": 0, "wait": 0, **settings}
    if server is not None:
        settings |= {"endpoint": server.address, "model": "m"}
    conversion = Conversion(path, DocumentSettings(**settings), tmp_path / "cache")
    return list(conversion.records()), conversion


def english(_, body) -> str:
    return "In English: " + body["messages"][-1]["content"].upper()


def test_pages_are_translated_and_each_is_asked_for_once(document, serve, tmp_path):
    server = serve(english)
    rows, conversion = convert(document, tmp_path, server, translate="en")
    assert [row["text"] for row in rows] == [f"In English: {s.upper()}" for s in SENTENCES[:4]]
    assert "'en'" in server.requests[0]["messages"][0]["content"]
    assert conversion.report.asked == 4
    again, _ = convert(document, tmp_path, server, translate="en")
    assert again == rows
    assert len(server.requests) == 4


@pytest.fixture
def pictures(tmp_path):
    from PIL import Image

    for name in ("red", "blue"):
        Image.new("RGB", (90, 60), name).save(tmp_path / f"{name}.png")

    def page(color: str):
        def draw(canvas: Canvas) -> None:
            column(canvas, SENTENCES[0] if color == "red" else SENTENCES[1])
            canvas.drawImage(str(tmp_path / f"{color}.png"), 72, 300, 90, 60)

        return draw

    return write(tmp_path / "p.pdf", [page("red"), page("blue")])


def test_pictures_are_shown_and_their_description_is_in_the_text(pictures, serve, tmp_path):
    server = serve(lambda number, _: f"A plain\nsquare {number}.")
    rows, _ = convert(pictures, tmp_path, server, describe=True)
    assert rows[0]["text"] == f"{SENTENCES[0]}\n\n[Picture: A plain square 1.]"
    assert rows[1]["pictures"] == [
        {"page": 2, "width": 90, "height": 60, "description": "A plain square 2."}
    ]
    part = server.requests[0]["messages"][0]["content"][1]
    assert part["image_url"]["url"].startswith("data:image/png;base64,iVBOR")
    convert(pictures, tmp_path, server, describe=True)
    assert len(server.requests) == 2


def test_a_limit_ends_the_run_and_a_higher_one_resumes_it(document, serve, tmp_path):
    def counted(number, body):
        text = english(number, body)
        return 200, {"choices": [{"message": {"content": text}}], "usage": {"total_tokens": 100}}

    server = serve(counted)
    with pytest.raises(
        SlimError,
        match=r"limit of 150 tokens is reached after 2 answers\. 2 answers are kept.*\n.*--max-tokens",
    ):
        convert(document, tmp_path, server, translate="en", max_tokens=150)
    rows, _ = convert(document, tmp_path, server, translate="en", max_tokens=500)
    assert (len(rows), len(server.requests)) == (4, 4)


def test_a_server_that_is_down_ends_the_run_with_what_is_kept(document, serve, tmp_path):
    server = serve(lambda number, body: english(number, body) if number == 1 else (500, "broken"))
    with pytest.raises(
        SlimError,
        match=r"translator at .* does not answer after 2 tries: HTTP 500 broken\.\n1 answers are kept",
    ):
        convert(document, tmp_path, server, translate="en", retries=1)


def test_a_server_that_is_slow_is_given_up(document, serve, tmp_path):
    import threading

    server = serve(lambda *_: threading.Event().wait(0.3) or "late")
    with pytest.raises(SlimError, match="ReadTimeout"):
        convert(document, tmp_path, server, translate="en", retries=0, timeout=0.05)


def test_nonsense_drops_a_page_and_three_in_a_row_the_server(document, serve, tmp_path):
    once = serve(lambda number, body: "no" if number == 2 else english(number, body))
    rows, conversion = convert(document, tmp_path, once, translate="en")
    assert [row["page"] for row in rows] == [1, 3, 4]
    [drop] = [drop for drop in conversion.report.drops if drop.what == "page"]
    assert (drop.page, drop.reason) == (2, "no usable translation")
    always = serve(lambda *_: "?")
    with pytest.raises(SlimError, match=r"no usable translation 3 times in a row; .*'\?'"):
        convert(document, tmp_path / "other", always, translate="fr")


@pytest.mark.parametrize("reply", [{"choices": []}, "<html>", {"error": "x"}])
def test_what_is_no_answer_at_all_is_an_error(document, serve, tmp_path, reply):
    server = serve(lambda *_: (200, reply))
    with pytest.raises(SlimError, match="what it sends is no chat completion"):
        convert(document, tmp_path, server, translate="en", retries=0)

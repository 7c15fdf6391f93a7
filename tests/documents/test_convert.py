"""A folder of documents to records: from the command line, and as training data."""

from __future__ import annotations

import json
import re
import shutil
import sys

import pytest

from slim.checkpoints.tokenizer import load_tokenizer
from slim.core.errors import SlimError
from slim.documents import ocr, reading
from slim.documents.__main__ import main
from slim.documents.convert import Conversion
from slim.documents.settings import DocumentSettings
from slim.documents.training import Documents
from tests.conftest import ROOT
from tests.support.documents import SENTENCES, scan_pdf, text_pdf

TINY = ROOT / "slim" / "assets" / "tiny"


@pytest.fixture
def folder(tmp_path):
    """Slides with a footer, a text that repeats one of them, and files that cannot be read."""
    folder = tmp_path / "documents"
    texts = [f"Folie {name}: {sentence}" for name, sentence in zip("ABCD", SENTENCES, strict=False)]
    text_pdf(folder / "slides.pdf", texts, "Vorlesung Messen", "Prof. Müller, Folie {}")
    (folder / "below").mkdir()
    (folder / "below" / "copy.md").write_text(texts[1] + "\n", encoding="utf-8")
    (folder / "note.txt").write_text(" ".join(SENTENCES[4:]), encoding="utf-8")
    text_pdf(folder / "secret.pdf", ["x"], encrypt="geheim")
    (folder / "damaged.pdf").write_bytes(b"%PDF-1.7 nothing")
    (folder / "empty.pdf").touch()
    (folder / "numbers.xlsx").write_bytes(b"1")
    (folder / ".hidden.md").write_text("hidden", encoding="utf-8")
    return folder


def records(folder, tmp_path, **settings) -> tuple[list[dict], Conversion]:
    settings = {"jobs": 1, "length": 100, **settings}
    conversion = Conversion(folder, DocumentSettings(**settings), tmp_path / "cache")
    return list(conversion.records()), conversion


def test_a_page_is_a_record_with_its_source_and_number(folder, tmp_path):
    rows, _ = records(folder, tmp_path)
    places = [(row["source"], row["page"]) for row in rows if row["part"] == 0]
    assert places == [("below/copy.md", 1), ("slides.pdf", 1), ("slides.pdf", 3), ("slides.pdf", 4)]


def test_a_records_text_is_the_pages_without_header_and_footer(folder, tmp_path):
    rows, _ = records(folder, tmp_path)
    texts = [row["text"] for row in rows if row["source"] == "slides.pdf"]
    assert texts == [f"Folie {'ABCD'[number]}: {SENTENCES[number]}" for number in (0, 2, 3)]


def test_the_report_says_what_was_dropped_and_why(folder, tmp_path):
    _, conversion = records(folder, tmp_path)
    reasons = {(drop.source, drop.page, drop.reason) for drop in conversion.report.drops}
    assert reasons == {
        ("damaged.pdf", None, "damaged or no PDF (Data format error)"),
        ("empty.pdf", None, "empty file"),
        ("numbers.xlsx", None, "kind of file that is not read (.xlsx)"),
        ("secret.pdf", None, "encrypted: save it without a password"),
        ("slides.pdf", 2, "nearly the same as below/copy.md, page 1"),
        ("slides.pdf", None, "repeats on pages: Vorlesung Messen"),
        ("slides.pdf", None, "repeats on pages: Prof. Müller, Folie #"),
    }


def test_all_pages_of_a_document_are_in_one_split(folder, tmp_path):
    rows, _ = records(folder, tmp_path, validation_fraction=0.3, test_fraction=0.3)
    splits = {}
    for row in rows:
        splits.setdefault(row["source"], set()).add(row["split"])
    assert sorted(len(names) for names in splits.values()) == [1, 1, 1]
    assert set().union(*splits.values()) == {"train", "validation", "test"}


def test_a_single_document_is_divided_only_by_page(tmp_path):
    path = text_pdf(tmp_path / "a.pdf", SENTENCES)
    with pytest.raises(
        SlimError, match="1 document with text cannot be divided.*\n.*split-by page"
    ):
        records(path, tmp_path)
    rows, _ = records(path, tmp_path, split_by="page", validation_fraction=0.5)
    assert {row["split"] for row in rows} == {"train", "validation"}


def test_pages_are_joined_as_asked(tmp_path):
    path = text_pdf(tmp_path / "a.pdf", SENTENCES)
    rows, _ = records(path, tmp_path, join=4, validation_fraction=0, length=60)
    assert [(row["page"], row["last_page"]) for row in rows] == [(1, 4), (5, 8)]


def test_what_was_read_once_is_not_read_again(folder, tmp_path, monkeypatch):
    first, _ = records(folder, tmp_path)
    monkeypatch.setattr(reading, "_read", lambda *_: pytest.fail("read again"))
    assert records(folder, tmp_path)[0] == first


def test_two_processes_give_the_same_records(folder, tmp_path):
    first, _ = records(folder, tmp_path)
    shutil.rmtree(tmp_path / "cache")
    assert records(folder, tmp_path, jobs=2)[0] == first


@pytest.mark.parametrize(
    "limits, reason",
    [
        ({"max_megabytes": 1}, "larger than --max-megabytes 1"),
        ({"max_pages": 2}, "beyond --max-pages 2"),
    ],
)
def test_a_huge_file_is_bounded(tmp_path, limits, reason):
    path = text_pdf(tmp_path / "in" / "a.pdf", SENTENCES)
    for name in "bc":
        (tmp_path / "in" / f"{name}.md").write_text(f"{name} {SENTENCES[0]}", encoding="utf-8")
    if "max_megabytes" in limits:
        with path.open("ab") as file:
            file.write(b"%" * 2_000_000)
    rows, conversion = records(tmp_path / "in", tmp_path, **limits)
    assert reason in {drop.reason for drop in conversion.report.drops}
    assert len([row for row in rows if row["source"] == "a.pdf"]) <= 2


def test_a_folder_of_nothing_readable_says_why(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.pdf").write_bytes(b"no pdf")
    (tmp_path / "in" / "b.xlsx").write_bytes(b"x")
    with pytest.raises(SlimError, match=r"has no text that can be read \(damaged.*a.pdf; kind of"):
        records(tmp_path / "in", tmp_path)


@pytest.fixture
def scan(tmp_path):
    source = text_pdf(tmp_path / "text.pdf", [SENTENCES[0]])
    (tmp_path / "scans").mkdir()
    return scan_pdf(tmp_path / "scans" / "scan.pdf", source)


def test_a_scan_without_tesseract_says_what_to_install(scan, tmp_path, monkeypatch):
    monkeypatch.setattr(ocr, "PROGRAM", "no-such-program")
    with pytest.raises(SlimError, match="apt-get install tesseract-ocr tesseract-ocr-deu"):
        records(scan.parent, tmp_path, languages="deu")


def test_scans_can_be_left_out(scan, tmp_path):
    with pytest.raises(SlimError, match=r"no text that can be read \(scan, and --ocr never"):
        records(scan.parent, tmp_path, ocr="never")


@pytest.mark.parametrize("name, module", [("a.pdf", "pypdfium2"), ("a.docx", "docx")])
def test_without_the_packages_the_error_says_what_to_install(tmp_path, monkeypatch, name, module):
    (tmp_path / name).write_bytes(b"PK\x03\x04")
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(SlimError, match=rf"not installed \({module}\): pip install 'slim\[doc"):
        records(tmp_path / name, tmp_path)


def test_the_command_writes_records_and_report(folder, tmp_path, capsys):
    output = tmp_path / "out.jsonl"
    arguments = [str(folder), "--output", str(output), "--cache", str(tmp_path / "cache")]
    assert main([*arguments, "--jobs", "1"]) == 0
    rows = [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]
    report = json.loads((tmp_path / "out.report.json").read_text(encoding="utf-8"))
    assert sum(report["records"].values()) == len(rows)
    shown = capsys.readouterr().out
    assert "encrypted" in shown
    assert max(map(len, shown.splitlines())) <= 80


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--output", "x.txt"], r"--output x.txt: must end in .jsonl"),
        (["--output", "x.jsonl", "--join", "0"], r"--join=0"),
        (["--output", "x.jsonl", "--languages", "de utsch"], "must be names of Tesseract's"),
        (
            ["--output", "x.jsonl", "--translate", "en"],
            "--translate needs a model: --endpoint http",
        ),
        (["--output", "x.jsonl", "--endpoint", "here"], "--endpoint=here is no address"),
        (["--output", "x.jsonl", "--similarity", "much"], "must be from 0.5 to 1, or none"),
    ],
)
def test_a_mistake_is_one_line_and_code_2(tmp_path, capsys, arguments, message):
    assert main([str(tmp_path), *arguments]) == 2
    error = capsys.readouterr().err
    assert re.search(message, error)
    assert len(error.splitlines()) <= 2


def test_a_folder_that_is_not_there(tmp_path, capsys):
    assert main([str(tmp_path / "none"), "--output", "x.jsonl"]) == 2
    assert "There is no folder or file" in capsys.readouterr().err


def data(folder, tmp_path, **settings) -> Documents:
    settings = {"jobs": 1, "cache": str(tmp_path / "cache"), **settings}
    return Documents(text=str(folder), **settings)


def test_a_folder_is_training_data(folder, tmp_path):
    windows = data(folder, tmp_path).windows("train", load_tokenizer(TINY), 32)
    assert windows.counts["documents"] > 0
    assert len(windows) > 0


def test_training_reads_no_document_of_the_validation_split(folder, tmp_path):
    documents = data(folder, tmp_path, validation_fraction=0.3)
    parts = {part: set(documents.documents(part)) for part in ("train", "validation")}
    assert parts["train"] and parts["validation"]
    assert not parts["train"] & parts["validation"]


def test_records_of_the_command_are_training_data_too(folder, tmp_path):
    output = tmp_path / "out.jsonl"
    cache = str(tmp_path / "cache")
    assert main([str(folder), "--output", str(output), "--cache", cache, "--jobs", "1"]) == 0
    made = list(data(output, tmp_path).documents("train"))
    assert made == list(data(folder, tmp_path).documents("train"))


def test_a_changed_file_is_another_result(folder, tmp_path):
    before = data(folder, tmp_path).cache_key()
    assert data(folder, tmp_path, jobs=2, wait=5).cache_key() == before
    assert data(folder, tmp_path, join=2).cache_key() != before
    (folder / "note.txt").write_text("anders", encoding="utf-8")
    assert data(folder, tmp_path).cache_key() != before


@pytest.mark.parametrize("content", ['{"text": "x"}', '{"text": "x", "split": "other"}'])
def test_rows_of_another_kind_are_refused(tmp_path, content):
    (tmp_path / "a.jsonl").write_text(content, encoding="utf-8")
    with pytest.raises(SlimError, match="line 1: no split"):
        list(data(tmp_path / "a.jsonl", tmp_path).documents("train"))


def test_a_folder_without_documents_is_a_mistake_at_once(tmp_path):
    (tmp_path / "a.xlsx").write_bytes(b"x")
    with pytest.raises(SlimError, match=r"holds none of \.pdf"):
        data(tmp_path, tmp_path)

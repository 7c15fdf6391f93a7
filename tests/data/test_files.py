"""Readers of local files: encodings, byte order marks, JSON in its shapes."""

from __future__ import annotations

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from slim.core.errors import SlimError
from slim.data.files import json_rows, parquet_rows, read_text, text_lines
from slim.data.text import Text

ROWS = [{"text": "Le château."}, {"text": "再见 👋"}]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)


def rows_of(path) -> list[dict]:
    return [row for _, row in json_rows(path)]


@pytest.mark.parametrize(
    "encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"], ids=lambda name: name
)
def test_a_byte_order_mark_says_how_text_is_read(tmp_path, encoding):
    path = tmp_path / "some.txt"
    path.write_bytes("Voilà.\r\n再见\n".encode(encoding))
    assert read_text(path) == "Voilà.\n再见\n"


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
def test_a_byte_order_mark_says_how_rows_are_read(tmp_path, encoding):
    path = tmp_path / "some.jsonl"
    path.write_bytes(LINES.encode(encoding))
    assert rows_of(path) == ROWS


@pytest.mark.parametrize("mark", [b"\xfe\xff", b"\xff\xfe"])
def test_utf_16_in_either_order_of_bytes(tmp_path, mark):
    path = tmp_path / "some.txt"
    path.write_bytes(mark + "Là.".encode("utf-16-be" if mark[0] == 0xFE else "utf-16-le"))
    assert read_text(path) == "Là."


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("plain\nch\xe2teau\n".encode("latin-1"), "line 2: byte 0xe2 is not UTF-8. .*iconv"),
        ("“quoted”".encode("cp1252"), "line 1: byte 0x93 is not UTF-8"),
        (b"x" * 20000 + b"\n" + b"y" * 20000 + b"\xff", "line 2: byte 0xff is not UTF-8"),
        ("Hello.".encode("utf-16-le"), "line 1: zero bytes, so this is UTF-16"),
        ("Hello.".encode("utf-16")[:-1], "byte order mark says UTF-16, but it cannot be decoded"),
        (b"\xef\xbb\xbfch\xe2teau", "byte order mark says UTF-8, but it cannot be decoded"),
    ],
)
def test_another_encoding_is_an_error_with_file_line_and_advice(tmp_path, content, message):
    path = tmp_path / "some.txt"
    path.write_bytes(content)
    with pytest.raises(SlimError, match=f"some.txt.*{message}"):
        read_text(path)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_text_of_documents_is_read_so_too(tmp_path, streaming):
    path = tmp_path / "some.txt"
    path.write_bytes("ch\xe2teau".encode("latin-1"))
    with pytest.raises(SlimError, match="line 1: byte 0xe2"):
        list(Text(str(path), streaming=streaming).documents())


def test_lines_are_read_one_at_a_time(tmp_path):
    path = tmp_path / "some.txt"
    path.write_bytes(b"good\n" + b"x\n" * 100_000 + b"\xff\n")
    assert next(text_lines(path)) == "good\n"


@pytest.mark.parametrize(
    "text",
    [
        json.dumps(ROWS),
        json.dumps(ROWS, indent=2),
        "[\n" + ",\n".join(json.dumps(row) for row in ROWS) + "\n]\n",
        "\n\n" + json.dumps(ROWS, indent=1),
        "\n".join(json.dumps(row, indent=2) for row in ROWS),
        LINES.replace("\n", "\r\n\r\n"),
    ],
    ids=["one line", "indented", "a row a line", "after empty lines", "indented rows", "Windows"],
)
def test_rows_may_be_lines_or_one_list_over_many(tmp_path, text):
    path = tmp_path / "some.jsonl"
    path.write_text(text, encoding="utf-8")
    assert rows_of(path) == ROWS


def test_no_rows(tmp_path):
    path = tmp_path / "some.json"
    for text in ("", "\n \n", "[]", "[\n]\n"):
        path.write_text(text)
        assert rows_of(path) == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"text": "x"}\n{"text": \n', "line 2: not JSON"),
        ('{"text": "x\n{"text": "y"}\n', "line 1: not JSON"),
        ('[\n{"text": "x"},\n{"text": }\n]', "line 3: not JSON"),
        ('{"text": "x"}\n[1]\n', "line 2: list where an object"),
        ('{"text": "x"}\n[\n', "line 2: not JSON"),
        ('[{"text": "x"}, 3]', "line 1: list where an object"),
        ('[\n{"text": "x"},\n 3]', "row 2: int where an object"),
        ('[{"text": "x"}]\n{"text": "y"}\n', "a list of rows in line 1, and more after it"),
        ('"text"\n', "line 1: str where an object"),
        ("[" * 100_000, "line 1: not JSON"),
    ],
)
def test_what_is_no_row_is_named_by_its_place(tmp_path, text, message):
    path = tmp_path / "some.jsonl"
    path.write_text(text)
    with pytest.raises(SlimError, match=f"some.jsonl.*{message}"):
        rows_of(path)


def test_a_file_that_cannot_be_opened_is_named(tmp_path):
    path = tmp_path / "some.txt"
    path.mkdir()
    with pytest.raises(SlimError, match="some.txt cannot be read: Is a directory"):
        read_text(path)


def test_parquet_text_that_is_no_utf_8(tmp_path):
    path = tmp_path / "some.parquet"
    broken = pa.array([b"ch\xe2teau"]).cast(pa.string(), safe=False)
    pq.write_table(pa.table({"text": broken}), path)
    with pytest.raises(SlimError, match="some.parquet: not a Parquet file that can be read"):
        list(parquet_rows(path))


def test_a_stream_that_breaks_is_an_error_of_the_data_set(tmp_path):
    (tmp_path / "train.jsonl").write_text('{"text": "x"}\n' * 9 + "{broken\n")
    with pytest.raises(SlimError, match=r"cannot be loaded as a data set"):
        list(Text(str(tmp_path), streaming=True).documents())


@pytest.mark.parametrize("text", ["/no\0such.txt", "x" * 5000, "~nobody-of-that-name/x.txt"])
def test_a_path_that_can_be_none_is_no_file(text):
    if text.startswith("x"):
        assert Text(text).path is None
    else:
        with pytest.raises(SlimError, match="There is no text"):
            Text(text)

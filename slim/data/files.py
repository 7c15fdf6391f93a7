"""Readers of local files: text in a known encoding, and rows of CSV, JSON, JSON Lines and Parquet.

Every reader either yields what the file holds or raises a ``SlimError`` that names the file, the
line and what to do. An encoding is never guessed: a byte order mark says which one it is, and
without a mark a file must be UTF-8. (Latin-1, for example, decodes any bytes at all, so reading a
file as Latin-1 proves nothing.)"""

from __future__ import annotations

import codecs
import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from slim.core.errors import SlimError

# Byte order marks, and the codec that reads the file and leaves the mark out. The mark of UTF-32
# begins with that of UTF-16, so it comes first.
MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
PARQUET_ROWS = 4096  # rows of a Parquet file that are in memory at a time

Row = dict[str, Any]


def encoding_of(path: Path) -> str:
    """Return the codec of a text file: what its byte order mark says, UTF-8 without one."""
    with path.open("rb") as file:
        start = file.read(4)
    for mark, encoding in MARKS:
        if start.startswith(mark):
            return encoding
    return "utf-8"


def text_lines(path: Path) -> Iterator[str]:
    """Yield the lines of a text file with their ends, one in memory at a time.

    Args:
        path: UTF-8, or UTF-8, UTF-16 or UTF-32 with a byte order mark.

    Raises:
        SlimError: when the file cannot be opened or is in another encoding; names the line.
    """
    try:
        encoding = encoding_of(path)
        with path.open(encoding=encoding) as lines:
            for number, line in enumerate(lines, 1):
                # UTF-16 without a mark is valid UTF-8 full of zero characters
                if "\0" in line:
                    raise SlimError(
                        f"{path}, line {number}: zero bytes, so this is UTF-16 or no text at all. "
                        "Save the file as UTF-8."
                    )
                yield line
    except UnicodeError as error:
        raise SlimError(_wrong_encoding(path, error)) from error
    except OSError as error:
        raise SlimError(f"{path} cannot be read: {error.strerror or error}.") from error


def read_text(path: Path) -> str:
    """Return a whole text file, read as :func:`text_lines` does."""
    return "".join(text_lines(path))


def _wrong_encoding(path: Path, error: UnicodeError) -> str:
    """Return the message for a file that is not in the encoding it should be in."""
    encoding = encoding_of(path)
    if encoding != "utf-8":
        return (
            f"{path}: its byte order mark says {encoding.removesuffix('-sig').upper()}, but it "
            f"cannot be decoded so ({error}). Save the file as UTF-8."
        )
    # the error counts from the start of a buffer, not of the file
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            try:
                line.decode("utf-8")
            except UnicodeDecodeError as reason:
                return (
                    f"{path}, line {number}: byte 0x{line[reason.start]:02x} is not UTF-8. Save "
                    f"the file as UTF-8, for example: "
                    f"iconv -f LATIN1 -t UTF-8 {path.name} > utf8{path.suffix}"
                )
    return f"{path} is not UTF-8 ({error}). Save the file as UTF-8."


def json_rows(path: Path) -> Iterator[tuple[str, Row]]:
    """Yield place and object of every row of a JSON or JSON Lines file, empty lines left out.

    One object a line is read line by line. A list of objects, or objects that each take several
    lines, are read as a whole.

    Args:
        path: the file.

    Yields:
        ``line 3`` (or ``row 3`` where a row is no line), counted from 1, and the object.

    Raises:
        SlimError: naming the line that holds no JSON object.
    """
    lines = text_lines(path)
    is_first = True
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = _parsed(line)
        except ValueError as error:
            if not is_first:
                raise _not_json(path, number, error) from error
            yield from _many_lines(path, number, error)
            return
        if is_first and isinstance(row, list) and all(isinstance(item, dict) for item in row):
            _require_last(path, number, lines)
            for index, item in enumerate(row, 1):
                yield f"row {index}", item
            return
        yield f"line {number}", _as_row(path, f"line {number}", row)
        is_first = False


def csv_rows(path: Path) -> Iterator[tuple[str, Row]]:
    """Yield place and cells of every row of a table with a line of headings.

    Columns are apart by commas, semicolons or tabs, whichever the headings have most of.

    Args:
        path: the file.

    Yields:
        ``line 3``, counted from 1 (of a row of several lines the last), and heading -> cell.

    Raises:
        SlimError: when there are no headings, or a row has more cells than there are.
    """
    lines = text_lines(path)
    heading = next(lines, "")
    delimiter = max(",;\t", key=heading.count)
    names = next(csv.reader([heading], delimiter=delimiter), [])
    if not any(name.strip() for name in names):
        raise SlimError(f"{path} is empty. A table has a line of headings, and rows below it.")
    repeated = [name for name in names if names.count(name) > 1]
    if repeated:
        raise SlimError(f"{path}: two columns are called '{repeated[0]}'. Rename one of them.")
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    try:
        for cells in reader:
            place = f"line {reader.line_num + 1}"
            if not cells:
                continue
            if len(cells) != len(names):
                raise SlimError(
                    f"{path}, {place}: {len(cells)} cells where the headings name {len(names)} "
                    f"columns. Put texts with {delimiter!r} in them into double quotes."
                )
            yield place, dict(zip(names, cells, strict=True))
    except csv.Error as error:
        raise SlimError(f"{path}, line {reader.line_num + 1}: not CSV ({error}).") from error


def _many_lines(path: Path, number: int, first_error: ValueError) -> Iterator[tuple[str, Row]]:
    """Yield the objects of a file whose line ``number`` is the beginning of one, or of a list."""
    text = read_text(path)
    decoder = json.JSONDecoder()
    rows: list[Any] = []
    place = _next_value(text, 0)
    while place < len(text):
        try:
            value, place = decoder.raw_decode(text, place)
        except (ValueError, RecursionError) as error:
            if text.lstrip().startswith("[") and isinstance(error, json.JSONDecodeError):
                raise _not_json(path, error.lineno, error) from error
            # most likely one object a line, of which the first is broken
            raise _not_json(path, number, first_error) from first_error
        rows.extend(value if isinstance(value, list) else [value])
        place = _next_value(text, place)
    for index, row in enumerate(rows, 1):
        yield f"row {index}", _as_row(path, f"row {index}", row)


def _next_value(text: str, place: int) -> int:
    """Return the place of the first character from ``place`` on that is no white space."""
    while place < len(text) and text[place].isspace():
        place += 1
    return place


def _parsed(line: str) -> Any:
    """Return the JSON value of a line. Raises ``ValueError``, for one nested too deeply as well."""
    try:
        return json.loads(line)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def _as_row(path: Path, place: str, row: Any) -> Row:
    """Return ``row`` if it is an object."""
    if not isinstance(row, dict):
        raise SlimError(
            f"{path}, {place}: {type(row).__name__} where an object with columns is needed."
        )
    return row


def _not_json(path: Path, number: int, error: ValueError) -> SlimError:
    return SlimError(
        f"{path}, line {number}: not JSON ({error}). Write one object a line, or one list of them."
    )


def _require_last(path: Path, number: int, lines: Iterator[str]) -> None:
    """Require that nothing follows a list of all rows in line ``number``."""
    if any(line.strip() for line in lines):
        raise SlimError(
            f"{path}: a list of rows in line {number}, and more after it. Write one object a line, "
            "or one list of them."
        )


def parquet_rows(path: Path) -> Iterator[Row]:
    """Yield the rows of a Parquet file, ``PARQUET_ROWS`` of them in memory at a time.

    Raises:
        SlimError: when it is no Parquet file, or a text in it is no UTF-8.
    """
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    try:
        with ParquetFile(path) as table:
            for batch in table.iter_batches(PARQUET_ROWS):
                yield from batch.to_pylist()
    except (ArrowException, OSError, ValueError, NotImplementedError) as error:
        raise SlimError(f"{path}: not a Parquet file that can be read ({error}).") from error

"""A catalogue of questions of one's own: CSV, JSON Lines, flash cards."""

from __future__ import annotations

import csv
import html
import re
from collections.abc import Iterator
from pathlib import Path

from slim.core.errors import SlimError, did_you_mean
from slim.data.base import TEST, TRAIN, VALIDATION, is_test, is_validation
from slim.data.cells import first_text
from slim.data.files import json_rows, read_text

TABLES = (".csv", ".tsv")
ROWS = (".jsonl", ".json")
CARDS = (".txt", ".md")
ENDINGS = (*TABLES, *ROWS, *CARDS)
CARD = re.compile(
    r"^\W*(?:Q|F|Question|Frage)\s*:[\s*_]*(?P<question>.+?)\s*^\W*(?:A|Answer|Antwort)\s*:[\s*_]*"
    r"(?P<answer>.+?)(?=^\W*(?:Q|F|Question|Frage)\s*:|\Z)",
    re.MULTILINE | re.DOTALL,
)


def read_catalogue(path: Path, question: str, answer: str) -> list[dict]:
    """Return the questions of a catalogue.

    Args:
        path: ``.csv`` or ``.tsv`` with a heading; ``.jsonl`` with an object a line; ``.txt`` as
            Anki exports cards (front, tab, back); ``.md`` or ``.txt`` with ``Q:`` and ``A:``.
        question: name of the column with the question.
        answer: name of the column with the answer.

    Returns:
        ``question`` and ``answer`` (empty where there is none), each question once.

    Raises:
        SlimError: when the file cannot be read, lacks a column or holds no question.
    """
    if not path.is_file():
        raise SlimError(f"There is no catalogue {path}. Give a file ({', '.join(ENDINGS)}).")
    ending = path.suffix.lower()
    if ending in TABLES:
        rows = _table(path, question, answer)
    elif ending in ROWS:
        rows = _objects(path, question, answer)
    elif ending in CARDS:
        rows = _cards(path)
    else:
        raise SlimError(f"{path}: must end in one of {', '.join(ENDINGS)}.")
    known: dict[str, dict] = {}
    for front, back in rows:
        if front.strip():
            known.setdefault(front.strip(), {"question": front.strip(), "answer": back.strip()})
    if not known:
        raise SlimError(f"{path} holds no question.")
    return list(known.values())


def _table(path: Path, question: str, answer: str) -> Iterator[tuple[str, str]]:
    text = read_text(path)
    delimiter = "\t" if path.suffix.lower() == ".tsv" else _delimiter(text)
    reader = csv.DictReader(text.splitlines(keepends=True), delimiter=delimiter)
    _require(path, list(reader.fieldnames or []), question, answer)
    for row in reader:
        yield row[question] or "", row[answer] or ""


def _delimiter(text: str) -> str:
    """Return what separates the cells of a CSV file: in German ones it is a semicolon."""
    heading = text.partition("\n")[0]
    return max(",;\t", key=heading.count)


def _objects(path: Path, question: str, answer: str) -> Iterator[tuple[str, str]]:
    for place, row in json_rows(path):
        _require(path, list(row), question, answer)
        where = f"{path}, {place}: column"
        yield (
            first_text(row[question], f"{where} '{question}'"),
            first_text(row[answer], f"{where} '{answer}'"),
        )


def _require(path: Path, columns: list[str], question: str, answer: str) -> None:
    for option, name in (("question-column", question), ("answer-column", answer)):
        if name not in columns:
            raise SlimError(
                f"{path} has no column '{name}' (has: {', '.join(columns)})."
                f"{did_you_mean(name, columns)} Set --{option}."
            )


def _cards(path: Path) -> Iterator[tuple[str, str]]:
    """Yield the cards of a file: lines with a tab, or ``Q:`` and ``A:``."""
    text = read_text(path)
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    if lines and all("\t" in line for line in lines):
        for line in lines:
            cells = next(csv.reader([line], delimiter="\t"))
            yield _plain(cells[0]), _plain(cells[1])
        return
    for match in CARD.finditer(text):
        yield match["question"], match["answer"]


def _plain(card: str) -> str:
    """Return a card without the HTML that Anki writes."""
    text = re.sub(r"<br\s*/?>|</div>|</p>", "\n", card)
    return html.unescape(re.sub(r"<[^>]+>", "", text)).strip()


def with_split(row: dict, validation: float, test: float, seed: int) -> dict:
    """Return a question with the split that its text's hash gives.

    Args:
        row: with ``question``.
        validation: share of the questions.
        test: as ``validation``.
        seed: of the choice.
    """
    split = TRAIN
    if is_validation(row["question"], validation, seed):
        split = VALIDATION
    elif test and is_test(row["question"], test, seed):
        split = TEST
    return {**row, "split": split}

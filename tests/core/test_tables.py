"""Tables of text: they fit the width they are given and lose nothing."""

from __future__ import annotations

import io
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slim.core.tables import Table, print_table, text_width, wrapped

WORDS = st.text(st.sampled_from("ab-_/.,= 1漢é"), max_size=60)


def letters(text: str) -> str:
    return "".join(text.split())


@given(WORDS, st.integers(2, 30))
def test_wrapping_keeps_every_letter_and_the_width(text, width):
    lines = wrapped(text, width)
    assert letters("".join(lines)) == letters(text)
    assert all(text_width(line) <= width for line in lines if len(line) > 1)


@given(
    st.lists(WORDS, min_size=1, max_size=6).flatmap(
        lambda headings: st.tuples(
            st.just(headings),
            st.lists(st.lists(WORDS, min_size=len(headings), max_size=len(headings)), max_size=4),
        )
    ),
    st.integers(20, 120),
)
def test_no_line_is_wider_than_asked_for(content, width):
    headings, rows = content
    lines = Table(headings, rows, fold=[len(headings) - 1], title="a title").lines(width)
    assert all(text_width(line) <= width for line in lines)


@given(
    st.lists(st.lists(WORDS, min_size=3, max_size=3), min_size=1, max_size=4), st.integers(20, 120)
)
def test_every_letter_of_every_cell_is_there(rows, width):
    text = "".join(Table(["", "", ""], rows, keys=1).lines(width))
    for letter in "ab1漢é":
        wanted = sum(cell.count(letter) for row in rows for cell in row)
        assert text.count(letter) >= wanted


def test_what_does_not_fit_goes_below_with_the_keys_repeated():
    table = Table(["name", "first", "second"], [["row", "1" * 10, "2" * 10]])
    assert table.lines(24) == [
        "name       first",
        "────────────────",
        "row   1111111111",
        "",
        "name      second",
        "────────────────",
        "row   2222222222",
    ]


def test_text_is_folded_before_anything_moves_below():
    table = Table(["name", "about"], [["row", "one two three four five"]], fold=[1])
    assert table.lines(20)[2:] == ["row   one two three", "      four five"]


def test_a_cell_of_several_lines_stays_so():
    lines = Table(["a", "b"], [["x", "1\n22"]]).lines(80)
    assert lines[2:] == ["x   1", "   22"]


def test_signs_that_an_output_lacks_are_replaced(monkeypatch):
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii"))
    print_table(Table(["é", "b"], [["→", "1 ± 2"]]))
    sys.stdout.flush()
    assert written.getvalue().decode().splitlines() == [r"\xe9      b", "-" * 8, ">  1 ~ 2"]


@pytest.mark.parametrize(("columns", "width"), [("", 80), ("120", 120), ("0", 80), ("x", 80)])
def test_without_a_terminal_a_table_has_80_columns_or_what_is_asked_for(
    monkeypatch, capsys, columns, width
):
    monkeypatch.setenv("COLUMNS", columns)
    print_table(Table([str(n) for n in range(60)], [["12345678"] * 60]))
    longest = max(len(line) for line in capsys.readouterr().out.splitlines())
    assert width - 10 < longest <= width

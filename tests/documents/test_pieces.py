"""Splitting, joining, duplicates, repeating lines."""

from __future__ import annotations

import pytest

from slim.documents.duplicates import Duplicates
from slim.documents.lengths import Passage, fitted, split_text, units
from slim.documents.pages import Line, Page
from slim.documents.repeats import remove_repeats
from tests.support.documents import SENTENCES

TEXT = " ".join(SENTENCES)


def test_a_long_text_is_split_at_sentences_into_equal_pieces():
    pieces = split_text(" ".join([TEXT] * 4), 4 * len(TEXT) / 8)
    assert len(pieces) == 8
    assert " ".join(pieces) == " ".join([TEXT] * 4)
    assert all(piece.endswith(".") for piece in pieces)
    assert max(map(len, pieces)) < 1.4 * min(map(len, pieces))


@pytest.mark.parametrize(
    "text, sentences",
    [
        ("Das gilt z. B. Für alle. Und hier.", 2),
        ("Siehe Abb. 3 und Dr. Meier. Danach mehr.", 2),
        ("Am 3. Oktober ist frei. Am 4. Oktober nicht.", 2),
        ("Er sagte: „Ja.“ Dann ging er.", 2),
    ],
)
def test_abbreviations_and_ordinals_end_no_sentence(text, sentences):
    assert len(list(units(text))) == sentences


def test_code_is_never_divided():
    code = "```\na = 1\n\nb = 2\n\nc = 3\n```"
    pieces = split_text(f"{TEXT}\n\n{code}\n\n{TEXT}", 100)
    assert sum(code in piece for piece in pieces) == 1


def pages(*texts: str) -> list[Passage]:
    return [Passage(text, number, number) for number, text in enumerate(texts, 1)]


def test_four_slides_make_a_record():
    records = fitted(pages(*["x" * 100] * 8), 100, 4)
    assert [(record.first, record.last) for record in records] == [(1, 4), (5, 8)]


def test_short_neighbors_are_joined_and_long_pages_split():
    records = fitted(pages("a" * 20, "b" * 20, "c" * 90, TEXT, "d" * 100), 100, 1)
    places = [(record.first, record.last, record.part) for record in records]
    assert places == [(1, 3, 0), (4, 4, 1), (4, 4, 2), (4, 4, 3), (4, 4, 4), (5, 5, 0)]


def test_joining_loses_no_text():
    texts = ["a" * 20, "b" * 200, "c" * 30, "d" * 10, "e" * 140]
    joined = "\n\n".join(record.text for record in fitted(pages(*texts), 100, 1))
    assert joined.replace("\n", "") == "".join(texts)


def test_a_page_with_a_word_changed_is_a_duplicate_and_another_text_is_none():
    duplicates = Duplicates(0.8)
    long = " ".join(f"{sentence} Nummer {number}" for number in range(6) for sentence in SENTENCES)
    assert duplicates.original(long, "first") is None
    assert duplicates.original(long.replace("Lärm", "Krach", 1), "second") == "first"
    assert duplicates.original(" ".join(reversed(long.split())), "third") is None


def test_with_similarity_1_only_equal_words_count():
    duplicates = Duplicates(1)
    assert duplicates.original(TEXT, "first") is None
    assert duplicates.original(TEXT.replace("Größe", "Zahl"), "second") is None
    assert duplicates.original(TEXT + "!", "third") == "first"


def test_short_pages_are_duplicates_only_where_they_are_equal():
    duplicates = Duplicates(0.5)
    assert duplicates.original("Teil 1 der Vorlesung", "a") is None
    assert duplicates.original("Teil 2 der Vorlesung", "b") is None
    assert duplicates.original("Teil 2 der Vorlesung", "c") == "b"


def page(number: int, *lines: tuple[float, str]) -> Page:
    return Page(number, 100.0, [Line(text, top=top, bottom=top + 3) for top, text in lines])


def test_headers_footers_and_page_numbers_go_and_the_rest_stays():
    slides = []
    for number in range(1, 6):
        slides.append(
            page(
                number,
                (2, "Vorlesung"),
                (50, "Inhalt"),
                (90, f"Prof. M, {number}"),
                (95, f"{number}"),
            )
        )
    removed = remove_repeats(slides)
    assert [[line.text for line in slide.lines] for slide in slides] == [["Inhalt"]] * 5
    assert removed == {"Vorlesung": 5, "Prof. M, #": 5, "#": 5}


def test_what_stands_on_few_pages_or_in_the_middle_stays():
    slides = [
        page(number, (2, f"Kapitel {'abcdef'[number]}"), (50, "gleich")) for number in range(6)
    ]
    assert remove_repeats(slides) == {}


@pytest.mark.parametrize("text", ["7", "- 7 -", "Seite 7", "Page 7 of 12", "7 / 12", "Folie 3"])
def test_page_numbers_are_known_in_many_forms(text):
    slides = [page(1, (50, "Inhalt"), (95, text))]
    assert sum(remove_repeats(slides).values()) == 1


@pytest.mark.parametrize("text", ["1984 war ein Jahr", "x = 7", "7 Zwerge"])
def test_other_lines_at_the_edge_are_no_page_numbers(text):
    slides = [page(1, (50, "Inhalt"), (95, text))]
    assert not remove_repeats(slides)

"""What stands in a cell, as text: never what Python writes for a list or an object."""

from __future__ import annotations

import json

import pytest

from slim.core.errors import SlimError
from slim.data.cells import as_records, as_text, first_text
from slim.data.examples import Messages, Pairs, Passages, TextData

WHERE = "some.jsonl, line 3: column 'a'"


def part(text: str, kind: str = "text") -> dict:
    return {"type": kind, "text": text}


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("Hello.", "Hello."),
        (None, ""),
        (float("nan"), ""),
        (4, "4"),
        (0.5, "0.5"),
        (True, "true"),
        ([part("Hel"), part("lo.")], "Hello."),
        ([part("Hello.", "output_text")], "Hello."),
        ([{"text": "Hello."}], "Hello."),
        (part("Hello."), "Hello."),
        ([], ""),
    ],
)
def test_a_cell_is_text_a_number_nothing_or_parts(value, text):
    assert as_text(value, WHERE) == text


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (["Hello", "world"], "a list of texts where text is needed. Join the list"),
        ([["a"], "b"], "a list of lists, texts where text"),
        ([part("a"), "b"], "a list of objects, texts where text"),
        ({"text": ["a"], "answer_start": [3]}, r"an object \(text, answer_start\) where text"),
        ({}, r"an object \(empty\)"),
        ([{"text": "a", "score": 1}], "a list of objects"),
        ([part("a"), {"type": "image", "url": "x"}], "a part of type 'image' that holds no text"),
        ([{"type": "text", "text": ["a"]}], "a part of type 'text' that holds no text"),
        (b"Hello.", "holds bytes where text"),
        ("Hello \ud83d.", r"half a character \(\\ud83d"),
        ([part("\udc4b")], "half a character"),
    ],
)
def test_anything_else_is_an_error_that_says_where(value, message):
    with pytest.raises(SlimError, match=f"some.jsonl, line 3: column 'a'.*{message}"):
        as_text(value, WHERE)


@pytest.mark.parametrize(
    ("value", "text"),
    [(["a", "b"], "a"), ([None, "b"], ""), ([3, 4], "3"), ([], ""), ([part("a"), part("b")], "ab")],
)
def test_of_alternatives_the_first_counts(value, text):
    assert first_text(value, WHERE) == text


@pytest.mark.parametrize(
    "value", [[["a", "b"]], {"text": ["a"]}, [{"answer": "a"}], ["a", ["b"]], ["a", part("b")]]
)
def test_alternatives_are_texts(value):
    with pytest.raises(SlimError, match="where text is needed"):
        first_text(value, WHERE)


@pytest.mark.parametrize(
    ("value", "records"),
    [
        ([{"x": 1}], [{"x": 1}]),
        ('[{"x": 1}]', [{"x": 1}]),
        ({"x": [1, 2], "y": [3, 4]}, [{"x": 1, "y": 3}, {"x": 2, "y": 4}]),
        (None, []),
        ({}, []),
    ],
)
def test_a_list_of_objects_may_be_stored_in_three_ways(value, records):
    assert as_records(value, WHERE) == records


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (5, "holds a number where a list of objects"),
        ("Hi.", "holds text that is no list of turns"),
        ("5", "holds a number where a list of objects"),
        ({"x": [1], "y": [1, 2]}, "holds lists of different lengths"),
        ({"x": 1}, "holds an object .x. where a list"),
    ],
)
def test_what_is_no_list_of_objects_is_an_error(value, message):
    with pytest.raises(SlimError, match=f"line 3: column 'a' {message}"):
        as_records(value, WHERE)


# In the data sets


def written(path, rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_messages_of_parts_are_learnt_as_text(tmp_path):
    turns = [
        {"role": "user", "content": [part("Who "), part("is Anna?")]},
        {"role": "assistant", "content": [part("A nurse.")]},
    ]
    text = written(tmp_path / "some.jsonl", [{"messages": turns}])
    (messages,) = Messages(text=text, validation_fraction=0.001).conversations("train")
    assert [message["content"] for message in messages] == ["Who is Anna?", "A nurse."]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([{"type": "image_url", "image_url": {}}], "part of type 'image_url'"),
        ({"parts": ["a"]}, "an object .parts."),
        (["Who", "is"], "a list of texts"),
        ("\ud83d", "half a character"),
    ],
)
def test_other_messages_are_refused_with_file_and_line(tmp_path, content, message):
    good = {"messages": [{"role": "user", "content": "x"}]}
    rows = [good, {"messages": [{"role": "user", "content": content}]}]
    text = written(tmp_path / "some.jsonl", rows)
    with pytest.raises(SlimError, match=f"some.jsonl, line 2: column 'messages'.*{message}"):
        list(Messages(text=text).conversations("train"))


@pytest.mark.parametrize(
    "answer", [{"text": ["a"], "answer_start": [3]}, [["a", "b"]], [{"answer": "a"}]]
)
def test_answers_that_are_no_text_are_refused_with_file_and_line(tmp_path, answer):
    text = written(tmp_path / "some.jsonl", [{"q": "x", "a": "y"}, {"q": "x", "a": answer}])
    with pytest.raises(SlimError, match="some.jsonl, line 2: column 'a' holds a"):
        list(Pairs(text=text, prompt="q", answer="a").pairs("train"))


def test_a_text_column_of_words_is_refused_with_file_and_line(tmp_path):
    text = written(tmp_path / "some.jsonl", [{"text": "x"}, {"text": ["two", "words"]}])
    with pytest.raises(SlimError, match="line 2: column 'text' holds a list of texts"):
        list(TextData(text=text).documents("train"))


def test_passages_may_be_a_list_and_must_have_their_keys(tmp_path):
    passage = {"passage_text": "Anna is a nurse.", "is_selected": 1}
    row = {"query": "Who?", "answers": ["Anna."], "passages": [passage]}
    data = Passages(text=written(tmp_path / "some.jsonl", [row]), validation_fraction=0.001)
    assert list(data.pairs("train")) == [("Who?\n\nAnna is a nurse.", "Anna.")]
    row["passages"] = [{"text": "x"}]
    written(tmp_path / "some.jsonl", [row])
    with pytest.raises(SlimError, match="line 1: column 'passages' has a passage without"):
        list(data.pairs("train"))

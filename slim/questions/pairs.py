"""Questions and answers: read from what a model wrote, and checked against the page they are
about."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass

LABELLED = re.compile(
    r"^\W*(?:question|frage|q)\s*\d*\W*[:.][\s*_]*(?P<question>.+?)\s*\n"
    r"\W*(?:answer|antwort|a)\s*\d*\W*[:.][\s*_]*(?P<answer>.+?)\s*$",
    re.IGNORECASE | re.MULTILINE,
)
# of a question that nobody understands who has not the page in front of them
ABOUT_THE_PAGE = re.compile(
    r"\b(this|the|given|above|following|dieser|diesem|diese|der|dem|im|oben) "
    r"(\w+ )?(text|passage|page|slide|document|picture|figure|table|author|seite|folie|abbildung|"
    r"tabelle|dokument|abschnitt|autor)\b",
    re.IGNORECASE,
)
# words that say nothing of whether an answer is on a page
COMMON_WORDS = """
a an and are as at be by do does for from has have in is it its not of on or that the their they
this to was were which will with yes no

aber als am an auch auf aus bei das dass dem den der des die ein eine einem einen einer er es für
hat im in ist kann mit nach nicht oder sich sie sind über und vom von war werden wie wird zu zum
zur ja nein
"""
COMMON = frozenset(COMMON_WORDS.split())
STEM = 5  # letters by which forms of a word are the same
SHORTEST_QUESTION = 8  # characters
LONGEST = 1000  # characters of a question or an answer
ON_PAGE = 0.6  # share of an answer's words that stand on its page
AGREEMENT = 0.4  # F1 of the words of two answers that say the same


@dataclass
class Pair:
    """A question with its answer.

    Attributes:
        question: one.
        answer: what is right.
    """

    question: str
    answer: str


def read_pairs(text: str) -> list[Pair]:
    """Return the questions and answers in what a model wrote: JSON objects, one a line or in a
    list, or lines that begin with ``Question:`` and ``Answer:``.

    Args:
        text: of the model; what is around them is passed over.
    """
    pairs = []
    for row in _objects(text):
        lower = {str(key).lower(): value for key, value in row.items()}
        question = lower.get("question", lower.get("frage"))
        answer = lower.get("answer", lower.get("antwort"))
        if isinstance(question, str) and isinstance(answer, (str, int, float)):
            pairs.append(Pair(question.strip(), str(answer).strip()))
    if not pairs:
        for match in LABELLED.finditer(text):
            pairs.append(Pair(match["question"].strip(), match["answer"].strip()))
    return pairs


def _objects(text: str) -> Iterator[dict]:
    """Yield the JSON objects in a text, those of lists too."""
    decoder = json.JSONDecoder()
    place = text.find("{")
    while place >= 0:
        try:
            value, end = decoder.raw_decode(text, place)
        except (ValueError, RecursionError):
            end = place + 1
            value = None
        if isinstance(value, dict):
            yield value
        place = text.find("{", end)


def problem_of(pair: Pair) -> str:
    """Return why a question is useless without its page; empty where it is not."""
    if len(pair.question) < SHORTEST_QUESTION or not pair.answer:
        return "too short"
    if max(len(pair.question), len(pair.answer)) > LONGEST:
        return "too long"
    if ABOUT_THE_PAGE.search(pair.question):
        return "asks about the page itself"
    return ""


def stems(text: str) -> list[str]:
    """Return the beginnings of the words that say something."""
    words = re.findall(r"\w+", text.lower())
    return [word[:STEM] for word in words if word not in COMMON]


def is_on_page(answer: str, page: str) -> bool:
    """Whether most words of an answer stand on a page.

    Args:
        answer: of the question.
        page: its text.
    """
    wanted = set(stems(answer))
    if not wanted:
        return False
    return len(wanted & set(stems(page))) >= ON_PAGE * len(wanted)


def agree(first: str, second: str) -> bool:
    """Whether two answers say the same, by the F1 of their words."""
    one = set(stems(first))
    two = set(stems(second))
    common = len(one & two)
    if not common:
        return False
    return 2 * common / (len(one) + len(two)) >= AGREEMENT

"""Tokens to text while they come."""

from __future__ import annotations

import pytest

from slim.serve.text import TextStream
from tests.conftest import ROOT


@pytest.fixture(scope="module")
def tokenizer():
    from slim.checkpoints.tokenizer import load_tokenizer

    return load_tokenizer(ROOT / "slim" / "assets" / "tiny")


def pieces(stream: TextStream, tokens) -> list[str]:
    shown = []
    for token in tokens:
        shown.append(stream.add(token))
        if stream.stopped:
            break
    return [*shown, stream.finish()]


def spell(tokens: list[int]) -> str:
    """A decoder whose tokens are bytes."""
    return bytes(tokens).decode(errors="replace")


def test_pieces_together_are_the_text(tokenizer):
    text = "A judge works in the court. Grüße, 北京!"
    tokens = tokenizer(text)["input_ids"]
    shown = pieces(TextStream(tokenizer.decode), tokens)
    assert "".join(shown) == tokenizer.decode(tokens)
    assert sum(bool(piece) for piece in shown) > 5


def test_half_a_character_is_held_back():
    shown = pieces(TextStream(spell), "aü北".encode())
    assert shown == ["a", "", "ü", "", "", "北", ""]


def test_bytes_that_never_become_a_character_are_shown():
    tokens = [*b"a", *[0xFF] * 9, *b"b"]
    assert "".join(pieces(TextStream(spell), tokens)) == spell(tokens)


def test_a_stop_text_ends_it_and_is_not_shown():
    stream = TextStream(spell, ("User:", "###"))
    assert "".join(pieces(stream, b"Yes. User: no")) == "Yes. "
    assert stream.stopped


def test_what_only_begins_like_a_stop_text_is_shown():
    stream = TextStream(spell, ("User:",))
    assert "".join(pieces(stream, b"Use it, Us")) == "Use it, Us"
    assert not stream.stopped

"""A model's answers."""

from __future__ import annotations

import pytest

from slim.core.errors import SlimError
from slim.evaluation.generation import continue_ids
from slim.serve.model import Answer, TooLong
from slim.serve.sampling import Sampling
from tests.support.answering import ANSWER, QUESTION, tiny, user


def answered(ids, **settings) -> tuple[str, Answer]:
    answer = Answer(len(ids))
    return "".join(tiny().answer(ids, Sampling(**settings), answer)), answer


def test_the_answer_is_that_of_the_evaluation():
    model = tiny()
    ids = model.chat_ids([user(QUESTION)])
    expected = continue_ids(model.model, model.tokenizer, ids, 64)
    assert answered(ids)[0] == expected
    assert expected.strip() == ANSWER


def test_a_prompt_read_in_parts_gives_the_same(monkeypatch):
    ids = tiny().chat_ids([user(QUESTION)])
    whole = answered(ids)[0]
    monkeypatch.setattr("slim.serve.model.READ_AT_ONCE", 3)
    assert answered(ids)[0] == whole


def test_how_it_ended_is_told():
    ids = tiny().chat_ids([user(QUESTION)])
    assert answered(ids)[1].finish_reason == "stop"
    text, answer = answered(ids, max_tokens=3)
    assert (answer.finish_reason, answer.tokens) == ("length", 3)
    text, answer = answered(ids, stop=("works",))
    assert (answer.finish_reason, text) == ("stop", " A judge ")


def test_a_full_context_ends_an_answer():
    ids = tiny().text_ids("One day Sara ")
    ids = (ids * 200)[:510]
    assert answered(ids)[1].tokens <= 2
    assert answered(ids)[1].finish_reason in ("length", "stop")


def test_a_prompt_without_room_is_refused():
    with pytest.raises(TooLong, match="The prompt has 512 tokens, and tiny has a context of 512"):
        answered([5] * 512)


def test_it_can_be_cancelled_between_two_tokens():
    ids = tiny().chat_ids([user(QUESTION)])
    answer = Answer(len(ids))
    pieces = []
    for piece in tiny().answer(ids, Sampling(), answer, lambda: len(pieces) >= 2):
        pieces.append(piece)
    assert answer.finish_reason == "cancelled"
    assert 2 <= answer.tokens <= 3


def test_an_empty_text_begins_with_the_beginning():
    assert tiny().text_ids("") == [tiny().tokenizer.bos_token_id]


def test_a_system_prompt_that_the_template_drops_is_refused():
    messages = [{"role": "system", "content": "Be kind."}, user(QUESTION)]
    with pytest.raises(SlimError, match="leaves out what a system says"):
        tiny().chat_ids(messages)

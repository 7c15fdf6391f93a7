"""Answers scored together with their question, against lm-eval's own way: a row for every answer."""

from __future__ import annotations

import random

import pytest
import torch
from lm_eval.models.huggingface import HFLM

from slim.checkpoints.tokenizer import load_tokenizer
from slim.evaluation.choices import Row, batches, fits, score, visible
from slim.evaluation.harness import LoadedModel
from slim.loading.load_model import load_model
from tests.conftest import build_small

LONGEST = 256


def asked(questions: int = 9, seed: int = 0) -> list[tuple]:
    """Return random questions with one to four answers each, in a random order."""
    draw = random.Random(seed)
    requests = []
    for number in range(questions):
        question = [draw.randrange(2, 1536) for _ in range(draw.randint(1, 30))]
        for choice in range(draw.randint(1, 4)):
            answer = [draw.randrange(2, 1536) for _ in range(draw.randint(1, 9))]
            requests.append(((f"q{number}", f"a{choice}"), question, answer))
    draw.shuffle(requests)
    return requests


def lm_evals(model, tokenizer, requests) -> list[tuple[float, bool]]:
    lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4, max_length=LONGEST)
    return lm._loglikelihood_tokens(requests, disable_tqdm=True)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gemma3_text", "qwen3", "phi3", "mistral"])
def test_equals_a_row_for_every_answer(family, tmp_path):
    model = load_model(build_small(family, tmp_path))
    tokenizer = load_tokenizer(tmp_path)
    requests = asked()
    assert fits(model, requests, LONGEST)
    expected = lm_evals(model, tokenizer, requests)
    found = score(model, requests, 6, lambda answers: None)
    assert [number for number, _ in found] == pytest.approx(
        [number for number, _ in expected], rel=1e-4, abs=1e-4
    )
    assert [same for _, same in found] == [same for _, same in expected]


def test_says_when_the_model_would_have_said_it(small_llama):
    model = load_model(small_llama)
    question = [5, 9, 700]
    with torch.no_grad():
        first = int(model(torch.tensor([question])).logits[0, -1].argmax())
        second = int(model(torch.tensor([[*question, first]])).logits[0, -1].argmax())
    answers = [[first, second], [first, second + 1], [first + 1]]
    requests = [(("q", "a"), question, answer) for answer in answers]
    said = [same for _, same in score(model, requests, None, lambda answers: None)]
    assert said == [True, False, False]


def test_every_answer_counts_once_in_the_progress(small_llama):
    model, requests, seen = load_model(small_llama), asked(), []
    score(model, requests, 5, seen.append)
    assert sum(seen) == len(requests)


def test_a_batch_holds_so_many_answers():
    rows = [Row((1,), [[2], [3]], [0, 1]) for _ in range(5)]
    assert [len(batch) for batch in batches(rows, 4)] == [2, 2, 1]


def test_a_question_with_more_answers_than_a_batch_stays_whole():
    rows = [Row((1,), [[2]] * 9, list(range(9)))]
    assert [len(batch) for batch in batches(rows, 4)] == [1]


def test_no_answer_sees_another():
    mask = visible(torch.tensor([[0, 0, 1, 1, 2, -1]]), torch.float32)[0, 0] == 0
    assert mask.tolist() == [
        [True, False, False, False, False, False],
        [True, True, False, False, False, False],
        [True, True, True, False, False, False],
        [True, True, True, True, False, False],
        [True, True, False, False, True, False],
        [True, True, False, False, False, True],
    ]


def test_what_has_to_be_cut_is_left_to_lm_eval(small_llama):
    model = load_model(small_llama)
    assert fits(model, [(("q", "a"), [1] * 200, [1] * 57)], LONGEST)
    assert not fits(model, [(("q", "a"), [1] * 200, [1] * 58)], LONGEST)
    assert not fits(model, [(None, [1], [1, 2])], LONGEST)


def test_tasks_are_scored_this_way(small_llama, monkeypatch):
    model, tokenizer = load_model(small_llama), load_tokenizer(small_llama)
    lm = LoadedModel(model, tokenizer, 8, LONGEST)
    monkeypatch.setattr(lm, "_model_call", None)  # lm-eval's way would call it
    requests = asked()
    assert len(lm._loglikelihood_tokens(requests)) == len(requests)

"""The choice of the next token."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from transformers import GenerationConfig

from slim.core.errors import SlimError
from slim.serve.sampling import Sampler, Sampling, recommended

LOGITS = torch.tensor([0.0, 3.0, 2.0, 1.0, -1.0])


def draws(count: int = 300, prompt=(), **settings) -> Counter:
    sampling = Sampling(**{"temperature": 1.0, "seed": 0, **settings})
    sampler = Sampler(sampling, list(prompt))
    return Counter(sampler.choose(LOGITS) for _ in range(count))


def test_without_temperature_the_most_likely_token_is_taken():
    assert draws(temperature=0.0) == {1: 300}


def test_draws_follow_the_probabilities():
    share = draws(3000)[1] / 3000
    assert share == pytest.approx(float(LOGITS.softmax(-1)[1]), abs=0.03)


def test_temperature_flattens():
    hot, cold = draws(temperature=2.0), draws(temperature=0.5)
    assert hot[1] < draws()[1] < cold[1]


def test_top_k_leaves_that_many():
    assert set(draws(top_k=2)) == {1, 2}


def test_top_p_keeps_the_token_that_crosses_the_limit():
    # probabilities 0.63, 0.23, 0.09, ...
    assert set(draws(top_p=0.7)) == {1, 2}
    assert set(draws(top_p=0.0)) == {1}


def test_min_p_is_a_share_of_the_most_likely():
    # 2 is exp(-1) = 0.37 times as likely as 1, 3 is 0.14 times
    assert set(draws(min_p=0.3)) == {1, 2}


def test_the_same_seed_draws_the_same():
    assert [Sampler(Sampling(temperature=1.0, seed=5), []).choose(LOGITS) for _ in range(3)] == [
        Sampler(Sampling(temperature=1.0, seed=5), []).choose(LOGITS)
    ] * 3


def test_a_repetition_penalty_counts_the_prompt():
    sampler = Sampler(Sampling(repetition_penalty=2.0), [1])
    assert sampler.choose(LOGITS) == 2  # 3 / 2 is less than 2


def test_a_frequency_penalty_grows_with_every_time():
    sampler = Sampler(Sampling(frequency_penalty=0.6), [1])
    # 1 has 3.0, then 2.4, then 1.8: less than 2, which then has 1.4
    assert [sampler.choose(LOGITS) for _ in range(4)] == [1, 1, 2, 1]


def test_no_numbers_are_an_error():
    with pytest.raises(SlimError, match="computes no numbers"):
        Sampler(Sampling(), []).choose(torch.tensor([1.0, float("nan")]))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": 3}, "temperature=3: must be a number from 0 to 2"),
        ({"top_k": 1.5}, "top_k=1.5: must be a whole number"),
        ({"stop": ("",)}, "stop: must be texts"),
        ({"stop": ("a", "b", "c", "d", "e")}, "Give at most 4"),
        ({"heat": 1}, "There is no setting heat"),
    ],
)
def test_wrong_settings_are_named(settings, message):
    with pytest.raises(SlimError, match=message):
        Sampling().changed(settings)


def test_a_checkpoint_that_samples_recommends_how():
    config = GenerationConfig(do_sample=True, temperature=0.6, top_p=0.9)
    assert recommended(config).temperature == 0.6
    assert recommended(config).top_p == 0.9


def test_a_checkpoint_that_does_not_say_is_greedy():
    assert recommended(GenerationConfig()) == Sampling()

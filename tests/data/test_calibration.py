"""Calibration samples: texts that are too short, and tokens that the model does not know."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

from slim.checkpoints.source import EMBEDDED
from slim.checkpoints.tokenizer import load_tokenizer
from slim.core.errors import SlimError
from slim.data.calibration import Calibration
from slim.pruning.calibrated import chosen_windows


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(EMBEDDED["tiny"])


def text_of(tokenizer, path, tokens: int) -> str:
    """Write a text of exactly so many tokens and return its path."""
    path.write_text(" a" * tokens)
    assert len(tokenizer(path.read_text())["input_ids"]) == tokens
    return str(path)


def test_the_share_of_overlap_is_said(tokenizer, tmp_path, capsys):
    text = text_of(tokenizer, tmp_path / "some.txt", 450)
    tokens = Calibration(text, samples=128, length=256).tokens(tokenizer, 512)
    # all 450 tokens are drawn at most once each: 1 - 450 / (128 * 256) = 98.6 % at least
    said = " ".join(capsys.readouterr().err.split())
    assert tokens.shape == (128, 256)
    assert "has 450 tokens, too few for 128 samples of 256: 99% of the sampled tokens" in said
    assert "Give a longer text or calibration.samples=1." in said


def test_the_share_is_that_of_the_tokens_drawn_more_than_once(tokenizer, tmp_path, capsys):
    text = text_of(tokenizer, tmp_path / "some.txt", 8)
    Calibration(text, samples=4, length=8).tokens(tokenizer, 512)
    assert "75% of the sampled tokens are repeats" in " ".join(capsys.readouterr().err.split())


def test_enough_text_is_not_worth_a_word(tokenizer, tmp_path, capsys):
    text = text_of(tokenizer, tmp_path / "some.txt", 64)
    Calibration(text, samples=4, length=16).tokens(tokenizer, 512)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("available", [8, 31])
def test_the_advice_for_a_short_text_can_be_followed(tokenizer, tmp_path, available):
    text = text_of(tokenizer, tmp_path / "some.txt", available)
    with pytest.raises(SlimError, match=f"has {available} tokens, fewer than one") as error:
        Calibration(text, length=32).tokens(tokenizer, 512)
    length = int(re.search(r"calibration.length=(\d+)", str(error.value))[1])
    assert Calibration(text, length=length, samples=1).tokens(tokenizer, 512).shape[1] == length


@pytest.mark.parametrize("available", [0, 5, 7])
def test_for_a_text_shorter_than_any_sample_only_a_longer_one_helps(tokenizer, tmp_path, available):
    text = text_of(tokenizer, tmp_path / "some.txt", available)
    with pytest.raises(SlimError, match=rf"has {available} tokens.*Give a longer text\.$"):
        Calibration(text).tokens(tokenizer, 512)


def test_a_pruners_own_length_is_what_has_to_change(tokenizer, tmp_path):
    text = text_of(tokenizer, tmp_path / "some.txt", 20)
    windows = chosen_windows(Calibration(text), samples=None, length=64)
    with pytest.raises(SlimError, match="or pruner.length=20"):
        windows.tokens(tokenizer, 512)


def test_a_token_beyond_the_embedding_is_an_error(small_llama, tmp_path):
    folder = Path(shutil.copytree(small_llama, tmp_path / "model"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "vocab_size": 700}))
    with pytest.raises(SlimError, match="but the embedding has 700 rows"):
        Calibration("tiny:calibration", samples=1, length=8).tokens(load_tokenizer(folder), 512)

"""What may be named as a model."""

from __future__ import annotations

import shutil

import pytest

from slim.core.errors import SlimError
from slim.serve.resolve import find_model, find_models
from tests.conftest import ROOT
from tests.support.encoding import build_encoder

TINY = ROOT / "slim" / "assets" / "tiny"


@pytest.fixture
def store(tmp_path):
    for name in ("prune-0123456789abcdef", "tune-0123aaaaaaaaaaaa"):
        shutil.copytree(TINY, tmp_path / "stages" / name)
    (tmp_path / "stages" / "tune-0123bbbb.partial").mkdir()
    return str(tmp_path)


@pytest.mark.parametrize("name", ["prune-0123456789abcdef", "01234", "prune-0123"])
def test_a_result_is_found_by_name_or_digits(store, name):
    assert find_model(name, store).checkpoint.folder.name == "prune-0123456789abcdef"


def test_digits_of_several_results_are_refused(store):
    with pytest.raises(SlimError, match="0123 may mean prune-0123456789abcdef, tune-0123aaaa"):
        find_model("0123", store)


def test_folders_of_the_same_name_are_told_apart(tmp_path):
    for parent in ("a", "b"):
        shutil.copytree(TINY, tmp_path / parent / "model")
    names = [str(tmp_path / "a" / "model"), str(tmp_path / "b" / "model")]
    assert [model.name for model in find_models(names, "runs")] == ["model", "model-2"]


def test_the_chain_is_told():
    assert find_model("tiny", "runs").chain == "initialise untrained > tune full"


def test_a_file_that_is_no_model_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(SlimError, match="is a file that is no GGUF file"):
        find_model(str(tmp_path / "notes.txt"), "runs")


def test_an_encoder_is_refused(tmp_path):
    build_encoder("bert", tmp_path / "bert")
    with pytest.raises(SlimError, match="is an encoder, which writes no text"):
        find_models([str(tmp_path / "bert")], "runs")

"""Tokenizers that the installed library cannot read, and tokens that the model has no row for."""

from __future__ import annotations

import json
import shutil

import pytest

from slim.checkpoints.tokenizer import load_tokenizer
from slim.core.errors import SlimError
from tests.conftest import ROOT
from tests.support.folders import change_json

ROWS = 1536  # of the embedded model's embedding


@pytest.fixture
def folder(tmp_path):
    return shutil.copytree(ROOT / "slim" / "assets" / "tiny", tmp_path / "model")


def change_tokenizer(folder, change):
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    change(content)
    path.write_text(json.dumps(content), encoding="utf-8")


@pytest.mark.parametrize(
    "change",
    [
        lambda content: content["model"].update(type="BPE7", merges=[["a", "b", "c"]]),
        lambda content: content.update(pre_tokenizer={"type": "ByteLevel7"}),
        lambda content: content.pop("model"),
        lambda content: content["model"].update(vocab=[1, 2]),
    ],
)
def test_a_tokenizer_that_cannot_be_read_is_named(folder, change):
    change_tokenizer(folder, change)
    with pytest.raises(SlimError, match="The tokenizer in .* cannot be loaded"):
        load_tokenizer(folder)


def add(content, text="<extra>", number=ROWS):
    token = {"id": number, "content": text, "special": True, "single_word": False}
    flags = {"lstrip": False, "rstrip": False, "normalized": False}
    content["added_tokens"].append({**token, **flags})


def test_a_token_beyond_the_embedding_is_refused_where_it_occurs(folder):
    rows = max(load_tokenizer(folder).get_vocab().values()) + 1
    change_json(folder / "config.json", vocab_size=rows)
    change_tokenizer(folder, lambda content: add(content, number=rows))
    tokenizer = load_tokenizer(folder)
    assert tokenizer("a text without it").input_ids
    for read in (tokenizer, tokenizer.encode, lambda text: tokenizer([text, "b"])):
        with pytest.raises(SlimError, match=f"gives '<extra>' the id {rows}"):
            read("a text <extra> with it")


def test_padding_beyond_the_embedding_gives_way(folder):
    rows = max(load_tokenizer(folder).get_vocab().values()) + 1
    change_json(folder / "config.json", vocab_size=rows)
    change_tokenizer(folder, lambda content: add(content, "<padding>", rows))
    change_json(folder / "tokenizer_config.json", pad_token="<padding>")
    tokenizer = load_tokenizer(folder)
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    padded = tokenizer(["a longer text than the other", "b"], padding=True).input_ids
    assert max(max(ids) for ids in padded) < rows

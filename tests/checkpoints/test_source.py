"""Sources: folders, hub ids, and what goes wrong with them; the fresh model."""

from __future__ import annotations

import pytest

from slim.checkpoints.checkpoint import open_checkpoint
from slim.checkpoints.source import Source
from slim.checkpoints.stage import Context
from slim.checkpoints.tokenizer import load_tokenizer
from slim.checkpoints.untrained import Untrained
from slim.core.errors import SlimError
from slim.loading.load_model import load_model


def hub_cache(tmp_path, source, name="org/name"):
    """Lay out ``source`` as the hub's library caches a download."""
    from slim.core.io import sha256

    root = tmp_path / "hub" / f"models--{name.replace('/', '--')}"
    snapshot = root / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    (root / "blobs").mkdir()
    (root / "refs").mkdir()
    (root / "refs" / "main").write_text("a" * 40)
    for path in source.iterdir():
        blob = root / "blobs" / sha256(path)
        blob.write_bytes(path.read_bytes())
        (snapshot / path.name).symlink_to(blob)
    return snapshot


def test_a_hub_model_is_found_in_the_local_cache(small_llama, tmp_path, monkeypatch):
    import huggingface_hub.constants

    snapshot = hub_cache(tmp_path, small_llama)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    for module in ("file_download", "_snapshot_download"):
        monkeypatch.setattr(
            f"huggingface_hub.{module}.constants.HF_HUB_CACHE", str(tmp_path / "hub")
        )
    source = Source("org/name")
    assert source.describe().blocks == 6
    assert source.resolve().folder == snapshot
    assert source.label == "org/name"


def test_without_a_network_a_hub_model_is_a_clear_error():
    with pytest.raises(SlimError, match="the hub cannot be reached"):
        Source("org/not-here").resolve()
    with pytest.raises(SlimError, match="the hub cannot be reached"):
        Source("org/not-here").describe()


@pytest.mark.parametrize("source", ["./not/there", "/not/there", "missing", "a/b/c"])
def test_a_missing_folder_is_a_clear_error(source):
    with pytest.raises(SlimError, match="There is no folder"):
        Source(source).describe()


def test_a_missing_source_is_a_clear_error():
    with pytest.raises(SlimError, match="model.source is missing"):
        Source(None)


def test_the_fresh_model_is_what_its_settings_say(tmp_path):
    settings = Untrained(
        vocab_size=600, hidden_size=64, intermediate_size=128, blocks=3, heads=4, kv_heads=2, seed=1
    )
    facts = [settings.run(None, folder, Context()) for folder in make_folders(tmp_path, "a", "b")]
    assert facts == [{}, {}]
    checkpoint = open_checkpoint(tmp_path / "a")
    assert checkpoint.spec.parameters() == settings.describe().parameters()
    model, tokenizer = load_model(tmp_path / "a"), load_tokenizer(tmp_path / "a")
    assert (
        sum(parameter.numel() for parameter in model.parameters()) == checkpoint.spec.parameters()
    )
    assert model.config.eos_token_id == tokenizer.eos_token_id is not None
    assert (tmp_path / "a" / "model.safetensors").read_bytes() == (
        tmp_path / "b" / "model.safetensors"
    ).read_bytes()
    Untrained(vocab_size=600, hidden_size=64, intermediate_size=128, blocks=3, seed=2).run(
        None, make_folders(tmp_path, "c")[0], Context()
    )
    assert (tmp_path / "a" / "model.safetensors").read_bytes() != (
        tmp_path / "c" / "model.safetensors"
    ).read_bytes()


def make_folders(tmp_path, *names):
    folders = [tmp_path / name for name in names]
    for folder in folders:
        folder.mkdir()
    return folders


def test_texts_are_read_and_mistakes_in_them_named(tmp_path):
    from slim.data.text import Text

    path = tmp_path / "text.jsonl"
    path.write_text('{"text": "one", "page": "x"}\n\n{"text": "two", "page": "y"}\n')
    assert list(Text(str(path)).documents()) == ["one", "two"]
    assert Text(str(path), column="page").joined() == "x\n\ny"
    before = Text(str(path)).text_identity()
    with pytest.raises(SlimError, match=r"line 1: no column 'body' \(has: text, page\)"):
        list(Text(str(path), column="body").documents())
    path.write_text('{"text": "one"}\nnot json\n')
    assert Text(str(path)).text_identity() != before
    with pytest.raises(SlimError, match="line 2: not JSON"):
        list(Text(str(path)).documents())
    path.write_text('["one"]\n')
    with pytest.raises(SlimError, match="line 1: list where an object with columns is needed"):
        list(Text(str(path)).documents())
    with pytest.raises(SlimError, match="There is no text"):
        Text(str(tmp_path / "missing.txt"))
    (tmp_path / "text.xlsx").write_text("a")
    with pytest.raises(SlimError, match="Allowed endings"):
        Text(str(tmp_path / "text.xlsx"))
    with pytest.raises(SlimError, match="cannot be loaded"):
        list(Text("org/not-here").documents())

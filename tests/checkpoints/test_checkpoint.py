"""Opening, checking, reading and writing checkpoint folders."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from slim.checkpoints.checkpoint import checksums, open_checkpoint
from slim.checkpoints.reader import TensorReader
from slim.checkpoints.shards import ShardWriter
from slim.checkpoints.tokenizer import load_tokenizer
from slim.checkpoints.writer import write_blocks
from slim.core.errors import SlimError
from slim.loading.load_model import load_model
from slim.models.spec import ModelSpec
from slim.quantization.storage import weight_bytes
from tests.conftest import build_small


@pytest.fixture
def folder(small_llama, tmp_path):
    return shutil.copytree(small_llama, tmp_path / "model")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: shutil.rmtree(folder), "There is no folder"),
        (lambda folder: [path.unlink() for path in folder.iterdir()], "is empty"),
        (lambda folder: (folder / "config.json").unlink(), "no config.json"),
        (lambda folder: (folder / "tokenizer.json").unlink(), "no tokenizer"),
        (
            lambda folder: (folder / "model.safetensors").rename(folder / "pytorch_model.bin"),
            "pickled weights only",
        ),
        (lambda folder: (folder / "model.safetensors").unlink(), "lacks the weights"),
        (lambda folder: (folder / "config.json").write_text("{"), "Cannot read"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"abc"), "truncated"),
        (
            lambda folder: (folder / "model.safetensors").write_bytes(
                b"\x08" + b"\0" * 7 + b"not json"
            ),
            "damaged header",
        ),
    ],
)
def test_unusable_folders_are_refused(folder, damage, message):
    damage(folder)
    with pytest.raises(SlimError, match=message):
        open_checkpoint(folder).config  # noqa: B018


@pytest.mark.parametrize("change", [-1, 1])
def test_a_weight_file_of_the_wrong_length_is_refused(folder, change):
    path = folder / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[:change] if change < 0 else data + b"\0")
    with pytest.raises(SlimError, match="its header asks for"):
        open_checkpoint(folder)


def test_one_altered_byte_changes_the_checksum(folder):
    before = checksums(folder)
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    after = checksums(folder)
    assert [name for name in before if before[name] != after[name]] == ["model.safetensors"]


@pytest.mark.parametrize("shard_bytes", [1, 50_000, 2**30])
def test_shards_hold_what_was_added(folder, tmp_path, shard_bytes):
    target = tmp_path / "target"
    target.mkdir()
    reader, writer = TensorReader(open_checkpoint(folder)), ShardWriter(target, shard_bytes)
    for name in reader.checkpoint.tensors:
        writer.add(name, reader.read(name))
    writer.close()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(folder / name, target)
    copy = open_checkpoint(target)
    assert (len(copy.weight_files) > 1) == (shard_bytes < 2**30)
    original = load_file(folder / "model.safetensors")
    assert set(copy.tensors) == set(original)
    assert all(
        torch.equal(TensorReader(copy).read(name), tensor) for name, tensor in original.items()
    )
    tokens = torch.arange(3, 40)[None]
    with torch.no_grad():
        assert torch.equal(load_model(target)(tokens).logits, load_model(folder)(tokens).logits)


def test_write_blocks_equals_removing_layers_by_hand(folder, tmp_path):
    kept, target = [0, 2, 5], tmp_path / "target"
    target.mkdir()
    write_blocks(open_checkpoint(folder), target, kept)
    expected = load_model(folder)
    expected.model.layers = torch.nn.ModuleList(expected.model.layers[index] for index in kept)
    expected.config.num_hidden_layers = len(kept)
    tokens = torch.arange(3, 60)[None]
    with torch.no_grad():
        assert torch.equal(
            load_model(target)(tokens).logits, expected(tokens, use_cache=False).logits
        )
    assert load_tokenizer(target)("hello").input_ids == load_tokenizer(folder)("hello").input_ids


def test_per_block_lists_of_the_config_are_cut():
    types = ["full_attention", "sliding_attention"] * 2
    config = dict(
        model_type="qwen2", hidden_size=64, num_hidden_layers=4, num_attention_heads=4, intermediate_size=128,
        vocab_size=100, layer_types=types,
    )  # fmt: skip
    assert ModelSpec(config).with_blocks([0, 3]).config["layer_types"] == [types[0], types[3]]


def test_missing_weights_are_an_error_not_random(folder):
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.3.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(SlimError, match="model.layers.3.mlp.up_proj.weight"):
        load_model(folder)


@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize("tied", [True, False])
def test_parameters_are_counted_from_the_config_alone(tmp_path, model_type, tied):
    folder = build_small(model_type, tmp_path / "model", tie_word_embeddings=tied)
    spec = open_checkpoint(folder).spec
    model = load_model(folder)
    assert spec.parameters() == sum(parameter.numel() for parameter in model.parameters())
    assert weight_bytes(spec) == pytest.approx(open_checkpoint(folder).bytes_on_disk, rel=0.05)
    linears = {
        name: (module.out_features, module.in_features)
        for name, module in model.model.layers[0].named_modules()
        if isinstance(module, torch.nn.Linear)
    }
    assert spec.block_linears() == linears


def test_published_parameter_count_of_tinyllama(shared):
    reference = json.loads((shared / "reference" / "width_counts_tinyllama.json").read_text())
    config = dict(
        model_type="llama", hidden_size=2048, intermediate_size=5632, num_hidden_layers=22, num_attention_heads=32,
        num_key_value_heads=4, vocab_size=32000,
    )  # fmt: skip
    assert ModelSpec(config).parameters() == reference["rows"][0]["params"]


def test_an_unknown_family_says_how_to_describe_it():
    config = dict(
        model_type="gpt_neox", hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128,
        vocab_size=100,
    )  # fmt: skip
    with pytest.raises(SlimError, match="(?s)gpt_neox.*Family"):
        _ = ModelSpec(config).family

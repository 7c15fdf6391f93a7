"""Models whose blocks differ in size, as pruning leaves them: llama.cpp's architecture ``deci``."""

from __future__ import annotations

import pytest

from slim.checkpoints.checkpoint import open_checkpoint
from slim.core.errors import SlimError
from slim.gguf.metadata import architecture_of
from slim.gguf.mixes import mixed_types
from slim.gguf.quantizer import Gguf
from slim.gguf.reader import GgufModel
from slim.gguf.stage import ImportGguf
from slim.loading.load_model import load_model
from slim.models.spec import ModelSpec
from slim.quantization.methods.rtn import RTN
from tests.gguf.test_gguf_export import checkpoint_of, difference, imported, written
from tests.gguf.test_gguf_import import load
from tests.support.gguf_files import SIZES
from tests.support.stages import run

CHANNELS = {"0": {"intermediate_size": 96}, "2": {"intermediate_size": 32}}
HEADS = {"0": {"intermediate_size": 96}, "1": {"num_attention_heads": 2, "num_key_value_heads": 1}}
MODELS = {
    "channels differ": ("llama", {"per_layer_config": CHANNELS}),
    "channels differ, biases": (
        "llama",
        {"per_layer_config": CHANNELS, "attention_bias": True, "mlp_bias": True},
    ),
    "heads differ": ("mistral", {"per_layer_config": HEADS, "sliding_window": None}),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_model_of_differing_blocks_comes_back(name, tmp_path):
    family, changes = MODELS[name]
    source, result = written(family, tmp_path, **changes)
    assert GgufModel(result / "model.gguf").metadata["general.architecture"] == "deci"
    folder = imported(result / "model.gguf", tmp_path / "folder")
    assert open_checkpoint(folder).config["model_type"] == family
    assert difference(load(folder), load(source)) < 1e-5


def test_the_file_lists_sizes_by_block(tmp_path):
    _, result = written("mistral", tmp_path, **MODELS["heads differ"][1])
    metadata = GgufModel(result / "model.gguf").metadata
    assert metadata["deci.feed_forward_length"] == [96, 128, 128]
    assert metadata["deci.attention.head_count"] == [4, 2, 4]
    assert metadata["deci.attention.head_count_kv"] == [2, 1, 2]


def test_packed_layers_of_differing_blocks(tmp_path):
    family, changes = MODELS["heads differ"]
    source = checkpoint_of(family, tmp_path / "source", **changes)
    run(RTN(bits=8, symmetric=True, group_size=32, format="gguf"), source, tmp_path / "result")
    folder = imported(tmp_path / "result" / "model.gguf", tmp_path / "folder")
    assert difference(load(folder), load_model(tmp_path / "result", "float32")) < 1e-5


def test_types_where_blocks_differ():
    config = {**SIZES, "model_type": "mistral", "per_layer_config": HEADS}
    spec = ModelSpec(config)
    assert architecture_of(spec)[0] == "deci"
    assert mixed_types(spec, "Q4_K_M")["model.layers.2.self_attn.v_proj"] == "Q6_K"
    assert Gguf("Q8_0").types(spec)["model.layers.1.self_attn.o_proj"] == "Q8_0"


@pytest.mark.parametrize(
    ("key", "sizes", "message"),
    [
        ("feed_forward_length", [96, 0, 128], "block 1 has no attention or no MLP"),
        ("attention.head_count", [4, 2], "lists 2 numbers for 3 blocks"),
        ("attention.head_count_kv", [2, -1, 2], "is -1, where a count belongs"),
    ],
)
def test_sizes_that_are_not_imported(key, sizes, message, tmp_path):
    _, result = written("mistral", tmp_path, **MODELS["heads differ"][1])
    stage = ImportGguf(result / "model.gguf")
    stage.model.metadata[f"deci.{key}"] = sizes
    with pytest.raises(SlimError, match=message):
        stage.describe()

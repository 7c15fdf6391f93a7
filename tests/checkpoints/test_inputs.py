"""Folders that other tools wrote: read as they are meant, or refused by name. Variants of what users
of other tools reported."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from slim.checkpoints.checkpoint import checksums, open_checkpoint
from slim.checkpoints.reader import TensorReader, from_float8
from slim.checkpoints.shards import ShardWriter
from slim.checkpoints.source import Source
from slim.checkpoints.stage import Context
from slim.checkpoints.verify import verify
from slim.checkpoints.writer import write_blocks
from slim.core.errors import SlimError
from slim.core.io import read_header
from slim.loading.load_model import load_model
from slim.pruning.weights import MagnitudeWeights
from tests.conftest import build_small
from tests.support.folders import change_json, change_tensors, rename_tensors

TOKENS = torch.arange(3, 40)[None]
PROJECTION = "model.layers.2.self_attn.q_proj"


@pytest.fixture(scope="module")
def untied(tmp_path_factory):
    folder = tmp_path_factory.mktemp("untied") / "model"
    return build_small("llama", folder, tie_word_embeddings=False, num_hidden_layers=3)


@pytest.fixture
def folder(untied, tmp_path):
    return shutil.copytree(untied, tmp_path / "model")


def logits(folder):
    with torch.no_grad():
        return load_model(folder, "float32")(TOKENS).logits


def opened(folder):
    """As a chain does before its first stage."""
    checkpoint = open_checkpoint(folder)
    verify(checkpoint)
    return checkpoint


def shards(folder, per_file=10):
    """Write the folder's tensors as shards with an index, and keep the single file."""
    tensors, weight_map = load_file(folder / "model.safetensors"), {}
    names = sorted(tensors)
    for start in range(0, len(names), per_file):
        file = f"model-{start:05d}.safetensors"
        part = names[start : start + per_file]
        save_file({name: tensors[name] for name in part}, folder / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(part, file))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


# What the file holds and what the config says
# ------------------------------------------------------------------------------------------------


def test_a_head_of_its_own_is_kept_though_the_config_shares_it(folder, untied):
    change_json(folder / "config.json", tie_word_embeddings=True)
    checkpoint = opened(folder)
    assert not checkpoint.spec.tied
    assert any("head of its own" in note for note in checkpoint.notes)
    assert torch.equal(logits(folder), logits(untied))


def test_a_copy_of_the_shared_head_is_left_out(folder):
    change_json(folder / "config.json", tie_word_embeddings=True)
    change_tensors(
        folder, lambda old: {**old, "lm_head.weight": old["model.embed_tokens.weight"].clone()}
    )
    checkpoint = opened(folder)
    assert checkpoint.spec.tied
    assert "lm_head.weight" not in checkpoint.tensors


def bias(old):
    return {**old, f"{PROJECTION}.bias": torch.ones(64)}


def without(name):
    return lambda old: {key: tensor for key, tensor in old.items() if key != name}


def replaced(name, tensor):
    return lambda old: {**old, name: tensor}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (bias, f"1 tensors that its config.json does not mention .{PROJECTION}.bias"),
        (without("model.norm.weight"), "lacks 1 weights .*first 'model.norm.weight'"),
        (without("lm_head.weight"), "first 'lm_head.weight'"),
        (replaced("model.norm.weight", torch.ones(32)), "is 32, but config.json asks for 64"),
        (replaced("model.embed_tokens.weight", torch.zeros(0)), "embed_tokens.weight .* is 0, but"),
        (replaced("model.embed_tokens.weight", torch.zeros(9, 64)), "is 9 x 64, .* 1536 x 64"),
        (replaced("lm_head.weight", torch.zeros(1536, 32)), "is 1536 x 32, but"),
        (replaced("score.weight", torch.zeros(2, 64)), "does not mention .score.weight"),
    ],
)
def test_tensors_that_do_not_fit_the_config_are_named(folder, change, message):
    change_tensors(folder, change)
    with pytest.raises(SlimError, match=message):
        opened(folder)
    with pytest.raises(SlimError, match=message):
        load_model(folder)


def test_blocks_beyond_the_config_are_named(folder):
    change_json(folder / "config.json", num_hidden_layers=2)
    with pytest.raises(SlimError, match=r"9 tensors .*model.layers.2.*num_hidden_layers=2"):
        opened(folder)


def test_tables_that_the_model_computes_are_left_out(folder, untied):
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    change_tensors(folder, lambda old: {**old, name: torch.ones(8)})
    assert name not in opened(folder).tensors
    assert torch.equal(logits(folder), logits(untied))


def test_rows_beyond_the_vocabulary_are_cut_and_it_is_said(folder, untied, tmp_path):
    ends = ("model.embed_tokens.weight", "lm_head.weight")
    change_tensors(
        folder, lambda old: {n: torch.cat([t, t[:8]]) if n in ends else t for n, t in old.items()}
    )
    checkpoint = opened(folder)
    assert [checkpoint.tensors[name][2] for name in ends] == [(1536, 64)] * 2
    assert sum("the last 8 are left out" in note for note in checkpoint.notes) == 2
    assert torch.equal(logits(folder), logits(untied))
    (tmp_path / "pruned").mkdir()
    write_blocks(checkpoint, tmp_path / "pruned", [0, 2])
    assert opened(tmp_path / "pruned").is_plain


# Names
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "rename",
    [
        lambda name: name.removeprefix("model."),
        lambda name: f"_orig_mod.{name}",
        lambda name: f"module.{name}",
        lambda name: f"module._orig_mod.{name}",
        lambda name: f"module.module.{name}",
        lambda name: name.replace("model.", "model.language_model.", 1),
        lambda name: name.replace("layers.1.", "layers.1._fsdp_wrapped_module."),
        lambda name: f"base_model.model.{name}",
        lambda name: name if name.startswith("lm_head") else f"model.{name}",
        lambda name: name.replace("layers.1.", "layers.1._orig_mod."),
    ],
)
def test_names_are_those_of_the_model_for_every_stage(folder, untied, tmp_path, rename):
    before = checksums(untied)
    rename_tensors(folder, rename)
    checkpoint = opened(folder)
    assert set(checkpoint.tensors) == set(open_checkpoint(untied).tensors)
    assert any(note.startswith("Names:") for note in checkpoint.notes)
    assert torch.equal(logits(folder), logits(untied))
    for source, name in ((folder, "renamed"), (untied, "plain")):
        (tmp_path / name).mkdir()
        write_blocks(open_checkpoint(source), tmp_path / name, [0, 2])
    assert (
        load_file(tmp_path / "renamed" / "model.safetensors").keys()
        == load_file(tmp_path / "plain" / "model.safetensors").keys()
    )
    assert torch.equal(logits(tmp_path / "renamed"), logits(tmp_path / "plain"))
    # a result's name depends on the files as they are
    assert checksums(folder)["model.safetensors"] != before["model.safetensors"]


def test_two_tensors_of_one_name_are_refused(folder):
    change_tensors(
        folder,
        lambda old: {**old, "model._orig_mod.norm.weight": old["model.norm.weight"].clone()},
    )
    with pytest.raises(SlimError, match="both of which are 'model.norm.weight'"):
        opened(folder)


# Which files
# ------------------------------------------------------------------------------------------------


def test_a_whole_file_next_to_an_index_of_shards_is_refused(folder):
    shards(folder)
    with pytest.raises(SlimError, match=r"two models: model.safetensors, and the shards"):
        open_checkpoint(folder)


def test_shards_alone_are_read(folder, untied):
    shards(folder)
    (folder / "model.safetensors").unlink()
    assert torch.equal(logits(folder), logits(untied))


def test_an_index_of_files_that_are_gone_is_named(folder):
    index = {"weight_map": {"model.norm.weight": "model-00001-of-00030.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(SlimError, match="index model.safetensors.index.json is stale"):
        open_checkpoint(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(SlimError, match="which its index model.safetensors.index.json lists"):
        open_checkpoint(folder)


@pytest.mark.parametrize(
    "content", ["{}", "[]", '{"weight_map": {}}', '{"weight_map": {"a": "../b"}}']
)
def test_an_index_that_is_none_is_named(folder, content):
    (folder / "model.safetensors.index.json").write_text(content)
    with pytest.raises(SlimError, match="has no weight_map|is not a JSON object"):
        open_checkpoint(folder)


def test_a_file_of_another_name_is_read(folder, untied):
    (folder / "model.safetensors").rename(folder / "llama-3b.safetensors")
    assert torch.equal(logits(folder), logits(untied))
    shutil.copy(folder / "llama-3b.safetensors", folder / "other.safetensors")
    with pytest.raises(SlimError, match="2 safetensors files"):
        open_checkpoint(folder)


def test_a_tensor_in_two_shards_is_refused(folder):
    shards(folder)
    (folder / "model.safetensors").unlink()
    first = sorted(folder.glob("model-*.safetensors"))[0]
    tensors = load_file(first)
    save_file(
        {**tensors, "lm_head.weight": torch.zeros(1536, 64)}, folder / "model-00010.safetensors"
    )
    with pytest.raises(SlimError, match="twice"):
        open_checkpoint(folder)


# Types
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize("named", [False, True])
def test_plain_float8_is_read_as_the_numbers_it_is(folder, dtype, named):
    if named:
        change_json(folder / "config.json", dtype=str(dtype).removeprefix("torch."))
    else:
        change_json(folder / "config.json", dtype="bfloat16")
    before = load_file(folder / "model.safetensors")
    change_tensors(
        folder,
        lambda old: {n: t.to(dtype) if "_proj" in n else t.bfloat16() for n, t in old.items()},
    )
    checkpoint = opened(folder)
    assert checkpoint.spec.dtype == "bfloat16"
    weight = TensorReader(checkpoint).read(f"{PROJECTION}.weight")
    assert torch.equal(weight, before[f"{PROJECTION}.weight"].to(dtype).bfloat16())
    assert torch.isfinite(logits(folder)).all()


@pytest.mark.parametrize("end", ["weight_scale_inv", "weight_scale"])
def test_scaled_float8_is_read_with_its_scales(folder, untied, end):
    change_json(
        folder / "config.json",
        dtype="bfloat16",
        quantization_config={"quant_method": "fp8", "weight_block_size": [128, 128]},
    )

    def pack(old):
        tensors = {}
        for name, tensor in old.items():
            if "_proj" not in name:
                tensors[name] = tensor.bfloat16()
                continue
            scale = tensor.abs().max() / 448
            tensors[name] = (tensor / scale).to(torch.float8_e4m3fn)
            tensors[name.replace("weight", end)] = scale.reshape(1, 1)
            tensors[name.replace("weight", "input_scale")] = torch.ones(1)
        return tensors

    change_tensors(folder, pack)
    checkpoint = opened(folder)
    assert checkpoint.spec.quantization is None
    error = (logits(folder) - logits(untied)).norm() / logits(untied).norm()
    assert error < 0.1  # three bits after the point
    change_tensors(folder, without(f"{PROJECTION}.{end}"))
    with pytest.raises(SlimError, match=f"'{PROJECTION}.weight' is F8_E4M3 without a scale"):
        open_checkpoint(folder)


@pytest.mark.parametrize(
    ("scale", "factors"),
    [
        (torch.tensor(3.0), torch.full((130, 200), 3.0)),
        (torch.arange(130.0), torch.arange(130.0)[:, None].expand(130, 200)),
        (torch.arange(130.0)[:, None], torch.arange(130.0)[:, None].expand(130, 200)),
        (
            torch.tensor([[1.0, 2.0], [3.0, 4.0]]),
            torch.tensor([[1.0, 2.0], [3.0, 4.0]])
            .repeat_interleave(128, 0)
            .repeat_interleave(128, 1)[:130, :200],
        ),
    ],
)
def test_scales_by_hand(scale, factors):
    weight = torch.randn(130, 200).to(torch.float8_e4m3fn)
    assert torch.equal(from_float8(weight, scale, "w"), weight.float() * factors)


def test_scales_of_another_shape_are_refused():
    with pytest.raises(SlimError, match="one per row"):
        from_float8(torch.zeros(130, 200).to(torch.float8_e4m3fn), torch.ones(7, 9), "w")


# Entries of the config
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"max_position_embeddings": None}, "max_position_embeddings=null must be"),
        ({"max_position_embeddings": "long"}, "max_position_embeddings"),
        ({"pad_token_id": 1536}, "pad_token_id=1536 must be below vocab_size=1536"),
        ({"dtype": "float12"}, "dtype=float12 must be one of"),
        ({"hidden_act": "swoosh"}, "hidden_act=.swoosh."),
        ({"rope_parameters": {"rope_type": "spiral", "rope_theta": 1e4}}, "rope_type=.spiral."),
        (
            {"rope_scaling": {"rope_type": "spiral", "factor": 2.0}, "rope_parameters": ...},
            "spiral",
        ),
        ({"num_attention_heads": 0}, "num_attention_heads=0 must be a whole number"),
        ({"num_key_value_heads": "two"}, "num_key_value_heads=.two. must be"),
        ({"vocab_size": True}, "vocab_size=true must be"),
        ({"quantization_config": "gptq"}, "quantization_config=.gptq. must be a JSON object"),
        ({"model_type": ["llama"]}, "model_type"),
        ({"rms_norm_eps": "small"}, "rms_norm_eps"),
    ],
)
def test_values_that_no_model_can_be_built_with_are_named(folder, entries, message):
    change_json(folder / "config.json", **entries)
    with pytest.raises(SlimError, match=message) as caught:
        opened(folder)
    assert "config.json" in str(caught.value)


@pytest.mark.parametrize(
    "entries",
    [
        {"attn_implementation": "flash_attention_2"},
        {"_attn_implementation": "flash_attention_3"},
        {"dtype": "auto"},
        {"torch_dtype": "auto", "dtype": ...},
    ],
)
def test_values_that_do_not_matter_are_left_alone(folder, untied, entries):
    change_json(folder / "config.json", **entries)
    assert opened(folder).spec.dtype == "float32"
    assert torch.equal(logits(folder), logits(untied))


def test_settings_of_generation_that_are_refused_are_named(folder):
    change_json(
        folder / "generation_config.json", num_return_sequences=4, do_sample=False, num_beams=1
    )
    with pytest.raises(SlimError, match="generation_config.json"):
        load_model(folder)


# Adapters
# ------------------------------------------------------------------------------------------------


def test_an_adapter_next_to_the_weights_must_be_asked_for(folder):
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    for look in (Source(str(folder)).describe, Source(str(folder)).resolve):
        with pytest.raises(SlimError, match="a model and an adapter .*(?s:.*)model.adapter="):
            look()


def test_a_folder_that_is_only_an_adapter_says_how_to_merge_it(folder):
    settings = {"peft_type": "LORA", "base_model_name_or_path": "org/base"}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")
    (folder / "config.json").unlink()
    with pytest.raises(SlimError, match=r"PEFT adapter(?s:.*)model.source=org/base model.adapter="):
        open_checkpoint(folder)


def test_whole_numbers_are_no_weights(folder):
    change_tensors(folder, lambda old: {**old, f"{PROJECTION}.weight": torch.ones(64, 64).char()})
    with pytest.raises(SlimError, match=f"{PROJECTION}.weight .* is stored as I8"):
        opened(folder)


# Writing
# ------------------------------------------------------------------------------------------------


def test_a_tensor_is_written_once_only(tmp_path):
    writer = ShardWriter(tmp_path)
    writer.add("w", torch.ones(4))
    with pytest.raises(ValueError, match="added twice"):
        writer.add("w", torch.ones(4))


def test_a_tensor_of_fewer_bytes_than_its_shape_is_damage(tmp_path):
    entry = {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}
    header = json.dumps({"a": entry}).encode()
    path = tmp_path / "model.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    with pytest.raises(SlimError, match="'a' has 8 bytes for 3 numbers of 4"):
        read_header(path)


@pytest.mark.parametrize("start", [4, 12])
def test_gaps_and_overlaps_are_invalid(tmp_path, start):
    header = json.dumps(
        {
            "a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
            "b": {"dtype": "F32", "shape": [2], "data_offsets": [start, start + 8]},
        }
    ).encode()
    path = tmp_path / "model.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + b"\0" * (start + 8))
    with pytest.raises(SlimError, match="invalid offsets: 'b'"):
        read_header(path)


# JSON files that hold something else, weights that are not finite, other types
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["config.json", "adapter_config.json", "slim.json"])
def test_a_json_file_that_holds_no_object_is_named(folder, name):
    (folder / name).write_text("[1]")
    if name == "adapter_config.json":
        (folder / "config.json").unlink()
    with pytest.raises(SlimError, match=f"{name}.* JSON object"):
        open_checkpoint(folder).manifest  # noqa: B018


@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "model.norm.weight"])
def test_weights_outside_the_blocks_that_are_not_finite_are_refused(folder, tmp_path, name):
    change_tensors(folder, lambda old: {**old, name: old[name] * float("inf")})
    (tmp_path / "out").mkdir()
    with pytest.raises(SlimError, match=f"{name} contain NaN or infinity"):
        MagnitudeWeights(sparsity=0.5).run(folder, tmp_path / "out", Context())


def test_weights_keep_the_type_of_the_file_where_the_config_names_another(folder, tmp_path):
    change_json(folder / "config.json", dtype="float16")
    (tmp_path / "out").mkdir()
    MagnitudeWeights(sparsity=1e-9).run(folder, tmp_path / "out", Context())
    before, after = (load_file(path / "model.safetensors") for path in (folder, tmp_path / "out"))
    assert all(torch.equal(after[name], before[name]) for name in before)

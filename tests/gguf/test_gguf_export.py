"""Written GGUF files hold what the checkpoints they were made from hold: read back by slim's own
import and by transformers' reading of GGUF.
"""

from __future__ import annotations

import json

import numpy
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from slim.checkpoints.checkpoint import checksums, open_checkpoint
from slim.checkpoints.stage import Context
from slim.core.errors import SlimError
from slim.gguf.architecture import restore_rows
from slim.gguf.blocks import BLOCK_TYPES, pack_blocks, round_to_blocks, unpack_blocks
from slim.gguf.export import permute_rows
from slim.gguf.metadata import NAMES, rotary
from slim.gguf.quantizer import BLOCKS_OF_32, Gguf
from slim.gguf.reader import GgufModel, type_name
from slim.gguf.stage import ImportGguf
from slim.gguf.vocabulary import PROBES, rule_name
from slim.loading.load_model import load_model
from slim.models.spec import ModelSpec
from slim.quantization.methods.gptq import GPTQ
from slim.quantization.methods.rtn import RTN
from slim.quantization.scheme import Scheme
from slim.quantization.solvers.grid import Quantized
from tests.gguf.test_gguf_import import DEFAULTS, FAMILIES, load, logits
from tests.support.gguf_files import ASSETS, random_model
from tests.support.stages import run


def checkpoint_of(family: str, folder, **changes):
    """Write a random model with the embedded model's tokenizer."""
    folder.mkdir(parents=True)
    model = random_model(family, **changes)
    model.save_pretrained(folder)
    for path in ASSETS.glob("token*"):
        (folder / path.name).write_bytes(path.read_bytes())
    for path in ASSETS.glob("chat_template*"):
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


def written(family: str, folder, type_name: str = "F32", **changes):
    """Write a random model as GGUF; return (source folder, result folder)."""
    source = checkpoint_of(family, folder / "source", **changes)
    run(Gguf(type_name), source, folder / "result")
    return source, folder / "result"


def imported(path, folder):
    """Import a file in float32."""
    folder.mkdir()
    ImportGguf(path, "float32").run(None, folder, Context())
    return folder


def difference(model, other) -> float:
    """The largest difference between two models' logits."""
    return (logits(model) - logits(other)).abs().max().item()


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_comes_back(name, tmp_path):
    family, changes = FAMILIES[name]
    source, result = written(family, tmp_path, **changes)
    folder = imported(result / "model.gguf", tmp_path / "folder")
    assert difference(load(folder), load(source)) < 1e-5
    assert open_checkpoint(folder).config["model_type"] == family


@pytest.mark.parametrize(
    "name", ["llama", "llama untied", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "phi3"]
)
@pytest.mark.parametrize("kind", ["F32", "Q8_0", "Q4_1"])
def test_transformers_reads_the_same_model(name, kind, tmp_path):
    family, changes = FAMILIES[name]
    _, result = written(family, tmp_path, kind, **{**changes, **DEFAULTS.get(family, {})})
    theirs = AutoModelForCausalLM.from_pretrained(
        result, gguf_file="model.gguf", dtype=torch.float32, config=None
    ).eval()
    ours = load_model(result, "float32")
    assert difference(ours, theirs) < 1e-5


# Blocks -------------------------------------------------------------------------------------------


def random_codes(bits: int, symmetric: bool, group: int) -> Quantized:
    """Random codes and grids of a layer of 8 rows and 128 columns."""
    generator = torch.Generator().manual_seed(3)
    codes = torch.randint(0, 2**bits, (8, 128), generator=generator, dtype=torch.uint8)
    zero = torch.randint(0, 2**bits, (8, 128 // group), generator=generator, dtype=torch.uint8)
    if symmetric:
        zero = torch.full_like(zero, 2 ** (bits - 1))
    scale = torch.rand(8, 128 // group, generator=generator).half() / 50 + 1e-3
    return Quantized(codes, scale, zero, Scheme(bits, group, symmetric))


@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize(("bits", "name"), [(4, "Q4_0"), (8, "Q8_0")])
def test_symmetric_codes_are_held_exactly(bits, name, group):
    layer = random_codes(bits, True, group)
    held = unpack_blocks(pack_blocks(layer), name, torch.float32)
    assert torch.equal(held, layer.dequantize())


@pytest.mark.parametrize("group", [32, 64, 128])
def test_only_offsets_of_asymmetric_codes_round(group):
    layer = random_codes(4, False, group)
    held = unpack_blocks(pack_blocks(layer), "Q4_1", torch.float32)
    step = layer.scale.float().repeat_interleave(group, 1)
    offset = step * layer.zero.float().repeat_interleave(group, 1)
    error = (held - layer.dequantize()).abs()
    # besides rounding to float16, the arithmetic of float32
    assert (error <= offset * 2**-11 + step * 1e-5).all()
    assert (error / step).max() < 0.008
    assert error.max() > 0


@pytest.mark.parametrize("name", BLOCKS_OF_32)
def test_rounding_is_that_of_the_library(name, monkeypatch):
    import gguf

    monkeypatch.setattr("slim.gguf.blocks.CHUNK_ELEMENTS", 200)  # several chunks of rows
    weight = torch.randn(7, 96, generator=torch.Generator().manual_seed(0))
    kind = gguf.GGMLQuantizationType[name]
    blocks = round_to_blocks(weight, name)
    assert numpy.array_equal(blocks.numpy(), gguf.quantize(weight.numpy(), kind))
    held = unpack_blocks(blocks, name, torch.float32)
    assert numpy.array_equal(held.numpy(), gguf.dequantize(blocks.numpy(), kind))


def test_a_scale_beyond_float16_is_refused():
    layer = random_codes(4, True, 32)
    layer.scale = layer.scale.float() * 1e8
    with pytest.raises(SlimError, match="too large for float16"):
        pack_blocks(layer)


@pytest.mark.parametrize("shape", [(32,), (32, 5)])
def test_rows_come_back(shape):
    tensor = torch.arange(torch.Size(shape).numel()).view(shape)
    assert not torch.equal(permute_rows(tensor, 4), tensor)
    assert torch.equal(restore_rows(permute_rows(tensor, 4), 4), tensor)


# quant.format=gguf --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bits", "symmetric", "name"), [(4, False, "Q4_1"), (4, True, "Q4_0"), (8, True, "Q8_0")]
)
@pytest.mark.parametrize("group", [32, 64, -1])
def test_the_file_holds_what_slim_chose(bits, symmetric, name, group, tmp_path):
    source = checkpoint_of("llama", tmp_path / "source")
    stage = RTN(bits=bits, symmetric=symmetric, group_size=group, format="gguf")
    facts = run(stage, source, tmp_path / "result")
    file = tmp_path / "result" / "model.gguf"
    types = {type_name(entry.type) for entry in GgufModel(file).tensors.values()}
    assert types == {name, "F32"}
    folder = imported(file, tmp_path / "folder")
    assert difference(load(folder), load_model(tmp_path / "result", "float32")) < 1e-5
    assert facts["bits_per_weight"] == 8 * BLOCK_TYPES[name].size / 32
    assert any("offsets" in note for note in facts.get("notes", [])) == (name == "Q4_1")


def test_rounding_in_gguf_is_as_near_as_in_compressed_tensors(tmp_path):
    """Codes are the same but for scales, which GGUF has in float16."""
    source = checkpoint_of("llama", tmp_path / "source")
    settings = dict(bits=4, group_size=32, search=4)
    run(RTN(**settings), source, tmp_path / "plain")
    run(RTN(**settings, format="gguf"), source, tmp_path / "gguf")
    expected = logits(load(source))
    errors = {}
    for name in ("plain", "gguf"):
        found = logits(load_model(tmp_path / name, "float32"))
        errors[name] = ((found - expected).norm() / expected.norm()).item()
    assert errors["gguf"] == pytest.approx(errors["plain"], rel=0.05)


def test_layers_may_differ(tmp_path):
    source = checkpoint_of("llama", tmp_path / "source", tie_word_embeddings=False)
    overrides = {"*.down_proj": {"bits": 8, "symmetric": True}, "*.o_proj": {"bits": 16}}
    stage = RTN(bits=4, group_size=32, overrides=overrides, lm_head=True, format="gguf")
    run(stage, source, tmp_path / "result")
    tensors = GgufModel(tmp_path / "result" / "model.gguf").tensors
    names = ("blk.0.attn_q", "blk.1.ffn_down", "blk.2.attn_output", "output", "token_embd")
    found = [type_name(tensors[f"{name}.weight"].type) for name in names]
    assert found == ["Q4_1", "Q8_0", "F32", "Q8_0", "F32"]
    folder = imported(tmp_path / "result" / "model.gguf", tmp_path / "folder")
    assert difference(load(folder), load_model(tmp_path / "result", "float32")) < 1e-5


def test_a_shared_embedding_is_written_once(tmp_path):
    source = checkpoint_of("llama", tmp_path / "source")
    run(RTN(group_size=32, embeddings=True, format="gguf"), source, tmp_path / "result")
    tensors = GgufModel(tmp_path / "result" / "model.gguf").tensors
    assert "output.weight" not in tensors
    assert type_name(tensors["token_embd.weight"].type) == "Q8_0"
    load_model(tmp_path / "result", "float32")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bits": 3}, "no type for asymmetric codes of 3 bits"),
        ({"bits": 2, "symmetric": True}, "no type for symmetric codes of 2 bits"),
        ({"bits": 8}, "no type for asymmetric codes of 8 bits"),
        ({"overrides": {"*.up_proj": {"bits": 8}}}, r"\(model.layers.0.mlp.up_proj\)"),
    ],
)
def test_codes_that_gguf_has_no_type_for(settings, message, small_llama):
    stage = RTN(**{"group_size": 32, "format": "gguf", **settings})
    with pytest.raises(SlimError, match=message):
        stage.check(open_checkpoint(small_llama).spec)


def test_whole_rows_that_blocks_do_not_divide(small_llama):
    spec = open_checkpoint(small_llama).spec.with_config(intermediate_size=120)
    with pytest.raises(SlimError, match="do not divide the 120 inputs of model.layers.0.mlp.down"):
        RTN(group_size=-1, format="gguf").check(spec)


def test_groups_in_activation_order(small_llama):
    from slim.data.calibration import Calibration

    stage = GPTQ(group_size=32, static_groups=False, format="gguf", calibration=Calibration("tiny"))
    with pytest.raises(SlimError, match="quant.static_groups=true"):
        stage.check(open_checkpoint(small_llama).spec)


# quant=gguf ---------------------------------------------------------------------------------------


def test_types_of_single_layers(tmp_path):
    source = checkpoint_of("llama", tmp_path / "source")
    stage = Gguf("Q4_0", embeddings="F16", overrides={"*.down_proj": "Q5_1"})
    facts = run(stage, source, tmp_path / "result")
    tensors = GgufModel(tmp_path / "result" / "model.gguf").tensors
    names = ("blk.0.attn_q", "blk.0.ffn_down", "token_embd", "output_norm")
    found = [type_name(tensors[f"{name}.weight"].type) for name in names]
    assert found == ["Q4_0", "Q5_1", "F16", "F32"]
    assert facts["tensor_types"] == {"Q4_0": 18, "Q5_1": 3, "F16": 1}


def test_rows_that_blocks_do_not_divide_fall_back(tmp_path):
    source = checkpoint_of("llama", tmp_path / "source", intermediate_size=120)
    facts = run(Gguf("Q4_1"), source, tmp_path / "result")
    tensors = GgufModel(tmp_path / "result" / "model.gguf").tensors
    assert type_name(tensors["blk.0.ffn_down.weight"].type) == "F16"
    assert "3 x F16 for Q4_1" in facts["notes"][0]
    load_model(tmp_path / "result", "float32")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"type": "IQ2_XS"}, "does not write this type; the nearest is Q2_K"),
        ({"type": "Q8"}, "must be one of Q6_K.*Did you mean"),
        ({"embeddings": "Q6_K_M"}, "quant.embeddings=Q6_K_M"),
        ({"overrides": {"*.up_proj": "Q4"}}, "the type of '\\*.up_proj'"),
    ],
)
def test_types_that_are_not_written(settings, message):
    with pytest.raises(SlimError, match=message):
        Gguf(**settings)


def test_an_override_without_a_layer(small_llama):
    with pytest.raises(SlimError, match="is not the name of any layer"):
        Gguf(overrides={"*.attn": "Q4_0"}).check(open_checkpoint(small_llama).spec)


def test_weights_that_float16_cannot_hold(tmp_path):
    from safetensors.torch import load_file, save_file

    source = checkpoint_of("llama", tmp_path / "source")
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = 1e6
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    with pytest.raises(SlimError, match="layers.1.mlp.up_proj has weights that F16 cannot hold"):
        run(Gguf("F16"), source, tmp_path / "result")


def test_the_result_is_an_ordinary_checkpoint(tmp_path):
    _, result = written("llama", tmp_path, "Q4_1")
    sums = checksums(result)
    assert {"model.gguf", "Modelfile", "model.safetensors", "config.json"} <= set(sums)
    assert (result / "Modelfile").read_text().splitlines()[0] == "FROM ./model.gguf"


def test_the_same_run_twice_gives_the_same_file(tmp_path):
    _, first = written("llama", tmp_path / "a", "Q4_1")
    _, second = written("llama", tmp_path / "b", "Q4_1")
    assert (first / "model.gguf").read_bytes() == (second / "model.gguf").read_bytes()


# Models that GGUF cannot be told ------------------------------------------------------------------

SIZES = dict(
    vocab_size=64,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=6,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=256,
)
UNEVEN = ["sliding_attention"] * 2 + ["full_attention"] * 4
GEMMA2 = dict(model_type="gemma2", head_dim=16, query_pre_attn_scalar=16, sliding_window=8)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"model_type": "qwen2", "per_layer_config": {"0": {"intermediate_size": 64}}},
            "blocks of different sizes, which llama.cpp has no architecture for",
        ),
        (
            {"model_type": "llama", "per_layer_config": {"1": {"head_dim": 8}}},
            "block 1 has its own head_dim",
        ),
        ({"model_type": "llama", "slim_adapter": {"parameters": 1}}, "tuner.merge=true"),
        ({"model_type": "llama", "hidden_act": "gelu"}, "hidden_act=gelu"),
        ({"model_type": "llama", "rope_scaling": {"type": "dynamic", "factor": 2.0}}, "'dynamic'"),
        ({"model_type": "qwen3", "attention_bias": True}, "attention_bias=true"),
        (
            {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 8,
             "max_window_layers": 3},
            "window of 8 tokens in some blocks",
        ),
        ({**GEMMA2, "query_pre_attn_scalar": 99}, "query_pre_attn_scalar=99"),
        ({**GEMMA2, "layer_types": UNEVEN}, "follow no such pattern"),
    ],
)  # fmt: skip
def test_models_that_gguf_cannot_be_told(config, message):
    spec = ModelSpec({**SIZES, **config})
    with pytest.raises(SlimError, match=message):
        Gguf().check(spec)
    with pytest.raises(SlimError, match=message):
        RTN(group_size=32, format="gguf").check(spec)


def test_a_family_without_an_architecture(monkeypatch):
    monkeypatch.delitem(NAMES, "qwen3")
    with pytest.raises(SlimError, match="does not write the family 'qwen3' as GGUF. It writes"):
        Gguf().check(ModelSpec({**SIZES, "model_type": "qwen3"}))


def test_both_spellings_of_rotary_settings():
    scaling = {"rope_type": "linear", "factor": 4.0}
    old = ModelSpec({**SIZES, "model_type": "llama", "rope_theta": 5e5, "rope_scaling": scaling})
    parameters = {**scaling, "rope_theta": 5e5}
    new = ModelSpec({**SIZES, "model_type": "llama", "rope_parameters": parameters})
    assert rotary(old)[0] == rotary(new)[0]


def test_a_pruned_gemma_may_keep_a_pattern():
    types = ["full_attention"] * 3
    spec = ModelSpec({**SIZES, **GEMMA2, "num_hidden_layers": 3, "layer_types": types})
    Gguf().check(spec)


# Tokenizers ---------------------------------------------------------------------------------------


def test_byte_level_tokens_by_transformers(tmp_path):
    source, result = written("llama", tmp_path, "Q8_0")
    ours = AutoTokenizer.from_pretrained(source)
    theirs = AutoTokenizer.from_pretrained(result, gguf_file="model.gguf")
    for text in (*PROBES, "<|user|>\nhello<|end|>"):
        assert theirs(text).input_ids == ours(text).input_ids, text


def sentence_piece_folder(folder, prefix: bool = True):
    """Put a SentencePiece-like tokenizer of as many tokens as the embedding has into a folder."""
    from tokenizers import Tokenizer, decoders, models, normalizers, trainers
    from transformers import PreTrainedTokenizerFast

    marks = ["<unk>", "<s>", "</s>"] + [f"<0x{byte:02X}>" for byte in range(256)]
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    spell = normalizers.Replace(" ", "\u2581")
    tokenizer.normalizer = (
        normalizers.Sequence([normalizers.Prepend("\u2581"), spell]) if prefix else spell
    )
    text = json.dumps(json.loads((ASSETS / "tokenizer.json").read_text())["model"]["merges"][:400])
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=marks, show_progress=False)
    tokenizer.train_from_iterator(["the cat sat on the mat, and the hat ran " * 5, text], trainer)
    content = json.loads(tokenizer.to_str())
    content["added_tokens"] = content["added_tokens"][:3]  # bytes are ordinary tokens
    content["decoder"] = json.loads(decoders.ByteFallback().__getstate__())
    loaded = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(content)),
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
    )
    for path in folder.glob("*token*"):
        path.unlink()
    loaded.save_pretrained(folder)
    return loaded


@pytest.mark.parametrize("prefix", [True, False])
def test_sentence_piece_tokens_come_back(prefix, tmp_path):
    source = checkpoint_of("llama", tmp_path / "source")
    original = sentence_piece_folder(source, prefix)
    run(Gguf(), source, tmp_path / "result")
    metadata = GgufModel(tmp_path / "result" / "model.gguf").metadata
    assert metadata["tokenizer.ggml.model"] == "llama"
    assert metadata["tokenizer.ggml.add_space_prefix"] is prefix
    assert len(metadata["tokenizer.ggml.tokens"]) == 1536  # as many as rows
    assert metadata["tokenizer.ggml.token_type"][3] == 6
    folder = imported(tmp_path / "result" / "model.gguf", tmp_path / "folder")
    theirs = AutoTokenizer.from_pretrained(folder)
    for text in (*PROBES, "the cat that sat"):
        assert theirs(text).input_ids == original(text).input_ids, text


def test_a_tokenizer_that_gguf_cannot_express(tmp_path):
    source = checkpoint_of("llama", tmp_path / "source")
    content = json.loads((source / "tokenizer.json").read_text(encoding="utf-8"))
    content["normalizer"] = {"type": "Lowercase"}
    (source / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(SlimError, match="no name for the rule"):
        run(RTN(group_size=32, format="gguf"), source, tmp_path / "result")
    assert not (tmp_path / "result" / "model.safetensors").exists()  # before any work


def test_names_of_rules():
    content = json.loads((ASSETS / "tokenizer.json").read_text(encoding="utf-8"))
    assert rule_name(content) == "gpt-2"
    digits = {"type": "Digits", "individual_digits": True}
    steps = [digits, content["pre_tokenizer"]]
    content["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": steps}
    assert rule_name(content) == "smollm"


def test_the_chat_template_stands_in_the_file(tmp_path):
    source, result = written("llama", tmp_path)
    template = AutoTokenizer.from_pretrained(source).chat_template
    assert GgufModel(result / "model.gguf").metadata["tokenizer.chat_template"] == template


# One command --------------------------------------------------------------------------------------


def test_output_may_name_the_file(tmp_path):
    from slim.chain.compose import compose
    from slim.cli.execute import execute

    chain = ["model=tiny", "pruner=none", "eval=none", f"store={tmp_path / 'store'}"]
    file = tmp_path / "new" / "small.gguf"
    chosen = ["quant=rtn", "quant.group_size=64", "quant.format=gguf"]
    results = execute(compose("compress", [*chain, *chosen, f"output={file}"]))
    assert file.read_bytes() == (results[-1].checkpoint.folder / "model.gguf").read_bytes()
    card = (results[-1].checkpoint.folder / "README.md").read_text(encoding="utf-8")
    assert 'gguf_file="model.gguf"' in card
    chosen = ["quant=rtn", "quant.group_size=64", f"output={tmp_path / 'other.gguf'}"]
    with pytest.raises(SlimError, match="other.gguf: the result of this chain has no GGUF file"):
        execute(compose("compress", [*chain, *chosen]))


def test_a_damaged_file_is_noticed(tmp_path):
    from slim.checkpoints.store import Store, write_manifest

    _, result = written("llama", tmp_path, "Q8_0")
    write_manifest(result, {})
    assert Store(tmp_path).find(result) is not None
    with (result / "model.gguf").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x55")
    assert Store(tmp_path).find(result) is None

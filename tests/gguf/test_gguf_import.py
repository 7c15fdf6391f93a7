"""Imported models compute what the models they were made from do, and what transformers' own
reading of GGUF gives.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM

from slim.checkpoints.checkpoint import open_checkpoint
from slim.checkpoints.stage import Context
from slim.core.errors import SlimError
from slim.core.io import read_json
from slim.gguf.reader import GgufModel, readable_types
from slim.gguf.rotary import llama3_settings
from slim.gguf.stage import ImportGguf
from slim.quantization.storage import weight_bytes
from tests.support.gguf_files import llama3_factors, permuted, random_model, write_gguf

TOKENS = torch.randint(0, 1536, (2, 24), generator=torch.Generator().manual_seed(2))
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
LONG = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0, 1.5] * 4,
    "long_factor": [3.0] * 8,
    "original_max_position_embeddings": 16,
}
GEMMA = dict(head_dim=32, query_pre_attn_scalar=32, sliding_window=9)
FAMILIES = {
    "llama": ("llama", {}),
    "llama untied": ("llama", {"tie_word_embeddings": False}),
    "llama with biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama3": ("llama", {"rope_parameters": LLAMA3}),
    "llama linear": (
        "llama",
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}},
    ),
    "llama heads of another size": ("llama", {"head_dim": 24}),
    "mistral": ("mistral", {"sliding_window": None}),
    "qwen2": ("qwen2", {}),
    "qwen2 yarn": (
        "qwen2",
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 1e4,
                "factor": 4.0,
                "original_max_position_embeddings": 64,
            }
        },
    ),
    "qwen3": ("qwen3", {"head_dim": 32}),
    "gemma2": ("gemma2", {**GEMMA, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0}),
    "gemma3": ("gemma3_text", {**GEMMA, "num_hidden_layers": 7}),
    "gemma3 linear": (
        "gemma3_text",
        {
            **GEMMA,
            "num_hidden_layers": 7,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            },
        },
    ),
    "phi3": ("phi3", {"sliding_window": 9}),
    "phi3 in part": (
        "phi3",
        {
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e4,
                "partial_rotary_factor": 0.5,
            }
        },
    ),
    "phi3 long": ("phi3", {"rope_parameters": LONG}),
}


def imported(path, folder, dtype="float32"):
    """Import a file into a new folder and return the folder."""
    folder.mkdir()
    ImportGguf(path, dtype).run(None, folder, Context())
    return folder


def load(folder):
    """The plain transformers model of a folder, in the type it is stored in."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()


@torch.no_grad()
def logits(model):
    return model(TOKENS).logits.float()


@pytest.mark.parametrize("name", FAMILIES)
def test_the_model_that_was_written_comes_back(name, tmp_path):
    family, changes = FAMILIES[name]
    model = random_model(family, **changes)
    folder = imported(write_gguf(model, tmp_path / "model.gguf"), tmp_path / "folder")
    assert (logits(load(folder)) - logits(model)).abs().max() < 1e-5
    assert open_checkpoint(folder).config["model_type"] in (family, "llama")


# Where transformers does not look into the file but takes the defaults of the family's class. It
# also leaves out all scaling of rotary embeddings, and Phi-3's window.
DEFAULTS = {
    "qwen3": {"head_dim": 128},
    "gemma2": {
        "head_dim": 256,
        "query_pre_attn_scalar": 256,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
    },
    "gemma3_text": {"head_dim": 256, "query_pre_attn_scalar": 256},
    "phi3": {"sliding_window": None},
}


@pytest.mark.parametrize(
    "name", ["llama", "llama untied", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "phi3"]
)
@pytest.mark.parametrize("kind", ["F32", "Q8_0"])
def test_transformers_reads_the_same_model(name, kind, tmp_path):
    family, changes = FAMILIES[name]
    model = random_model(family, **{**changes, **DEFAULTS.get(family, {})})
    write_gguf(model, tmp_path / "model.gguf", kind)
    expected = AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="model.gguf", dtype=torch.float32
    ).eval()
    folder = imported(tmp_path / "model.gguf", tmp_path / "folder")
    assert torch.equal(logits(load(folder)), logits(expected))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_stored_type_is_rounded_to_once(dtype, tmp_path):
    model = random_model("gemma2", **GEMMA)
    folder = imported(write_gguf(model, tmp_path / "model.gguf"), tmp_path / "folder", dtype)
    stored = load(folder).state_dict()
    for name, weight in model.state_dict().items():
        near_one = weight if "norm" not in name else (weight + 1) - 1  # float32 in the file
        assert torch.equal(stored[name], near_one.to(getattr(torch, dtype))), name
    assert open_checkpoint(folder).spec.dtype == dtype


def test_the_same_import_twice_is_the_same_to_the_byte(tmp_path):
    path = write_gguf(random_model("qwen3"), tmp_path / "model.gguf", "Q8_0")
    first, second = imported(path, tmp_path / "first"), imported(path, tmp_path / "second")
    names = sorted(file.name for file in first.iterdir())
    assert names == sorted(file.name for file in second.iterdir())
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"} <= set(
        names
    )
    for name in names:
        assert (first / name).read_bytes() == (second / name).read_bytes(), name


def test_tensors_larger_than_a_chunk_are_read_whole(tmp_path, monkeypatch):
    path = write_gguf(random_model("llama"), tmp_path / "model.gguf", "Q8_0")
    whole = GgufModel(path).read("token_embd.weight", torch.float32)
    monkeypatch.setattr("slim.gguf.reader.CHUNK_ELEMENTS", 1000)
    assert torch.equal(GgufModel(path).read("token_embd.weight", torch.float32), whole)


def test_several_parts_are_one_model(tmp_path):
    import gguf

    from tests.support.gguf_files import (
        add_entry,
        close,
        metadata_of,
        stored_tensors,
        tiny_tokenizer,
    )

    model = random_model("llama")
    tensors = list(stored_tensors(model).items())
    for part in range(3):
        writer = gguf.GGUFWriter(tmp_path / f"model-{part + 1:05d}-of-00003.gguf", "llama")
        entries = {"split.no": part, "split.count": 3}
        if part == 0:
            entries |= {f"llama.{key}": value for key, value in metadata_of(model).items()}
            entries |= {f"tokenizer.ggml.{key}": value for key, value in tiny_tokenizer().items()}
        for key, value in entries.items():
            add_entry(writer, key, value)
        for name, values in tensors[part::3]:
            writer.add_tensor(name, values)
        close(writer)
    folder = imported(tmp_path / "model-00002-of-00003.gguf", tmp_path / "folder")
    assert (logits(load(folder)) - logits(model)).abs().max() < 1e-5
    keys = [ImportGguf(tmp_path / f"model-0000{part}-of-00003.gguf").cache_key() for part in (1, 3)]
    assert keys[0] == keys[1]
    (tmp_path / "model-00003-of-00003.gguf").rename(tmp_path / "third.gguf")
    with pytest.raises(
        SlimError, match="one of 3 parts, and next to it there is no model-00003-of-00003.gguf"
    ):
        ImportGguf(tmp_path / "model-00001-of-00003.gguf").describe()
    with pytest.raises(SlimError, match="part 3 of 3, and its name does not tell the others"):
        ImportGguf(tmp_path / "third.gguf").describe()


def test_what_early_files_leave_out(tmp_path):
    """llama.cpp's assumptions, which are the published models' settings."""
    left_out = {
        f"gemma2__{key}": None
        for key in (
            "attention__sliding_window",
            "attn_logit_softcapping",
            "final_logit_softcapping",
        )
    }
    gemma = write_gguf(random_model("gemma2", **GEMMA), tmp_path / "gemma.gguf", **left_out)
    config = ImportGguf(gemma).describe().config
    caps = [config[f"{name}_logit_softcapping"] for name in ("attn", "final")]
    assert (config["sliding_window"], caps) == (4096, [50.0, 30.0])
    sizes = dict(
        num_hidden_layers=32,
        max_position_embeddings=4096,
        hidden_size=32,
        head_dim=8,
        sliding_window=None,
    )
    phi3 = write_gguf(random_model("phi3", **sizes), tmp_path / "phi3.gguf")
    assert ImportGguf(phi3).describe().config["sliding_window"] == 2047


def test_blocks_with_windows_as_the_file_lists_them(tmp_path):
    model = random_model(
        "gemma3_text",
        **GEMMA,
        layer_types=["full_attention", "sliding_attention", "sliding_attention"],
    )
    listed = {"gemma3__attention__sliding_window_pattern": [False, True, True]}
    folder = imported(write_gguf(model, tmp_path / "listed.gguf", **listed), tmp_path / "folder")
    assert (logits(load(folder)) - logits(model)).abs().max() < 1e-5
    by_number = write_gguf(
        model, tmp_path / "number.gguf", gemma3__attention__sliding_window_pattern=2
    )
    types = ImportGguf(by_number).describe().config["layer_types"]
    assert types == ["sliding_attention", "full_attention", "sliding_attention"]


def test_large_gemma_scales_its_queries_by_hidden_size_and_heads(tmp_path):
    large = random_model(
        "gemma2", **{**GEMMA, "query_pre_attn_scalar": 16, "num_hidden_layers": 46}
    )
    folder = imported(write_gguf(large, tmp_path / "large.gguf"), tmp_path / "folder")
    assert (logits(load(folder)) - logits(large)).abs().max() < 1e-4


def test_the_description_is_that_of_the_result(tmp_path):
    path = write_gguf(random_model("phi3", tie_word_embeddings=False), tmp_path / "model.gguf")
    stage = ImportGguf(path, "float16")
    spec = stage.describe()
    folder = imported(path, tmp_path / "folder", "float16")
    assert open_checkpoint(folder).config == spec.config
    assert sum(weight.numel() for weight in load(folder).parameters()) == spec.parameters()
    assert weight_bytes(spec) == pytest.approx(open_checkpoint(folder).bytes_on_disk, rel=0.02)
    assert stage.peak_bytes(spec, "cpu") > 2 * 1536 * 64 * 2


def test_the_name_of_the_result_follows_content_and_type(tmp_path):
    path = write_gguf(random_model("llama"), tmp_path / "a.gguf")
    (tmp_path / "b.gguf").write_bytes(path.read_bytes())
    same = [
        ImportGguf(path).content_digest(),
        ImportGguf(tmp_path / "b.gguf", name="another").content_digest(),
    ]
    assert same[0] == same[1]
    other = write_gguf(random_model("llama"), tmp_path / "c.gguf", llama__rope__freq_base=5e4)
    assert (
        len(
            {
                same[0],
                ImportGguf(path, "float32").content_digest(),
                ImportGguf(other).content_digest(),
            }
        )
        == 3
    )


def test_mistral_is_told_by_its_name_or_by_what_llama_refuses(tmp_path):
    model = random_model("mistral", sliding_window=None)
    named = write_gguf(model, tmp_path / "named.gguf", general__name="Mistral 7B Instruct v0.2")
    assert ImportGguf(named).describe().config["model_type"] == "mistral"
    assert (
        ImportGguf(write_gguf(model, tmp_path / "plain.gguf")).describe().config["model_type"]
        == "llama"
    )
    uneven = random_model(
        "mistral", num_attention_heads=6, sliding_window=None
    )  # 64 is no multiple of 6
    folder = imported(write_gguf(uneven, tmp_path / "uneven.gguf"), tmp_path / "folder")
    assert open_checkpoint(folder).config["model_type"] == "mistral"
    assert (logits(load(folder)) - logits(uneven)).abs().max() < 1e-5


@pytest.mark.parametrize(
    "settings",
    [(8.0, 1.0, 4.0, 8192), (32.0, 1.0, 4.0, 8192), (4.0, 1.0, 8.0, 1024), (16.0, 2.0, 6.0, 4096)],
)
@pytest.mark.parametrize("size", [64, 128])
def test_llama3_settings_are_found_from_the_factors(settings, size):
    """The original length and the two bounds are known up to a common factor: the lower bound is
    taken to be 1.
    """
    factor, low, high, length = settings
    stored = torch.tensor(llama3_factors(size, 500000.0, factor, low, high, length))
    found = llama3_settings(fake_model(stored), 500000.0, size)
    assert found["factor"] == factor
    assert found["original_max_position_embeddings"] == pytest.approx(length / low, rel=1e-3)
    assert found["high_freq_factor"] == pytest.approx(high / low, rel=1e-3)


def test_factors_of_no_llama3_model_are_refused():
    with pytest.raises(SlimError, match="rope_freqs.weight are not those of a Llama 3 model"):
        llama3_settings(fake_model(torch.linspace(1, 3, 32)), 500000.0, 64)
    assert llama3_settings(fake_model(torch.ones(32)), 500000.0, 64) == {"rope_type": "default"}


def fake_model(factors):
    return SimpleNamespace(path="FILE", read=lambda name, dtype: factors.to(dtype))


def test_settings_of_generation(tmp_path):
    tokenizer_changes = {"tokenizer__ggml__eot_token_id": 2, "tokenizer__ggml__bos_token_id": 3}
    folder = imported(
        write_gguf(random_model("llama"), tmp_path / "model.gguf", **tokenizer_changes),
        tmp_path / "folder",
    )
    assert read_json(folder / "generation_config.json") == {
        "bos_token_id": 3,
        "pad_token_id": 1,
        "eos_token_id": [0, 2],
    }
    assert read_json(folder / "config.json")["bos_token_id"] == 3


def test_permuted_is_the_order_that_llama_cpp_documents():
    """Rows x0 x1 y0 y1 of one head become x0 y0 x1 y1."""
    import numpy

    assert permuted(numpy.array([[1], [2], [3], [4]]), 1).flatten().tolist() == [1, 3, 2, 4]


def test_types_that_are_read():
    assert {"F32", "F16", "BF16", "Q4_0", "Q4_1", "Q8_0", "Q4_K", "Q6_K", "IQ4_XS", "MXFP4"} <= set(
        readable_types()
    )
    assert "Q8_K" not in readable_types()

"""Adapters of PEFT's own, merged into the source."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from slim.checkpoints.checkpoint import open_checkpoint
from slim.checkpoints.stage import Context
from slim.core.errors import SlimError
from slim.loading.merge import MergeAdapter
from tests.conftest import build_small
from tests.support.folders import change_json

RANK, ALPHA = 4, 16


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return build_small("llama", tmp_path_factory.mktemp("base") / "base", num_hidden_layers=2)


@pytest.fixture
def adapter(tmp_path, base):
    """An adapter of random numbers on all query projections."""
    folder = tmp_path / "adapter"
    folder.mkdir()
    generator, tensors = torch.Generator().manual_seed(0), {}
    for block in range(2):
        name = f"base_model.model.model.layers.{block}.self_attn.q_proj"
        tensors[f"{name}.lora_A.weight"] = torch.randn(RANK, 64, generator=generator)
        tensors[f"{name}.lora_B.weight"] = torch.randn(64, RANK, generator=generator)
    save_file(tensors, folder / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK, "lora_alpha": ALPHA}
    settings["target_modules"] = ["q_proj"]
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return folder


def test_merged_weights_by_hand(base, adapter, tmp_path):
    (tmp_path / "merged").mkdir()
    facts = MergeAdapter(str(adapter)).run(base, tmp_path / "merged", Context())
    before = load_file(base / "model.safetensors")
    after = load_file(tmp_path / "merged" / "model.safetensors")
    parts = load_file(adapter / "adapter_model.safetensors")
    for name, weight in before.items():
        expected = weight
        if "q_proj" in name:
            module = f"base_model.model.{name.removesuffix('.weight')}"
            product = parts[f"{module}.lora_B.weight"] @ parts[f"{module}.lora_A.weight"]
            expected = weight + ALPHA / RANK * product
        torch.testing.assert_close(after[name], expected)
    assert facts == {"adapter_parameters": sum(part.numel() for part in parts.values())}


def test_another_adapter_gives_another_result(adapter):
    before = MergeAdapter(str(adapter)).cache_key()
    change_json(adapter / "adapter_config.json", lora_alpha=8)
    assert MergeAdapter(str(adapter)).cache_key() != before
    assert str(adapter) not in json.dumps(before)


def test_what_is_no_adapter_is_named(adapter, tmp_path):
    with pytest.raises(SlimError, match="there is no adapter_config.json"):
        MergeAdapter(str(tmp_path))
    change_json(adapter / "adapter_config.json", peft_type="IA3")
    with pytest.raises(SlimError, match="peft_type=IA3; slim merges LORA"):
        MergeAdapter(str(adapter))
    (adapter / "adapter_model.safetensors").unlink()
    with pytest.raises(SlimError, match="lacks adapter_model.safetensors"):
        MergeAdapter(str(adapter))


@pytest.mark.parametrize(
    ("rename", "message"),
    [
        (lambda name: name.replace("layers.1", "layers.7"), "is missing in the adapter|not in the"),
        (lambda name: name.replace("q_proj", "u_proj"), "is missing in the adapter|not in the"),
    ],
)
def test_an_adapter_of_another_model_is_refused(base, adapter, tmp_path, rename, message):
    path = adapter / "adapter_model.safetensors"
    save_file({rename(name): tensor for name, tensor in load_file(path).items()}, path)
    (tmp_path / "merged").mkdir()
    with pytest.raises(SlimError, match=message):
        MergeAdapter(str(adapter)).run(base, tmp_path / "merged", Context())


@pytest.mark.parametrize("module", ["lm_head", "model.embed_tokens"])
def test_an_adapter_on_one_of_two_shared_matrices_leaves_the_other(tmp_path, module):
    base = build_small("llama", tmp_path / "base", num_hidden_layers=1, tie_word_embeddings=True)
    before = load_file(base / "model.safetensors")["model.embed_tokens.weight"]
    (tmp_path / "adapter").mkdir()
    a, b = torch.randn(RANK, 64), torch.randn(len(before), RANK)
    names = ("lora_A.weight", "lora_B.weight")
    if module != "lm_head":
        a, b, names = (
            torch.randn(RANK, len(before)),
            torch.randn(64, RANK),
            (
                "lora_embedding_A",
                "lora_embedding_B",
            ),
        )
    tensors = {
        f"base_model.model.{module}.{name}": t for name, t in zip(names, (a, b), strict=True)
    }
    save_file(tensors, tmp_path / "adapter" / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK, "lora_alpha": ALPHA}
    settings["target_modules"] = [module.split(".")[-1]]
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(settings))
    (tmp_path / "merged").mkdir()
    MergeAdapter(str(tmp_path / "adapter")).run(base, tmp_path / "merged", Context())
    after = load_file(tmp_path / "merged" / "model.safetensors")
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["tie_word_embeddings"] is (
        False
    )
    changed = ALPHA / RANK * (b @ a if module == "lm_head" else (b @ a).T)
    expected = {"lm_head": before, "model.embed_tokens": before}
    expected[module] = before + changed
    for name, weight in expected.items():
        torch.testing.assert_close(after[f"{name}.weight"], weight, rtol=1e-4, atol=1e-4)


def test_an_adapter_with_nan_is_refused(base, adapter, tmp_path):
    path = adapter / "adapter_model.safetensors"
    tensors = load_file(path)
    next(iter(tensors.values()))[0, 0] = float("nan")
    save_file(tensors, path)
    (tmp_path / "merged").mkdir()
    with pytest.raises(SlimError, match="contains NaN or infinity"):
        MergeAdapter(str(adapter)).run(base, tmp_path / "merged", Context())


def test_quantized_weights_take_no_adapter(base, adapter, tmp_path):
    folder = shutil.copytree(base, tmp_path / "quantized")
    change_json(folder / "config.json", quantization_config={"quant_method": "gptq"})
    with pytest.raises(SlimError, match="already quantized .gptq"):
        MergeAdapter(str(adapter)).check(open_checkpoint(folder).spec)

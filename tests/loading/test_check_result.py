"""Results are read back before they are kept."""

from __future__ import annotations

import shutil

import pytest
import torch

from slim.checkpoints.checkpoint import open_checkpoint
from slim.checkpoints.stage import Context
from slim.core.errors import SlimError
from slim.loading import check_result as module
from slim.loading.check_result import check_result
from slim.loading.load_model import load_model
from slim.loading.save_model import save_model
from slim.quantization.formats import get_format
from slim.quantization.methods.rtn import RTN
from tests.conftest import build_small
from tests.support.folders import change_json, change_tensors

LAYER = "model.layers.0.mlp.down_proj"


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plain") / "plain"
    return build_small("llama", folder, num_hidden_layers=2, dtype="bfloat16")


def quantized(plain, folder, **settings):
    folder.mkdir()
    RTN(**{"bits": 4, "group_size": 32, **settings}).run(plain, folder, Context())
    return folder


@pytest.mark.parametrize("name", ["compressed-tensors", "gptq", "awq"])
def test_sound_results_pass(plain, tmp_path, name):
    check_result(quantized(plain, tmp_path / "q", format=name))


def test_a_plain_result_passes(plain):
    check_result(plain)


def test_a_loader_that_computes_something_else_is_found(plain, tmp_path, monkeypatch):
    folder = quantized(plain, tmp_path / "q")

    def damaged(path):
        model = load_model(path, "float32")
        model.model.layers[0].mlp.down_proj.scale.mul_(2)
        return model

    monkeypatch.setattr(module, "load", damaged)
    with pytest.raises(SlimError, match="does not compute what its files say"):
        check_result(folder)


def test_a_format_that_writes_something_else_is_found(plain, tmp_path, monkeypatch):
    form = get_format("gptq")
    tensors = form.tensors

    def damaged(layer):
        return {**tensors(layer), "qweight": torch.zeros_like(tensors(layer)["qweight"])}

    monkeypatch.setattr(form, "tensors", damaged)
    with pytest.raises(SlimError, match="reads back from the result as other weights"):
        quantized(plain, tmp_path / "q", format="gptq")


def test_a_saved_model_that_reads_back_as_another_is_found(plain, tmp_path, monkeypatch):
    model = load_model(plain)
    (tmp_path / "saved").mkdir()
    save = model.save_pretrained

    def damaged(target):
        save(target)
        change_tensors(target, lambda old: {**old, f"{LAYER}.weight": 2 * old[f"{LAYER}.weight"]})

    monkeypatch.setattr(model, "save_pretrained", damaged)
    with pytest.raises(SlimError, match=f"{LAYER}.weight reads back"):
        save_model(model, plain, tmp_path / "saved")


def test_settings_of_generation_that_cannot_be_written_are_copied(plain, tmp_path):
    folder = shutil.copytree(plain, tmp_path / "source")
    # transformers reads it with a warning and refuses to write it
    change_json(folder / "generation_config.json", do_sample=False, temperature=0.5)
    (tmp_path / "saved").mkdir()
    save_model(load_model(folder), folder, tmp_path / "saved")
    written = (tmp_path / "saved" / "generation_config.json").read_text()
    assert written == (folder / "generation_config.json").read_text()


# Ranges
# ------------------------------------------------------------------------------------------------


@pytest.fixture
def outlier(plain, tmp_path):
    """One weight that float16 scales cannot hold, on an input that is always zero."""

    def change(old):
        up, down = old["model.layers.0.mlp.up_proj.weight"], old[f"{LAYER}.weight"]
        up[11] = 0
        down[7, 11] = 4e6
        return old

    return change_tensors(shutil.copytree(plain, tmp_path / "outlier"), change)


@pytest.mark.parametrize("name", ["gptq", "awq"])
def test_a_layer_beyond_the_format_stays_plain_and_it_is_said(outlier, tmp_path, name):
    folder = tmp_path / "q"
    folder.mkdir()
    facts = RTN(bits=4, group_size=32, format=name).run(outlier, folder, Context())
    assert f"{LAYER} stays unquantized" in facts["notes"][0]
    tensors = open_checkpoint(folder).tensors
    assert f"{LAYER}.weight" in tensors
    assert f"{LAYER}.qweight" not in tensors
    assert "model.layers.1.mlp.down_proj.qweight" in tensors
    check_result(folder)


def test_a_format_with_wider_scales_holds_it(outlier, tmp_path):
    folder = quantized(outlier, tmp_path / "q")
    assert f"{LAYER}.weight_packed" in open_checkpoint(folder).tensors
    check_result(folder)


# Heads that are shared, and stored all the same
# ------------------------------------------------------------------------------------------------


def test_a_shared_head_stored_twice_is_quantized_once(plain, tmp_path):
    def change(old):
        return {**old, "lm_head.weight": old["model.embed_tokens.weight"].clone()}

    source = change_tensors(shutil.copytree(plain, tmp_path / "twice"), change)
    twice = quantized(source, tmp_path / "q", lm_head=True)
    once = quantized(plain, tmp_path / "once", lm_head=True)
    assert open_checkpoint(twice).tensors.keys() == open_checkpoint(once).tensors.keys()
    check_result(twice)

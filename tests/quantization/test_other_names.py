"""Quantized folders in other tools' layout: the settings in a file of their own, weights under
another name."""

from __future__ import annotations

import json

import pytest
import torch

from slim.checkpoints.checkpoint import open_checkpoint
from slim.checkpoints.stage import Context
from slim.loading.load_model import load_model
from slim.quantization.methods.rtn import RTN
from tests.conftest import build_small
from tests.support.folders import change_json

TOKENS = torch.arange(3, 40)[None]


def logits(folder):
    with torch.no_grad():
        return load_model(folder, "float32")(TOKENS).logits


@pytest.mark.parametrize(
    ("name", "file", "weights"),
    [
        ("gptq", "quantize_config.json", "gptq_model-4bit-32g.safetensors"),
        ("gptq", "quantize_config.json", "model.safetensors"),
        ("awq", "quant_config.json", "awq_model_w4_g32.safetensors"),
    ],
)
def test_settings_in_a_file_of_their_own_are_read(tmp_path, name, file, weights):
    source = build_small("llama", tmp_path / "source", num_hidden_layers=2)
    folder = tmp_path / "quantized"
    folder.mkdir()
    RTN(bits=4, group_size=32, format=name).run(source, folder, Context())
    before = logits(folder)
    settings = json.loads((folder / "config.json").read_text())["quantization_config"]
    del settings["quant_method"]
    if name == "awq":  # as AutoAWQ's own file says
        settings = {"zero_point": True, "q_group_size": 32, "w_bit": 4, "version": "GEMM"}
        settings["modules_to_not_convert"] = ["lm_head"]
    (folder / file).write_text(json.dumps(settings))
    change_json(folder / "config.json", quantization_config=...)
    (folder / "model.safetensors").rename(folder / weights)
    assert open_checkpoint(folder).spec.quantization["quant_method"] == name
    assert torch.equal(logits(folder), before)

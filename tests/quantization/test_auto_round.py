"""AutoRound's own format is read as the layouts that it packs layers in."""

from __future__ import annotations

import json

import pytest
import torch

from slim.checkpoints.checkpoint import open_checkpoint
from slim.core.errors import SlimError
from slim.loading.check_result import read_plainly
from slim.quantization.formats import read_config
from slim.quantization.methods.rtn import RTN
from tests.support.stages import run

# format and symmetry that slim writes -> what AutoRound calls the same bytes
SAME = {
    "version 1": ("gptq", True, "auto_round:auto_gptq"),
    "version 2": ("gptq", False, "auto_round:gptqmodel"),
    "awq": ("awq", False, "auto_round:auto_awq"),
}


def renamed(config: dict, packing: str) -> dict:
    """Return a ``quantization_config`` in AutoRound's words."""
    return {
        "quant_method": "auto-round",
        "packing_format": packing,
        "bits": config["bits"],
        "group_size": config["group_size"],
        "sym": config.get("sym", not config.get("zero_point", True)),
        "data_type": "int",
        "act_bits": 16,
    }


@pytest.mark.parametrize("name", SAME)
def test_the_same_bytes_are_the_same_weights(name, small_llama, tmp_path):
    form, symmetric, packing = SAME[name]
    result = tmp_path / "result"
    run(RTN(bits=4, group_size=32, symmetric=symmetric, format=form), small_llama, result)
    before = read_plainly(open_checkpoint(result)).state_dict()
    file = result / "config.json"
    config = json.loads(file.read_text())
    config["quantization_config"] = renamed(config["quantization_config"], packing)
    file.write_text(json.dumps(config))
    after = read_plainly(open_checkpoint(result)).state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before)


BASE = {
    "quant_method": "auto-round", "packing_format": "auto_round:auto_gptq", "bits": 4,
    "group_size": 128, "sym": True,
}  # fmt: skip


def test_layers_that_differ_have_their_own_scheme():
    layer = "model.layers.0.mlp.down_proj"
    stored = read_config(BASE | {"extra_config": {layer: {"bits": 8}}})
    assert stored.scheme(layer).bits == 8
    assert stored.scheme("model.layers.1.mlp.down_proj").bits == 4


def test_layers_of_sixteen_bits_are_plain():
    layer = "model.layers.0.mlp.down_proj"
    assert read_config(BASE | {"extra_config": {layer: {"bits": 16}}}).scheme(layer) is None


@pytest.mark.parametrize(
    "change",
    [{"packing_format": "auto_round:ark"}, {"data_type": "mx_fp"}, {"act_bits": 8}],
)
def test_what_slim_does_not_read_is_refused(change):
    with pytest.raises(SlimError, match="AutoRound"):
        read_config(BASE | change)

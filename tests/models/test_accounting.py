"""Parameters and multiply-accumulates: against torch's own counter and LLM-Pruner's published
counts."""

from __future__ import annotations

import json

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from slim.checkpoints.checkpoint import open_checkpoint
from slim.loading.load_model import load_model
from slim.models.accounting import (
    account,
    attention_macs,
    before_and_after,
    linear_macs,
    llm_pruner_macs,
    macs,
)
from slim.models.spec import ModelSpec
from slim.pruning.width_sizes import LLM_PRUNER, pruned_width, with_widths
from tests.conftest import build_small

TINYLLAMA = ModelSpec(
    dict(
        model_type="llama", hidden_size=2048, intermediate_size=5632, num_hidden_layers=22, num_attention_heads=32,
        num_key_value_heads=4, vocab_size=32000,
    )
)  # fmt: skip


def pruned_tinyllama(ratio: float) -> ModelSpec:
    return with_widths(
        TINYLLAMA,
        {block: pruned_width(TINYLLAMA, block, ratio, LLM_PRUNER) for block in range(4, 18)},
    )


def test_counts_of_llm_pruner_on_tinyllama(shared):
    reference = json.loads((shared / "reference" / "width_counts_tinyllama.json").read_text())
    whole, pruned = reference["rows"]
    for row, model in ((whole, TINYLLAMA), (pruned, pruned_tinyllama(0.3))):
        assert model.parameters() == row["params"]
        tokens = reference["macs_tokens"]
        attention = sum(attention_macs(model, block, tokens) for block in range(22))
        assert attention == row["attn_macs"]
        assert macs(model, tokens) - attention == row["linear_macs"]
        assert llm_pruner_macs(model, tokens) == row["ptflops_total"]
        assert round(llm_pruner_macs(model, tokens) / 1e9, 2) == row["GMac"]
        shape = model.at(4)
        assert (shape.kv_heads, shape.heads, shape.intermediate_size) == (
            row["kv_heads"],
            row["q_heads"],
            row["ff"],
        )
    # as stated in LLM-Pruner's counting
    assert (whole["params"], pruned["params"]) == (1_100_048_384, 921_651_200)


@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize("differing", [False, True])
def test_torch_counts_the_same(tmp_path, model_type, differing):
    if differing and model_type == "llama":
        pytest.skip("Llama's own configuration cannot hold heads that differ by block")
    sizes = (
        {"3": {"num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 40}}
        if differing
        else None
    )
    folder = build_small(
        model_type, tmp_path / "model", **({"per_layer_config": sizes} if differing else {})
    )
    model, spec = load_model(folder), open_checkpoint(folder).spec
    model.set_attn_implementation("eager")  # its two products are counted as what they are
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, 37, dtype=torch.long), use_cache=False)
    # rotary angles: 1e-4
    assert counter.get_total_flops() == pytest.approx(2 * macs(spec, 37), rel=2e-4)
    assert spec.parameters() == sum(parameter.numel() for parameter in model.parameters())


def test_totals_are_sums_over_blocks():
    model = pruned_tinyllama(0.3)
    found = account(model, 64)
    outside = 2 * 32000 * 2048 + 2048
    assert sum(found["block_parameters"]) + outside == found["parameters"] == model.parameters()
    assert sum(found["block_macs"]) + 64 * 32000 * 2048 == found["macs"]
    assert (
        found["block_parameters"][3] > found["block_parameters"][4] == found["block_parameters"][17]
    )
    assert linear_macs(model, 3, 64) == 64 * (found["block_parameters"][3] - 2 * 2048)
    both = before_and_after(TINYLLAMA, model, 64)
    assert both["parameters_share"] == 921_651_200 / 1_100_048_384
    assert both["macs_before"] == macs(TINYLLAMA, 64) and both["macs_after"] == found["macs"]

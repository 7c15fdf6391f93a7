"""Depth and width pruning of a weight-pruned model: later stages still know its zeros."""

from __future__ import annotations

import json

import pytest
from safetensors.torch import load_file

from slim.chain.pipeline import Pipeline
from slim.checkpoints.checkpoint import Checkpoint, open_checkpoint
from slim.checkpoints.source import Source
from slim.checkpoints.stage import Context
from slim.checkpoints.store import Store
from slim.data.calibration import Calibration
from slim.data.examples import TinyText
from slim.pruning.carried_mask import carried_mask, total_share
from slim.pruning.magnitude import Magnitude
from slim.pruning.masks import layer_zeros
from slim.pruning.weights import MagnitudeWeights
from slim.pruning.width_magnitude import WidthL1
from slim.training.tune import Lora

CALIBRATION = Calibration("tiny:calibration", samples=4, length=32)
UNSTRUCTURED = {"kind": "unstructured", "n": None, "m": None}


@pytest.fixture
def sparse(small_llama, tmp_path):
    """Make the folder of a weight-pruned model, with its manifest."""

    def make(**settings):
        folder = tmp_path / "sparse"
        folder.mkdir()
        facts = MagnitudeWeights(**settings).run(small_llama, folder, Context())
        (folder / "slim.json").write_text(json.dumps({"facts": facts}))
        return folder

    return make


def run(stage, source, target) -> dict:
    """Return the metadata of a stage's result, with what the pipeline adds on zeros."""
    target.mkdir()
    facts = stage.run(source, target, Context())
    return {**facts, **carried_mask(open_checkpoint(source), target, facts)}


def zero_share(folder) -> float:
    return total_share(list(layer_zeros(open_checkpoint(folder), {})))


@pytest.mark.parametrize("settings", [{"sparsity": 0.5}, {"n": 2, "m": 4}])
def test_depth_pruning_passes_the_mask_on(sparse, tmp_path, settings):
    source = sparse(**settings)
    facts = run(Magnitude(remove=[1]), source, tmp_path / "out")
    assert facts["mask"] == Checkpoint(source).manifest["facts"]["mask"]


def test_the_share_of_zeros_is_that_of_the_blocks_that_are_left(sparse, tmp_path):
    facts = run(Magnitude(remove=[1]), sparse(sparsity=0.5), tmp_path / "out")
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    linears = [tensor for name, tensor in tensors.items() if "_proj" in name]
    zeros = sum(int((tensor == 0).sum()) for tensor in linears)
    assert facts["sparsity"] == zeros / sum(tensor.numel() for tensor in linears)


def test_a_dense_model_has_no_mask_to_pass_on(small_llama, tmp_path):
    facts = run(Magnitude(remove=[1]), small_llama, tmp_path / "out")
    assert "mask" not in facts and "sparsity" not in facts


def test_where_a_refit_ends_the_mask_is_said(sparse, tmp_path, capsys):
    stage = Magnitude(remove=[2], reconstruct=True, calibration=CALIBRATION)
    facts = run(stage, sparse(n=2, m=4), tmp_path / "out")
    said = " ".join(capsys.readouterr().err.split())
    assert "The mask of sparse ends in model.layers.1.mlp.down_proj; all other zeros stay." in said
    assert facts["mask"] == UNSTRUCTURED
    assert facts["sparsity"] == zero_share(tmp_path / "out") < 0.5


def test_width_pruning_passes_zeros_on(sparse, tmp_path):
    stage = WidthL1(calibration=CALIBRATION, first_block=0, last_block=2, rounding=1)
    facts = run(stage, sparse(sparsity=0.5), tmp_path / "out")
    assert facts["mask"] == UNSTRUCTURED
    assert facts["sparsity"] == zero_share(tmp_path / "out")


def test_width_pruning_says_that_a_pattern_ends(sparse, tmp_path, capsys):
    stage = WidthL1(calibration=CALIBRATION, first_block=0, last_block=2, rounding=1)
    facts = run(stage, sparse(n=2, m=4), tmp_path / "out")
    said = " ".join(capsys.readouterr().err.split())
    assert "The 2:4 pattern of sparse ends in model.layers.0.mlp.down_proj, " in said
    assert facts["mask"] == UNSTRUCTURED


def test_zeros_survive_depth_pruning_and_tuning(small_llama, tmp_path):
    tune = Lora(
        data=TinyText(), learning_rate=0.02, steps=10, window=64, batch_tokens=256,
        validation_tokens=256, validate_every=5,
    )  # fmt: skip
    stages = [MagnitudeWeights(sparsity=0.5), Magnitude(remove=[1]), tune]
    results = Pipeline(Source(str(small_llama)), stages, None, Store(tmp_path / "runs")).run()
    pruned = load_file(results[2].checkpoint.folder / "model.safetensors")
    tuned = load_file(results[3].checkpoint.folder / "model.safetensors")
    refilled = 0
    for name, tensor in pruned.items():
        if "_proj" in name:
            refilled += int((tuned[name][tensor == 0] != 0).sum())
    assert refilled == 0
    assert results[3].metadata["zeros_restored"] > 0

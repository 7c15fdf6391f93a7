"""Zeros of a model that was pruned weight by weight: every later stage passes its mask on, or the
run says that it ends."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from slim.chain.pipeline import Pipeline
from slim.checkpoints.checkpoint import open_checkpoint
from slim.checkpoints.reader import TensorReader
from slim.checkpoints.source import Source
from slim.checkpoints.store import Store
from slim.data.calibration import Calibration
from slim.data.examples import TinyText
from slim.distillation.stage import Lora as Distilled
from slim.distillation.student import Layers
from slim.pruning.magnitude import Magnitude
from slim.pruning.masks import fits_pattern
from slim.pruning.weights import MagnitudeWeights
from slim.pruning.width_magnitude import WidthL1
from slim.quantization.methods.rtn import RTN
from slim.training.qlora import QLora
from slim.training.tune import Full, Lora
from tests.conftest import build_small

QUICK = {"steps": 3, "window": 64, "batch_tokens": 256, "validation_tokens": 256}
TRAINED = {"data": TinyText(), "learning_rate": 0.02, **QUICK}
ENDS = "its mask ends here"


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    return build_small("llama", tmp_path_factory.mktemp("dense") / "dense", num_hidden_layers=4)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return Store(tmp_path_factory.mktemp("runs"))


def chain(dense, store, *stages):
    return Pipeline(Source(str(dense)), list(stages), None, store).run()


def zero_share(result) -> float:
    reader, spec = TensorReader(result.checkpoint), result.checkpoint.spec
    zeros = weights = 0
    for block in range(spec.blocks):
        for name in spec.block_linears(block):
            weight = reader.read(f"{spec.family.blocks}.{block}.{name}.weight")
            zeros += int((weight == 0).sum())
            weights += weight.numel()
    return zeros / weights


def narrower() -> WidthL1:
    text = Calibration("tiny:calibration", samples=2, length=32)
    return WidthL1(ratio=0.25, first_block=0, last_block=3, rounding=8, calibration=text)


BETWEEN = {
    "fewer blocks": lambda: Magnitude(blocks=1),
    "named blocks": lambda: Magnitude(remove=[1, 2]),
    "a student from blocks": lambda: Layers(keep=2),
    "fewer channels": lambda: narrower(),
}
TUNERS = {
    "lora": lambda dense: Lora(**TRAINED),
    "full": lambda dense: Full(**TRAINED),
    "qlora": lambda dense: QLora(**TRAINED),
    "teacher": lambda dense: Distilled(**TRAINED, base=Source(str(dense))),
}


@pytest.mark.parametrize("between", BETWEEN)
def test_a_stage_that_copies_weights_passes_the_mask_on(dense, store, between):
    _, masked, cut, tuned = chain(
        dense, store, MagnitudeWeights(sparsity=0.5), BETWEEN[between](), Lora(**TRAINED)
    )
    assert cut.metadata["mask"]["kind"] == "unstructured"
    assert cut.metadata["sparsity"] == pytest.approx(zero_share(cut))
    assert zero_share(tuned) == pytest.approx(zero_share(cut), abs=1e-6)
    assert tuned.metadata["zeros_restored"] > 0
    assert zero_share(tuned) >= masked.metadata["sparsity"] - 0.02


@pytest.mark.parametrize("tuner", TUNERS)
def test_every_way_of_training_keeps_the_zeros_after_depth_pruning(dense, store, tuner):
    stages = MagnitudeWeights(sparsity=0.6), Magnitude(blocks=1), TUNERS[tuner](dense)
    *_, cut, tuned = chain(dense, store, *stages)
    assert zero_share(tuned) >= zero_share(cut) > 0.59


def test_two_trainings_in_a_row_keep_the_zeros(dense, store):
    stages = MagnitudeWeights(sparsity=0.5), Lora(**TRAINED), Full(**TRAINED)
    assert zero_share(chain(dense, store, *stages)[-1]) == pytest.approx(0.5, abs=0.01)


def test_a_pattern_stays_a_pattern_where_only_blocks_go(dense, store):
    *_, cut = chain(dense, store, MagnitudeWeights(n=2, m=4), Magnitude(blocks=1))
    assert cut.metadata["mask"] == {"kind": "n:m", "n": 2, "m": 4}


def test_a_pattern_ends_as_one_where_channels_go(dense, store):
    *_, cut = chain(dense, store, MagnitudeWeights(n=2, m=4), narrower())
    assert cut.metadata["mask"]["kind"] == "unstructured"


def test_a_quantized_result_says_that_the_mask_ends(dense, store, capfd):
    *_, rounded = chain(dense, store, MagnitudeWeights(sparsity=0.5), RTN(bits=4, group_size=32))
    assert "mask" not in rounded.metadata
    assert ENDS in " ".join(capfd.readouterr().err.split())


def test_an_adapter_that_stays_apart_says_that_the_mask_ends(dense, store, capfd):
    stages = MagnitudeWeights(sparsity=0.5), Lora(**TRAINED, merge=False)
    *_, adapted = chain(dense, store, *stages)
    assert "mask" not in adapted.metadata
    assert ENDS in " ".join(capfd.readouterr().err.split())


def test_a_dense_chain_says_nothing_of_masks(dense, store, capfd):
    *_, tuned = chain(dense, store, Magnitude(blocks=1), Lora(**TRAINED))
    assert "mask" not in tuned.metadata
    assert "mask" not in capfd.readouterr().err


def test_zeros_from_elsewhere_are_named_before_they_are_filled(dense, store, tmp_path, capfd):
    """A model that another program pruned has no manifest that speaks of zeros."""
    foreign = build_small("llama", tmp_path / "foreign", num_hidden_layers=2)
    reader = TensorReader(open_checkpoint(foreign))
    tensors = {name: reader.read(name) for name in open_checkpoint(foreign).tensors}
    for name, tensor in tensors.items():
        if "_proj" in name:
            tensor[tensor.abs() < tensor.abs().median()] = 0
    save_file(tensors, foreign / "model.safetensors", metadata={"format": "pt"})
    Pipeline(Source(str(foreign)), [Lora(**TRAINED)], None, store).run()
    assert "no mask says so" in " ".join(capfd.readouterr().err.split())


@pytest.mark.parametrize(
    ("row", "fits"),
    [([0, 0, 1, 1, 1, 0, 0, 1], True), ([0, 1, 1, 1, 0, 0, 0, 0], False), ([0, 0, 1], False)],
)
def test_what_fits_a_pattern(row, fits):
    assert fits_pattern(torch.tensor([row]), {"kind": "n:m", "n": 2, "m": 4}) is fits

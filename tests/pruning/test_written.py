"""A pruned model is read back and compared with what was meant before it is kept."""

from __future__ import annotations

import pytest
import torch

from slim.calibration import sequential
from slim.chain.pipeline import Pipeline
from slim.checkpoints import writer
from slim.checkpoints.source import Source
from slim.checkpoints.store import Store
from slim.core.errors import SlimError
from slim.data.calibration import Calibration
from slim.pruning import reconstruction
from slim.pruning.magnitude import Magnitude
from slim.pruning.weights import MagnitudeWeights, SparseGPT, Wanda
from slim.pruning.width_magnitude import WidthL1
from slim.quantization.methods.gptq import GPTQ
from tests.conftest import build_small
from tests.support.folders import change_tensors

TEXT = Calibration("tiny:calibration", samples=2, length=32)
Q, DOWN = "model.layers.1.self_attn.q_proj.weight", "model.layers.0.mlp.down_proj.weight"
EMBEDDING, NORM = "model.embed_tokens.weight", "model.norm.weight"
STAGES = {
    "depth": lambda: Magnitude(remove=[1]),
    "depth, refitted": lambda: Magnitude(remove=[1], reconstruct=True, calibration=TEXT),
    "magnitude": lambda: MagnitudeWeights(sparsity=0.5),
    "wanda": lambda: Wanda(sparsity=0.5, calibration=TEXT),
    "sparsegpt": lambda: SparseGPT(sparsity=0.5, calibration=TEXT),
    "width": lambda: WidthL1(
        ratio=0.25, first_block=0, last_block=2, rounding=8, reconstruct=True, calibration=TEXT
    ),
}
# what happens to the written file -> the stages that must see it
DAMAGES = {
    "twice": (lambda old: {**old, Q: 2 * old[Q]}, STAGES),
    "refitted": (lambda old: {**old, DOWN: 1.5 * old[DOWN]}, ["depth, refitted", "sparsegpt"]),
    "embedding": (lambda old: {**old, EMBEDDING: old[EMBEDDING].roll(1, 0)}, ["width"]),
    "norm": (lambda old: {**old, NORM: 2 * old[NORM]}, ["depth", "magnitude"]),
    "a zero more": (
        lambda old: {**old, Q: old[Q].masked_fill(old[Q] == old[Q].max(), 0)},
        ["magnitude"],
    ),
}
CASES = [(name, kind) for name, (_, kinds) in DAMAGES.items() for kind in kinds]


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    return build_small("llama", tmp_path_factory.mktemp("dense") / "dense", num_hidden_layers=3)


def prune(dense, folder, kind):
    Pipeline(Source(str(dense)), [STAGES[kind]()], None, Store(folder / "runs")).run()


@pytest.mark.parametrize(("damage", "kind"), CASES)
def test_a_damaged_result_is_seen_and_not_kept(dense, tmp_path, monkeypatch, damage, kind):
    write = writer.copy_companions

    def damaged(source, target):
        write(source, target)
        change_tensors(target, DAMAGES[damage][0])

    for module in (writer, sequential, reconstruction):
        monkeypatch.setattr(module, "copy_companions", damaged)
    with pytest.raises(SlimError, match=r"not\s+kept"):
        prune(dense, tmp_path, kind)
    assert not list((tmp_path / "runs" / "stages").glob("prune-*/slim.json"))


def test_blocks_that_change_places_are_seen(dense, tmp_path, monkeypatch):
    """The files fit their headers and the config; only the order of two equal shapes is wrong."""

    def swapped(source, kept):
        for old, new in renumbered(source, kept):
            yield old, new.translate(str.maketrans("01", "10")) if "layers" in new else new

    renumbered = writer.renumbered
    monkeypatch.setattr(writer, "renumbered", swapped)
    with pytest.raises(SlimError, match="reads back from .* as other numbers than"):
        prune(dense, tmp_path, "depth")


def test_a_config_that_calls_blocks_otherwise_is_seen(dense, tmp_path, monkeypatch):
    """All tensors are right; the angles of the positions are those of another model."""
    write = writer.write_config

    def other(config, target):
        write({**config, "rope_parameters": {"rope_type": "default", "rope_theta": 3.0}}, target)

    monkeypatch.setattr(writer, "write_config", other)
    with pytest.raises(SlimError, match="does not compute what the stage meant"):
        prune(dense, tmp_path, "depth")


@pytest.mark.slow
def test_damaged_packed_weights_are_seen_by_what_they_compute(dense, tmp_path, monkeypatch):
    """Beyond the rows that are compared one by one."""
    write = sequential.copy_companions

    def damaged(source, target):
        write(source, target)
        packed = Q.replace("weight", "weight_packed")

        def change(old):
            codes = old[packed].clone()
            codes[2:] = torch.flip(codes[2:], [0])
            return {**old, packed: codes}

        change_tensors(target, change)

    monkeypatch.setattr(sequential, "copy_companions", damaged)
    stage = GPTQ(bits=4, group_size=32, calibration=TEXT)
    with pytest.raises(SlimError, match="does not compute what the stage meant"):
        Pipeline(Source(str(dense)), [stage], None, Store(tmp_path / "runs")).run()
    assert not list((tmp_path / "runs" / "stages").glob("quantize-*/slim.json"))


@pytest.mark.slow
def test_an_embedding_of_two_bits_is_no_damage(dense, tmp_path):
    """The calibration saw the plain one, so what leaves the last block is not what was seen."""
    rough = {"*embed_tokens": {"bits": 2, "group_size": 32}}
    stage = GPTQ(bits=4, group_size=32, embeddings=True, overrides=rough, calibration=TEXT)
    Pipeline(Source(str(dense)), [stage], None, Store(tmp_path / "runs")).run()
    assert len(list((tmp_path / "runs" / "stages").glob("quantize-*/slim.json"))) == 1

"""Error propagation: targets that make up for what the changed layers before a layer have done."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from slim.calibration import propagation
from slim.calibration.propagation import HELD_OUT, Drift
from slim.calibration.sequential import SequentialCalibration
from slim.checkpoints.checkpoint import open_checkpoint
from slim.checkpoints.stage import Context
from slim.core.errors import SlimError
from slim.gguf.quantizer import Gguf
from slim.loading.load_model import load_model
from slim.quantization.methods.awq import AWQ
from slim.quantization.methods.gptq import GPTQ
from tests.calibration.test_sequential import Spy
from tests.support.calibrating import random_calibration
from tests.support.encoding import build_encoder


def inputs(samples, seed=0):
    """Return X, X^ and R - R^ of correlated features, where X^ is a mixture of X's with noise."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(12, 12, generator=torch.Generator().manual_seed(1))
    plain = torch.randn(samples, 30, 12, generator=generator) @ mixing
    noise = torch.randn(samples, 30, 12, generator=generator)
    residual = 0.3 * torch.randn(samples, 30, 5, generator=generator)
    return plain, 0.9 * plain + 0.5 * noise, residual


def weight():
    return torch.randn(5, 12, generator=torch.Generator().manual_seed(3))


def drift_of(plain, changed, residual):
    drift = Drift.empty(12, "cpu")
    drift.add(plain, changed, residual, 0)
    return drift


def held(samples):
    return torch.arange(samples) % HELD_OUT == HELD_OUT - 1


def error(plain, changed, residual, target):
    """|X W^T + R - R^ - X^ V^T|^2 by itself, in float64."""
    wanted = plain.double() @ weight().double().T
    if residual is not None:
        wanted = wanted + residual.double()
    return float((wanted - changed.double() @ target.double().T).square().sum())


@pytest.mark.parametrize("adds", [False, True], ids=["inside", "adds to the residual stream"])
def test_the_full_step_is_the_least_squares_solution(adds, monkeypatch):
    monkeypatch.setattr(propagation, "RIDGES", (0.0,))
    plain, changed, residual = inputs(16)
    residual = residual if adds else None
    drift = drift_of(plain, changed, residual)
    drift.held_out = drift.seen  # then the full step is the best one there, too
    correction = drift.correct({"layer": weight()})["layer"]
    rows = ~held(16)
    wanted = plain[rows] @ weight().T
    if adds:
        wanted = wanted + residual[rows]
    expected = torch.linalg.lstsq(changed[rows].flatten(0, 1), wanted.flatten(0, 1)).solution.T
    assert correction.length == pytest.approx(1.0, abs=1e-4)
    torch.testing.assert_close(correction.weight, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("adds", [False, True], ids=["inside", "adds to the residual stream"])
def test_the_gain_is_the_squared_error_saved_on_samples_that_were_held_out(adds):
    plain, changed, residual = inputs(24)
    residual = residual if adds else None
    correction = drift_of(plain, changed, residual).correct({"layer": weight()})["layer"]
    rows = held(24)
    data = plain[rows], changed[rows], residual[rows] if adds else None
    saved = error(*data, weight()) - error(*data, correction.weight)
    assert saved > 0
    assert correction.gain == pytest.approx(saved, rel=1e-3)


def test_the_length_is_the_best_one_on_samples_that_were_held_out():
    plain, changed, residual = inputs(24)
    correction = drift_of(plain, changed, residual).correct({"layer": weight()})["layer"]
    rows = held(24)
    data = plain[rows], changed[rows], residual[rows]
    step = (correction.weight - weight()) / correction.length
    best = error(*data, correction.weight)
    for length in (correction.length - 0.02, min(1.0, correction.length + 0.02)):
        assert error(*data, weight() + length * step) >= best


def test_samples_where_the_step_does_not_help_keep_the_weights():
    plain, changed, _ = inputs(8)
    changed[held(8)] = 3 * plain[held(8)]  # there the weights should shrink, elsewhere they grow
    changed[~held(8)] = 0.3 * plain[~held(8)]
    assert drift_of(plain, changed, None).correct({"layer": weight()}) == {}


class Shrink(Spy):
    """Changes every layer, and remembers how its inputs differ from the plain model's."""

    propagates = True

    def __init__(self):
        super().__init__()
        self.drifts = {}

    def process(self, group):
        result = super().process(group)
        self.drifts[f"{group.prefix}.{group.spec.linears[0]}"] = group.drift
        for linear in group.linears.values():
            linear.weight.mul_(0.9)
        return result


def seen_by(model, tokens, names):
    """Return the inputs of some modules, float64 [rows, features]."""
    found = {}

    def collect(name):
        def hook(module, inputs):
            found[name] = inputs[0].detach().double().flatten(0, 1)

        return hook

    for name in names:
        model.get_submodule(name).register_forward_pre_hook(collect(name))
    with torch.no_grad():
        model(tokens)
    return found


@pytest.mark.parametrize("batch_bytes", [2**22, 1], ids=["one batch", "a batch per sample"])
def test_drift_equals_that_of_the_whole_models(small_llama, batch_bytes, monkeypatch):
    monkeypatch.setattr("slim.calibration.capture.BATCH_BYTES", batch_bytes)
    tokens = torch.randint(3, 1024, (9, 20), generator=torch.Generator().manual_seed(2))
    spy = Shrink()
    SequentialCalibration(open_checkpoint(small_llama), spy, None, tokens).run()
    layer, norm = "model.layers.5.mlp.down_proj", "model.layers.5.post_attention_layernorm"
    plain = AutoModelForCausalLM.from_pretrained(small_llama)
    changed = AutoModelForCausalLM.from_pretrained(small_llama)
    for name, parameter in changed.named_parameters():
        if name.endswith("_proj.weight"):  # the last one has no part in its own input
            parameter.data.mul_(0.9)
    before = seen_by(plain, tokens, (layer, norm))
    after = seen_by(changed, tokens, (layer, norm))
    rows = held(9).repeat_interleave(20)
    drift = spy.drifts[layer]
    for products, chosen in ((drift.seen, ~rows), (drift.held_out, rows)):
        now = after[layer][chosen]
        expected = {
            "cross": before[layer][chosen].T @ now,
            "residual": (before[norm] - after[norm])[chosen].T @ now,
        }
        for name, value in expected.items():
            torch.testing.assert_close(
                getattr(products, name).double(),
                value,
                rtol=1e-3,
                atol=1e-4 * value.abs().max().item(),
            )


STAGES = {
    "gptq": lambda **settings: GPTQ(2, 32, refine=1, **settings),
    "awq": lambda **settings: AWQ(2, 32, grid=4, **settings),
    "gguf": lambda **settings: Gguf("Q4_0", calibrated=True, refine=1, **settings),
}


@pytest.mark.parametrize("name", STAGES)
def test_propagation_brings_the_result_nearer_to_the_plain_model(name, small_llama, tmp_path):
    calibration = random_calibration(tmp_path, 3000)
    calibration.samples = 32
    plain = load_model(small_llama, "float32")
    tokens = calibration.tokens_for(open_checkpoint(small_llama))
    with torch.no_grad():
        wanted = plain.model(tokens).last_hidden_state
    distances = {}
    for propagate in (False, True):
        target = tmp_path / str(propagate)
        target.mkdir()
        stage = STAGES[name](calibration=calibration, propagate=propagate)
        metadata = stage.run(small_llama, target, Context())
        assert ("corrected_layers" in metadata) == propagate
        with torch.no_grad():
            reached = load_model(target, "float32").model(tokens).last_hidden_state
        distances[propagate] = float((reached - wanted).norm())
    assert metadata["corrected_layers"] > 10
    assert distances[True] < 0.9 * distances[False]


def test_too_few_samples_to_hold_one_out_are_refused(small_llama, tmp_path):
    calibration = random_calibration(tmp_path, 3000)
    calibration.samples = HELD_OUT - 1
    stage = GPTQ(4, 32, calibration=calibration, propagate=True)
    with pytest.raises(SlimError, match=f"calibration.samples={HELD_OUT}, or quant.propagate"):
        stage.check(open_checkpoint(small_llama).spec)


def test_propagation_needs_the_layers_before():
    with pytest.raises(SlimError, match="Use quant.true_sequential=true"):
        GPTQ(4, 32, true_sequential=False, propagate=True)


def test_propagation_of_plain_rounding_is_refused():
    with pytest.raises(SlimError, match="use quant.calibrated=true"):
        Gguf("Q8_0", propagate=True)


def test_results_without_propagation_keep_their_names():
    for stage in (GPTQ(4, 32), AWQ(4, 32), Gguf("Q8_0")):
        assert "propagate" not in stage.cache_key()
    assert GPTQ(4, 32, propagate=True).cache_key()["propagate"] is True


def test_the_plain_model_of_an_encoder_is_run_to_its_end(tmp_path):
    folder = build_encoder("bert", tmp_path / "bert", top="embedding")
    tokens = torch.randint(5, 100, (9, 20), generator=torch.Generator().manual_seed(2))
    calibration = SequentialCalibration(open_checkpoint(folder), Shrink(), None, tokens)
    calibration.run()
    with torch.no_grad():
        expected = load_model(folder, "float32")(tokens).last_hidden_state
    reached = torch.cat(calibration.plain_captured.hidden)
    torch.testing.assert_close(reached, expected, rtol=1e-4, atol=1e-4)

"""Maps over removed blocks, and greedy removal: against slow, direct implementations."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from slim.checkpoints.checkpoint import open_checkpoint
from slim.checkpoints.stage import Context
from slim.checkpoints.tokenizer import load_tokenizer
from slim.core.errors import SlimError
from slim.data.calibration import Calibration
from slim.loading.load_model import load_model
from slim.pruning.magnitude import Magnitude
from slim.pruning.ppl import Greedy, Perplexity
from slim.pruning.reconstruction import find_gaps
from slim.pruning.taylor import Taylor
from tests.conftest import ROOT, build_small

TINY = ROOT / "slim" / "assets" / "tiny"


@pytest.fixture
def calibration() -> Calibration:
    return Calibration("tiny:calibration", samples=40, length=32)


def run(stage, source: Path, target: Path) -> dict:
    target.mkdir()
    return stage.run(source, target, Context())


# --- reconstruction
# -------------------------------------------------------------------------------------------------


def capture(
    model, tokens: torch.Tensor, blocks: list[int], upto: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run the given blocks; return their last output and the input of the last one's down
    projection, float64 rows."""
    layers, inputs = model.model.layers, []
    model.model.layers = torch.nn.ModuleList(layers[index] for index in blocks)
    hook = layers[blocks[-1]].mlp.down_proj.register_forward_pre_hook(
        lambda _, args: inputs.append(args[0])
    )
    outputs = []
    last = model.model.norm.register_forward_pre_hook(lambda _, args: outputs.append(args[0]))
    with torch.no_grad():
        model(tokens, use_cache=False)
    hook.remove()
    last.remove()
    model.model.layers = layers
    return outputs[0].flatten(0, 1).double(), inputs[0].flatten(0, 1).double()


@pytest.mark.parametrize("model_type", ["llama", "qwen2"])
def test_the_map_is_the_least_squares_fit_gap_by_gap(tmp_path, calibration, model_type):
    """Two gaps, 1-2 and 4: each fitted by a solver on the states themselves, the second behind the
    closed first."""
    source = build_small(model_type, tmp_path / "model")
    stage = Magnitude(remove=[1, 2, 4], reconstruct=True, damping=1e-8, calibration=calibration)
    facts = run(stage, source, tmp_path / "out")
    tokens = calibration.tokens(load_tokenizer(source), 256)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    found = load_file(tmp_path / "out" / "model.safetensors")
    dense = {end: capture(model, tokens, list(range(end + 1)), end)[0] for end in (2, 4)}
    for new, (kept, end) in enumerate((([0], 2), ([0, 3], 4))):
        here, z = capture(model, tokens, kept, end)
        layer = model.model.layers[kept[-1]].mlp.down_proj
        change = torch.linalg.lstsq(z, dense[end] - here).solution.T
        layer.weight.data += change.float()  # the next gap stands behind this one closed
        stored = found[f"model.layers.{new}.mlp.down_proj.weight"].double()
        assert (stored - layer.weight).norm() < 2e-3 * change.norm()
        gap = facts["gaps"][new]
        assert gap["error_cut"] == pytest.approx(
            ((here - dense[end]).norm() / dense[end].norm()).item(), rel=1e-3
        )
        left = (here + z @ change.T - dense[end]).norm() / dense[end].norm()
        assert (
            gap["error_bridged"] == pytest.approx(left.item(), rel=1e-2) and left < gap["error_cut"]
        )
    untouched = load_file(source / "model.safetensors")
    for name in ("self_attn.q_proj", "mlp.up_proj"):
        assert torch.equal(
            found[f"model.layers.1.{name}.weight"], untouched[f"model.layers.3.{name}.weight"]
        )
    assert torch.equal(
        found["model.layers.2.mlp.down_proj.weight"],
        untouched["model.layers.5.mlp.down_proj.weight"],
    )
    assert (facts["kept_blocks"], facts["unbridged_blocks"]) == ([0, 3, 5], [])


def test_gaps():
    assert [(gap.block, gap.removed) for gap in find_gaps([1, 2, 5])] == [(0, [1, 2]), (4, [5])]
    assert [(gap.block, gap.removed) for gap in find_gaps([0, 1, 3])] == [(2, [3])]


def test_a_gap_at_the_front_has_nothing_to_fold_into(small_llama, calibration, tmp_path):
    stage = Magnitude(remove=[0, 5], reconstruct=True, calibration=calibration)
    facts = run(stage, small_llama, tmp_path / "out")
    assert facts["unbridged_blocks"] == [0] and [gap["block"] for gap in facts["gaps"]] == [4]
    assert load_model(tmp_path / "out").config.num_hidden_layers == 4


def test_reconstruction_lowers_the_loss_on_other_text(calibration, tmp_path):
    text = Calibration("tiny:calibration", samples=64, length=64)
    tokens = Calibration("tiny:heldout", samples=8, length=64).tokens(load_tokenizer(TINY), 512)
    losses = {}
    for fit in (False, True):
        run(Taylor(calibration=text, blocks=3, reconstruct=fit), TINY, tmp_path / str(fit))
        with torch.no_grad():
            losses[fit] = load_model(tmp_path / str(fit))(tokens, labels=tokens).loss.item()
    assert losses[True] < losses[False] - 0.01
    stored = load_file(tmp_path / "True" / "model.safetensors")
    assert stored["model.layers.0.mlp.down_proj.weight"].dtype == torch.bfloat16


def test_reconstruct_needs_a_text_and_is_part_of_the_identity(calibration):
    with pytest.raises(SlimError, match="pruner.reconstruct=true needs a text"):
        Magnitude(reconstruct=True)
    plain, fitted = (
        Magnitude(calibration=calibration, reconstruct=fit).cache_key() for fit in (False, True)
    )
    assert plain != fitted and plain == Magnitude().cache_key()
    other = Calibration("tiny:calibration", samples=41, length=32)
    assert fitted != Magnitude(calibration=other, reconstruct=True).cache_key()
    listed = [
        stage(calibration=calibration, remove=[1]).cache_key()
        for stage in (Magnitude, Taylor, Perplexity)
    ]
    assert listed[0] == listed[1] == listed[2]
    assert listed[0] != Taylor(calibration=calibration, remove=[1], reconstruct=True).cache_key()


# --- greedy removal
# -------------------------------------------------------------------------------------------------


def direct_perplexity(folder: Path, kept: list[int], tokens: torch.Tensor) -> float:
    model = load_model(folder)
    model.model.layers = torch.nn.ModuleList(model.model.layers[index] for index in kept)
    with torch.no_grad():
        losses = [model(row[None], labels=row[None], use_cache=False).loss.item() for row in tokens]
    return math.exp(sum(losses) / len(losses))


@pytest.mark.parametrize("model_type", ["llama", "mistral"])
def test_every_step_removes_the_block_without_which_the_shorter_model_is_best(
    tmp_path, monkeypatch, model_type
):
    # batches of 2, 2 and 1 samples
    monkeypatch.setattr("slim.calibration.loaded_blocks.TOKENS_PER_BATCH", 2 * 24)
    source = build_small(
        model_type, tmp_path / "m", **({"sliding_window": 7} if model_type == "mistral" else {})
    )
    text = Calibration("tiny:calibration", samples=5, length=24)
    stage = Perplexity(
        calibration=text, blocks=3, iterative=True, protect=[4], samples=5, length=24
    )
    facts = run(stage, source, tmp_path / "out")
    report = json.loads((tmp_path / "out" / "report" / "block_scores.json").read_text())
    tokens, kept = text.tokens(load_tokenizer(source), 256), list(range(6))
    for number, step in enumerate(report["steps"]):
        found = dict(map(tuple, step["scores"]))
        expected = {b: direct_perplexity(source, [k for k in kept if k != b], tokens) for b in kept}
        assert found == pytest.approx({b: expected[b] for b in found}, rel=1e-4)
        assert set(found) == set(kept) - ({4} if number else set())
        best = min((b for b in kept if b != 4), key=expected.get)
        assert step["removed"] == best and step["perplexity"] == found[best]
        kept.remove(best)
    assert facts["kept_blocks"] == kept and report["order"] == [
        step["removed"] for step in report["steps"]
    ]


def test_a_step_computes_only_what_lies_behind_the_removed_block(small_llama, monkeypatch):
    from slim.pruning import ppl

    model, family = load_model(small_llama), open_checkpoint(small_llama).spec.family
    calls: list[int] = []
    step = ppl.BlockChain.step
    monkeypatch.setattr(
        ppl.BlockChain, "step", lambda chain, i, h: (calls.append(i), step(chain, i, h))[1]
    )
    greedy = Greedy(model, family, torch.zeros(2, 16, dtype=torch.long))
    calls.clear()
    greedy.scores(range(6))
    assert calls == [*range(1, 6), *range(2, 6), *range(3, 6), 4, 5, 5]
    calls.clear()
    greedy.remove(2)
    assert calls == [3, 4]  # the input of 5 is needed, its output is not
    calls.clear()
    greedy.scores([0, 4])
    assert calls == [1, 3, 4, 5, 5]


def test_iterative_is_a_flag(calibration):
    with pytest.raises(SlimError, match="pruner.iterative=yes"):
        Perplexity(calibration=calibration, iterative="yes")

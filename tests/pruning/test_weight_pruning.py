"""Weight pruning: masks and updates against slow, direct implementations; the folder it writes; its
settings."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from slim.checkpoints.checkpoint import Checkpoint, open_checkpoint
from slim.checkpoints.stage import Context
from slim.checkpoints.tokenizer import load_tokenizer
from slim.core.errors import SlimError
from slim.data.calibration import Calibration
from slim.loading.load_model import load_model
from slim.pruning.masks import largest_kept, mask_of, n_of_m_kept, restore_zeros
from slim.pruning.sparsegpt import sparsegpt
from slim.pruning.weights import MagnitudeWeights, SparseGPT, Wanda
from tests.conftest import ROOT, build_small

TINY = ROOT / "slim" / "assets" / "tiny"
SEGMENTS = (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",))


@pytest.fixture
def calibration() -> Calibration:
    return Calibration("tiny:calibration", samples=12, length=32)


def run(stage, source: Path, target: Path) -> dict:
    target.mkdir()
    return stage.run(source, target, Context())


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# --- masks
# ----------------------------------------------------------------------------------------------------------


def slow_row_mask(row: list[float], count: int) -> list[bool]:
    # stable: of equal ones the first go
    order = sorted(range(len(row)), key=lambda index: row[index])
    return [index not in order[:count] for index in range(len(row))]


@pytest.mark.parametrize("sparsity", [0.01, 0.3, 0.5, 0.9])
@pytest.mark.parametrize("ties", [False, True])
def test_smallest_of_a_row_go(sparsity, ties):
    scores = random(7, 40).abs()
    scores = (scores * 3).round() if ties else scores
    expected = [slow_row_mask(row, int(40 * sparsity)) for row in scores.tolist()]
    assert largest_kept(scores, sparsity).tolist() == expected


@pytest.mark.parametrize(("n", "m"), [(2, 4), (4, 8), (1, 4), (3, 4), (1, 2), (5, 20)])
@pytest.mark.parametrize("ties", [False, True])
def test_n_of_every_m_stay(n, m, ties):
    scores = random(5, 80).abs()
    scores = (scores * 3).round() if ties else scores
    kept = n_of_m_kept(scores, n, m)
    assert (kept.unflatten(1, (-1, m)).sum(-1) == n).all()
    for row, mask in zip(scores.tolist(), kept.tolist(), strict=True):
        for start in range(0, 80, m):
            # of equal the first stay
            order = sorted(range(start, start + m), key=lambda index, row=row: -row[index])
            assert [index for index in range(start, start + m) if mask[index]] == sorted(order[:n])


# --- methods
# --------------------------------------------------------------------------------------------------------


def inputs_of(model, layer: str, tokens: torch.Tensor) -> torch.Tensor:
    """The inputs of one layer for all tokens, sample by sample, float64 [tokens, in]."""
    seen = []
    hook = model.get_submodule(layer).register_forward_pre_hook(
        lambda _, args: seen.append(args[0][0].double())
    )
    for sample in tokens:
        model(sample[None])
    hook.remove()
    return torch.cat(seen)


@pytest.mark.parametrize("n_of_m", [None, (2, 4)])
@pytest.mark.parametrize("model_type", ["llama", "qwen2"])
def test_wanda_equals_the_whole_model_pruned_layer_by_layer(
    tmp_path, calibration, model_type, n_of_m
):
    source = build_small(model_type, tmp_path / "model", num_hidden_layers=3)
    pattern = {} if n_of_m is None else {"n": n_of_m[0], "m": n_of_m[1]}
    facts = run(Wanda(calibration=calibration, **pattern), source, tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    tokens = calibration.tokens(load_tokenizer(source), 256)
    with torch.no_grad():
        for block in range(3):
            for group in SEGMENTS:  # each sees everything before it pruned
                layers = [
                    f"model.layers.{block}.{'self_attn' if len(p) == 6 else 'mlp'}.{p}"
                    for p in group
                ]
                norm = inputs_of(model, layers[0], tokens).square().sum(0).sqrt()
                for layer in layers:
                    weight = model.get_submodule(layer).weight
                    score = weight.double().abs() * norm
                    for row in range(len(weight)):
                        width = weight.shape[1] if n_of_m is None else 4
                        for start in range(0, weight.shape[1], width):
                            part = score[row, start : start + width].tolist()
                            mask = torch.tensor(slow_row_mask(part, width // 2))
                            weight[row, start : start + width] *= mask
    found = load_file(tmp_path / "out" / "model.safetensors")
    for name, parameter in model.named_parameters():
        if name in found:  # a score that is equal to rounding may fall on the other side
            assert (found[name] != parameter).double().mean() < 2e-3, name
    assert facts["sparsity"] == pytest.approx(0.5, abs=1e-3)


def test_magnitude_takes_the_smallest_of_every_layer(small_llama, tmp_path):
    run(MagnitudeWeights(sparsity=0.35), small_llama, tmp_path / "out")
    before, after = (
        load_file(small_llama / "model.safetensors"),
        load_file(tmp_path / "out" / "model.safetensors"),
    )
    for name, weight in before.items():
        if not name.endswith("_proj.weight"):
            assert torch.equal(after[name], weight)
            continue
        ordered = sorted(weight.flatten().abs().tolist())
        threshold = ordered[int(0.35 * len(ordered))]
        assert torch.equal(after[name], torch.where(weight.abs() >= threshold, weight, 0))


def slow_sparsegpt(
    weight: torch.Tensor, hessian: torch.Tensor, damping: float, n_of_m, sparsity, width
) -> torch.Tensor:
    """The same by inverting the Hessian of the columns that are left at every single column (OBS),
    in float64."""
    weight, size = weight.double().clone(), weight.shape[1]
    hessian = hessian.double() + damping * hessian.double().diagonal().mean() * torch.eye(size)
    inverses = [torch.linalg.inv(hessian[j:, j:]) for j in range(size)]
    gone = torch.zeros_like(weight, dtype=torch.bool)
    for column in range(size):
        span = width if n_of_m is None else n_of_m[1]
        # the mask of the columns to come is chosen on the weights as updated so far
        if column % span == 0:
            columns = range(column, min(column + span, size))
            score = torch.stack([weight[:, j] ** 2 / inverses[j][0, 0] for j in columns], 1)
            if n_of_m is None:
                order = sorted(range(score.numel()), key=score.flatten().tolist().__getitem__)
                chosen = order[: int(score.numel() * sparsity)]
            else:
                count = n_of_m[1] - n_of_m[0]
                chosen = [
                    row * span + j
                    for row in range(len(score))
                    for j in score[row].argsort()[:count].tolist()
                ]
            for index in chosen:
                gone[index // score.shape[1], column + index % score.shape[1]] = True
        inverse = inverses[column]
        factor = torch.where(gone[:, column], weight[:, column] / inverse[0, 0], 0.0)
        weight[:, column:] -= factor[:, None] * inverse[0]
        weight[gone[:, column], column] = 0
    return weight


@pytest.mark.parametrize(
    ("n_of_m", "sparsity"), [(None, 0.5), (None, 0.3), ((2, 4), 0.5), ((1, 4), 0.75)]
)
def test_sparsegpt_equals_optimal_brain_surgery(monkeypatch, n_of_m, sparsity):
    monkeypatch.setattr("slim.pruning.sparsegpt.BLOCK", 16)
    x = random(300, 40) @ random(40, 40, seed=1) / 6
    weight, hessian = random(12, 40, seed=2), x.T @ x
    found = sparsegpt(weight, hessian, 0.01, sparsity, n_of_m)
    expected = slow_sparsegpt(weight, hessian, 0.01, n_of_m, sparsity, 16)
    assert torch.allclose(found.double(), expected, atol=1e-4)
    assert (found == 0).double().mean() == pytest.approx(sparsity, abs=0.02)

    def loss(pruned):
        return (x @ (pruned - weight).T).square().sum()

    # than the same zeros without the update
    assert loss(found) < 0.8 * loss(torch.where(found == 0, 0, weight))


LONG = [
    pytest.param(item, marks=pytest.mark.slow) for item in ({"n": 4, "m": 8}, {"sparsity": 0.7})
]
PATTERNS = [pytest.param({}, marks=pytest.mark.slow), {"n": 2, "m": 4}, *LONG]


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_methods_come_in_the_published_order(ref_llama, shared, tmp_path, pattern):
    """SparseGPT is better than Wanda, and Wanda than magnitude, in what the layers give."""
    text = Calibration(str(shared / "data" / "wikitext2_tok_valid.txt"), samples=32, length=64)
    errors = [
        run(stage, ref_llama, tmp_path / stage.criterion)["layer_error_mean"]
        for stage in (
            SparseGPT(calibration=text, **pattern),
            Wanda(calibration=text, **pattern),
            MagnitudeWeights(**pattern),
        )  # fmt: skip
    ]
    assert errors[0] < 0.9 * errors[1] and errors[1] < 0.9 * errors[2]


# --- the folder
# -----------------------------------------------------------------------------------------------------


def all_stages(calibration: Calibration, **settings) -> list:
    return [
        MagnitudeWeights(**settings),
        Wanda(calibration=calibration, **settings),
        SparseGPT(calibration=calibration, **settings),
    ]


@pytest.mark.parametrize("index", range(3), ids=["magnitude", "wanda", "sparsegpt"])
def test_result_has_the_pattern_and_loads_anywhere(calibration, tmp_path, capsys, index):
    """On the embedded model, which is stored in bfloat16."""
    stage = all_stages(calibration, n=2, m=4)[index]
    facts = run(stage, TINY, tmp_path / "out")
    assert json.loads(json.dumps(facts)) == facts
    assert facts["mask"] == {"kind": "n:m", "n": 2, "m": 4} and facts["sparsity"] == 0.5
    said = " ".join(capsys.readouterr().err.split())
    assert (
        "neither memory nor time without an engine" in said
        and "neither memory nor time" in facts["note"]
    )
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    for name, tensor in tensors.items():
        assert tensor.dtype == torch.bfloat16
        if name.endswith("_proj.weight"):
            assert ((tensor != 0).unflatten(1, (-1, 4)).sum(-1) == 2).all()
    assert sum(p.numel() for p in model.parameters()) == open_checkpoint(TINY).spec.parameters()
    table = json.loads((tmp_path / "out" / "report" / "layer_sparsity.json").read_text())
    assert len(table) == 8 * 7 and all(
        row["sparsity"] == 0.5 and 0 < row["error"] < 1 for row in table
    )
    assert (tmp_path / "out" / "report" / "layer_sparsity.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("index", range(3), ids=["magnitude", "wanda", "sparsegpt"])
def test_same_run_twice_gives_the_same(small_llama, calibration, tmp_path, index):
    facts = [run(all_stages(calibration)[index], small_llama, tmp_path / part) for part in "ab"]
    assert facts[0] == facts[1]
    assert (tmp_path / "a" / "model.safetensors").read_bytes() == (
        tmp_path / "b" / "model.safetensors"
    ).read_bytes()


def test_zeros_come_back_after_training(small_llama, tmp_path):
    facts = run(MagnitudeWeights(sparsity=0.5), small_llama, tmp_path / "out")
    (tmp_path / "out" / "slim.json").write_text(json.dumps({"facts": facts}))
    source = Checkpoint(tmp_path / "out")
    assert (
        mask_of(source)["kind"] == "unstructured" and mask_of(open_checkpoint(small_llama)) is None
    )
    model = load_model(tmp_path / "out")
    assert restore_zeros(model, source) == 0
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.01
    restored = restore_zeros(model, source)
    linears = [name for name in before if name.endswith("_proj.weight")]
    assert restored == sum(int((before[name] == 0).sum()) for name in linears) > 0
    for name, parameter in model.named_parameters():
        kept = (
            before[name] != 0 if name in linears else torch.ones_like(parameter, dtype=torch.bool)
        )
        assert torch.equal(parameter, torch.where(kept, before[name] + 0.01, 0))


# --- settings
# -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        *(
            ({"sparsity": value}, f"pruner.sparsity={value}: must be a number between 0 and 1")
            for value in (0, 1, -0.5, "x", True)
        ),
        ({"n": 2}, "belong together"),
        ({"m": 4}, "belong together"),
        ({"n": 5, "m": 4}, "n must be smaller than m, from 1 to 3"),
        ({"n": 4, "m": 4}, "none would go"),
        ({"n": 0, "m": 4}, "pruner.n=0"),
        ({"n": 1.5, "m": 4}, "pruner.n=1.5"),
        ({"n": 2, "m": 4, "sparsity": 0.6}, "gives a sparsity of 0.5"),
    ],
)
def test_wrong_settings_are_refused(settings, message):
    with pytest.raises(SlimError, match=message):
        MagnitudeWeights(**settings)


def test_settings_that_do_not_fit_the_model_are_refused(small_llama):
    spec = open_checkpoint(small_llama).spec
    with pytest.raises(
        SlimError, match="pruner.m=5 does not divide the 64 inputs of self_attn.q_proj"
    ):
        MagnitudeWeights(n=2, m=5).check(spec)
    with pytest.raises(SlimError, match="already quantized"):
        MagnitudeWeights().check(spec.with_config(quantization_config={"quant_method": "x"}))
    with pytest.raises(SlimError, match="does not know the model family 'mamba'"):
        MagnitudeWeights().check(spec.with_config(model_type="mamba"))


def test_a_pattern_is_its_sparsity(calibration):
    both = (
        Wanda(calibration=calibration, n=2, m=4, sparsity=0.5),
        Wanda(calibration=calibration, n=2, m=4),
    )
    assert (
        both[0].cache_key()
        == both[1].cache_key()
        != Wanda(calibration=calibration, sparsity=0.5).cache_key()
    )


def test_settings_answer_without_torch():
    import subprocess
    import sys

    code = (
        "import sys; from slim.pruning.weights import MagnitudeWeights; MagnitudeWeights(n=2, m=4)\n"
        "print([name for name in ('torch', 'transformers', 'matplotlib', 'rich', 'hydra') if name in sys.modules])"
    )
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip()
        == "[]"
    )

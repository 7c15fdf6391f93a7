"""GPTQ, coordinate descent and refitted scales against slow versions from the papers; damping,
order, fallbacks."""

from __future__ import annotations

import json

import pytest
import torch

from slim.calibration.errors import layer_loss
from slim.calibration.sequential import SequentialCalibration
from slim.checkpoints.checkpoint import open_checkpoint
from slim.checkpoints.stage import Context
from slim.core.errors import SlimError
from slim.quantization.methods.gptq import GPTQ, ErrorFeedback
from slim.quantization.methods.rtn import RTN
from slim.quantization.scheme import Scheme
from slim.quantization.solvers.coordinate_descent import refine
from slim.quantization.solvers.error_feedback import (
    by_rows,
    cholesky_factor,
    gptq,
    permuted,
    refit_scales,
    reverse,
)
from slim.quantization.solvers.grid import Quantized, minmax, search, shrink_factors
from tests.conftest import build_small
from tests.support.calibrating import random_calibration

INPUTS, ROWS = 96, 11


@pytest.fixture(scope="module")
def problem():
    """Weights and the Hessian of inputs that depend on one another, of very different size."""
    generator = torch.Generator().manual_seed(3)
    mixing = torch.randn(INPUTS, INPUTS, generator=generator) * torch.logspace(0, -2, INPUTS)
    inputs = torch.randn(900, INPUTS, generator=generator) @ mixing
    return torch.randn(ROWS, INPUTS, generator=generator), inputs.T @ inputs


def grid_of(layer: Quantized, j: int):
    g = (
        int(layer.group_index[j])
        if layer.group_index is not None
        else j // layer.scheme.group(INPUTS)
    )
    return layer.scale[:, g].double(), layer.zero[:, g].double()


def on_grid(values, layer, j):
    scale, zero = grid_of(layer, j)
    return ((values / scale).round() + zero).clamp(0, layer.scheme.levels - 1).sub(zero) * scale


def paper_gptq(weight, hessian, damping, order, layer):
    """Algorithm 1 of arXiv:2210.17323 in float64, with the inverse and without blocks; ``layer``
    gives the grids."""
    hessian = hessian.double() + damping * hessian.diagonal().double().mean() * torch.eye(
        INPUTS, dtype=torch.float64
    )
    upper = torch.linalg.cholesky(torch.linalg.inv(hessian[order][:, order]), upper=True)
    rest, result = weight.double()[:, order].clone(), torch.zeros(weight.shape, dtype=torch.float64)
    for place, j in enumerate(order.tolist()):
        rounded = on_grid(rest[:, place], layer, j)
        error = (rest[:, place] - rounded) / upper[place, place]
        rest[:, place:] -= error[:, None] * upper[place, place:]
        result[:, j] = rounded
    return result


def orders(hessian):
    return {
        "given": torch.arange(INPUTS),
        "activation": hessian.diagonal().argsort(descending=True),
    }


@pytest.mark.parametrize("order", ["given", "activation"])
@pytest.mark.parametrize("group", [32, -1])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 4])
def test_codes_are_those_of_the_paper(problem, bits, symmetric, group, order):
    weight, hessian = problem
    scheme, order = Scheme(bits, group, symmetric), orders(hessian)[order]
    fixed = search(weight, scheme, torch.float32, hessian.diagonal(), shrink_factors(5))
    found = gptq(weight, cholesky_factor(hessian, 0.01, order), scheme, torch.float32, [1.0], fixed)
    expected = paper_gptq(weight, hessian, 0.01, order, fixed)
    same = (found.dequantize().double() - expected).abs() < 1e-5
    # a tie in float32 may fall the other way, and changes what follows in its row
    assert same.double().mean() > 0.995
    assert torch.equal(found.scale, fixed.scale)
    assert (
        layer_loss(found.dequantize() - weight, hessian).sum()
        < 0.75 * layer_loss(fixed.dequantize() - weight, hessian).sum()
    )


@pytest.mark.parametrize("order", ["given", "activation"])
def test_grids_chosen_on_the_way_are_those_the_codes_use(problem, order):
    """Groups are formed in the order of the columns: the same grids, given beforehand, lead to the
    same codes."""
    weight, hessian = problem
    scheme, order = Scheme(3, 32, False), orders(hessian)[order]
    found = gptq(
        weight, cholesky_factor(hessian, 0.01, order), scheme, torch.float32, shrink_factors(5)
    )
    place = torch.empty_like(order)
    place[order] = torch.arange(INPUTS)
    if found.group_index is None:
        assert torch.equal(order, torch.arange(INPUTS))
    else:
        assert torch.equal(found.group_index, place // 32)
    same = (
        found.dequantize().double() - paper_gptq(weight, hessian, 0.01, order, found)
    ).abs() < 1e-5
    assert same.double().mean() > 0.995
    # The first group is met with the weights as they were: its grid can be found without going
    # through the columns.
    first = order[:32]
    direct = search(weight[:, first], Scheme(3, -1, False), torch.float32, None, [1.0])
    spans = gptq(weight, cholesky_factor(hessian, 0.01, order), scheme, torch.float32, [1.0])
    assert torch.equal(spans.scale[:, 0], direct.scale[:, 0])


def test_rows_do_not_depend_on_one_another(problem, monkeypatch):
    weight, hessian = problem
    cholesky, scheme = cholesky_factor(hessian, 0.01, torch.arange(INPUTS)), Scheme(3, 32, False)
    whole = gptq(weight, cholesky, scheme, torch.float32, [1.0, 0.8])
    monkeypatch.setattr("slim.quantization.solvers.error_feedback.ROW_WEIGHTS", 3 * INPUTS)
    parts = by_rows(weight, lambda rows: gptq(rows, cholesky, scheme, torch.float32, [1.0, 0.8]))
    assert torch.equal(parts.codes, whole.codes)
    # products of other shapes may round otherwise
    assert torch.allclose(parts.scale, whole.scale, rtol=1e-6, atol=0)


def descend(weight, layer, hessian, rounds=1, **settings):
    """Refine with H in the order of the groups, as the function wants it."""
    order = None if layer.group_index is None else hessian.diagonal().argsort(descending=True)
    return refine(
        weight,
        layer,
        hessian if order is None else permuted(hessian, order),
        rounds,
        order,
        **settings,
    )


@pytest.mark.parametrize("scales", [False, True])
@pytest.mark.parametrize("order", ["given", "activation"])
@pytest.mark.parametrize("group", [32, -1])
def test_coordinate_descent_ends_where_no_single_number_can_be_improved(
    problem, group, order, scales
):
    weight, hessian = problem
    scheme = Scheme(2, group, False)
    layer = gptq(
        weight, cholesky_factor(hessian, 0.01, orders(hessian)[order]), scheme, torch.float32, [1.0]
    )
    losses = [float(layer_loss(layer.dequantize() - weight, hessian).sum())]
    for _ in range(30):
        layer = descend(weight, layer, hessian, scales=scales)
        losses.append(float(layer_loss(layer.dequantize() - weight, hessian).sum()))
    assert all(
        after <= before * (1 + 1e-5) for before, after in zip(losses, losses[1:], strict=False)
    )
    assert losses[-1] < 0.95 * losses[0]
    values, best = layer.dequantize(), layer_loss(layer.dequantize() - weight, hessian)
    for j in range(0, INPUTS, 7):
        scale, zero = grid_of(layer, j)
        for code in range(scheme.levels):
            trial = values.clone()
            trial[:, j] = (code - zero) * scale
            assert bool((layer_loss(trial - weight, hessian) >= best * (1 - 1e-4)).all())
    for factor in (0.999, 1.001) if scales else ():
        for g in range(layer.scale.shape[1]):
            trial = Quantized(
                layer.codes, layer.scale.clone(), layer.zero, scheme, layer.group_index
            )
            trial.scale[:, g] *= factor
            assert bool(
                (layer_loss(trial.dequantize() - weight, hessian) >= best * (1 - 1e-4)).all()
            )


@pytest.mark.parametrize("scales", [False, True])
@pytest.mark.parametrize("group", [32, -1])
def test_rounds_of_descent_equal_solving_number_by_number(problem, group, scales):
    """Also that a second round goes on from where the first one ended."""
    weight, hessian = problem
    layer = minmax(weight, Scheme(3, group, False), torch.float32)
    found = descend(weight, layer, hessian, rounds=2, scales=scales)
    codes, scale, zero = layer.codes.double(), layer.scale.double(), layer.zero.double()
    width = layer.scheme.group(INPUTS)
    target, hessian = weight.double(), hessian.double()

    def values():
        return ((codes.view(ROWS, -1, width) - zero[..., None]) * scale[..., None]).flatten(1)

    for _ in range(2):
        for g in range(INPUTS // width):
            own = slice(g * width, (g + 1) * width)
            for j in range(own.start, own.stop):
                others = values() - target
                others[:, j] = 0
                best = target[:, j] - (others @ hessian[:, j]) / hessian[j, j]
                codes[:, j] = ((best / scale[:, g]).round() + zero[:, g]).clamp(0, 7)
            if scales:
                steps = (codes - zero[:, g, None])[:, own]
                rest = target.clone() - values()
                rest[:, own] += steps * scale[:, g, None]
                scale[:, g] = ((rest @ hessian)[:, own] * steps).sum(1) / (
                    (steps @ hessian[own, own]) * steps
                ).sum(1)
    assert ((found.dequantize().double() - values()).abs() < 1e-4).double().mean() > 0.98


def test_scales_move_only_where_the_stored_type_still_gains(problem):
    weight, hessian = problem
    layer = minmax(weight, Scheme(4, 32, False), torch.bfloat16)
    found = descend(weight, layer, hessian, rounds=3)
    assert found.scale.dtype == torch.bfloat16
    assert not torch.equal(found.scale, layer.scale)
    before, after = (layer_loss(item.dequantize() - weight, hessian) for item in (layer, found))
    assert bool((after <= before * (1 + 1e-5)).all())


@pytest.mark.parametrize("order", ["given", "activation"])
def test_refitted_scales_are_the_least_squares_solution(problem, order):
    weight, hessian = problem
    layer = gptq(
        weight,
        cholesky_factor(hessian, 0.01, orders(hessian)[order]),
        Scheme(2, 32, False),
        torch.float32,
        [1.0],
    )
    found = refit_scales(weight, layer, hessian)
    # |root d| is the loss of d
    root = torch.linalg.cholesky(hessian.double() + 1e-6 * torch.eye(INPUTS)).T
    group_of = layer.group_index if layer.group_index is not None else torch.arange(INPUTS) // 32
    checked = 0
    for row in range(ROWS):
        steps = layer.codes[row].double() - layer.zero[row, group_of].double()
        columns = torch.stack([steps * (group_of == g) for g in range(3)], dim=1)
        best = torch.linalg.lstsq(root @ columns, root @ weight[row].double()).solution
        present = layer.scale[row].double()
        if bool(((best > 0.5 * present) & (best < 2 * present)).all()):
            torch.testing.assert_close(found.scale[row].double(), best, rtol=1e-3, atol=0)
            checked += 1
    assert checked > ROWS // 2


def test_reverse_turns_a_matrix_round():
    for size in (1, 4, 5):
        matrix = torch.arange(size * size).view(size, size)
        expected = matrix.flip(0, 1).clone()
        assert torch.equal(reverse(matrix), expected)


def test_damping_grows_until_the_factorisation_succeeds():
    # five samples: rank 5 of 64
    inputs = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    hessian = inputs.T @ inputs
    hessian[0, 0] -= 1e-2 * hessian.diagonal().mean()  # rounding can leave it slightly indefinite
    found = cholesky_factor(hessian, 0.0, torch.arange(64))
    assert 1e-4 <= found.damping <= 1.0
    factor = found.unit * found.diagonal
    hessian = hessian + found.damping * hessian.diagonal().mean() * torch.eye(64)
    torch.testing.assert_close(factor @ factor.T, hessian, rtol=1e-3, atol=1e-3)
    assert torch.equal(found.unit.tril(-1), torch.zeros(64, 64))
    assert cholesky_factor(-hessian, 0.01, torch.arange(64)) is None
    hopeless = torch.ones(64, 64) - 100 * torch.eye(64).roll(1, 0) - 100 * torch.eye(64).roll(-1, 0)
    assert cholesky_factor(hopeless, 0.01, torch.arange(64)) is None


def test_columns_without_input_are_rounded_by_themselves(problem):
    weight, hessian = problem
    hessian = hessian.clone()
    hessian[5] = hessian[:, 5] = 0
    scheme = Scheme(4, 32, False)
    fixed = minmax(weight, scheme, torch.float32)
    found = gptq(
        weight,
        cholesky_factor(hessian, 0.01, torch.arange(INPUTS)),
        scheme,
        torch.float32,
        [1.0],
        fixed,
    )
    assert torch.equal(found.codes[:, 5], fixed.codes[:, 5])
    assert torch.equal(descend(weight, found, hessian).codes[:, 5], fixed.codes[:, 5])


# The stage
# ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def calibration(tmp_path_factory):
    """Calibration on a text of random words."""
    return random_calibration(tmp_path_factory.mktemp("text"), 3000)


class Recording(ErrorFeedback):
    """GPTQ that remembers the losses of its layers and of round to nearest, and the Hessians
    it was given."""

    def __init__(self, *args):
        super().__init__(*args)
        self.losses, self.hessians = [], []

    def quantize(self, group):
        before = {name: linear.weight.clone() for name, linear in group.linears.items()}
        self.hessians.append(group.hessian.clone())
        result = super().quantize(group)
        for name, weight in before.items():
            rounded = minmax(weight, self.scheme(group, name), self.scale_dtype).dequantize()
            self.losses.append(
                [
                    float(layer_loss(item - weight, group.hessian).sum())
                    for item in (result[name], rounded)
                ]
            )
        return result


VARIANTS = {
    "paper": {"act_order": False, "static_groups": False, "refine": 0},
    "refined": {},
    "columns as they are": {"act_order": False, "static_groups": False},
    "groups in order": {"static_groups": False, "refine": 1},
    "after scaling": {"scaling": "awq", "grid": 6},
    "not sequential": {"true_sequential": False},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_beats_rounding(variant, small_llama, calibration):
    stage = GPTQ(3, 32, calibration=calibration, **VARIANTS[variant])
    source = open_checkpoint(small_llama)
    method = Recording(stage, stage.schemes(source.spec), "float32")
    SequentialCalibration(source, method, None, stage.tokens(source)).run()
    ours, nearest = (sum(column) for column in zip(*method.losses, strict=True))
    assert len(method.losses) == 6 * 7
    assert ours < 0.6 * nearest
    assert method.notes == []


def test_without_true_sequential_a_block_is_seen_as_it_was(small_llama, calibration):
    source = open_checkpoint(small_llama)

    def hessians(**settings):
        stage = GPTQ(2, 32, calibration=calibration, refine=0, **settings)
        method = Recording(stage, stage.schemes(source.spec), "float32")
        SequentialCalibration(source, method, None, stage.tokens(source)).run()
        return method.hessians

    class Blind(ErrorFeedback):
        def quantize(self, group):
            seen.append(group.hessian.clone())
            return {}

    seen: list = []
    stage = GPTQ(2, 32, calibration=calibration)
    SequentialCalibration(source, Blind(stage, {}, "float32"), None, stage.tokens(source)).run()
    at_once, in_turn = hessians(true_sequential=False), hessians()
    for group in range(4):  # of the first block: nothing before it has changed
        torch.testing.assert_close(at_once[group], seen[group], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(in_turn[1], seen[1], rtol=1e-2)
    # the second block sees the first one quantised
    assert not torch.allclose(at_once[4], seen[4], rtol=1e-2)


def test_layers_that_calibration_never_reaches_are_rounded_and_named(calibration, tmp_path):
    from safetensors.torch import load_file, save_file

    source = build_small("llama", tmp_path / "source", num_hidden_layers=2)
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.1.post_attention_layernorm.weight"].zero_()
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "q").mkdir()
    facts = GPTQ(4, 32, calibration=calibration).run(source, tmp_path / "q", Context())
    assert [note.split(":")[0] for note in facts["notes"]] == [
        "model.layers.1.mlp.gate_proj, mlp.up_proj",
        "model.layers.1.mlp.down_proj",
    ]
    (tmp_path / "rtn").mkdir()
    RTN(4, 32).run(source, tmp_path / "rtn", Context())
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("q", "rtn"))
    name = "model.layers.1.mlp.up_proj.weight_packed"
    assert torch.equal(ours[name], theirs[name])


def test_failed_factorisations_fall_back_to_rounding_and_say_so(
    small_llama, calibration, tmp_path, monkeypatch
):
    original = cholesky_factor

    def fails_for_wide(hessian, damping, order):
        return None if len(hessian) == 128 else original(hessian, damping, order)

    monkeypatch.setattr("slim.quantization.solvers.error_feedback.cholesky_factor", fails_for_wide)
    (tmp_path / "q").mkdir()
    facts = GPTQ(4, 32, calibration=calibration).run(small_llama, tmp_path / "q", Context())
    assert len(facts["notes"]) == 6
    assert all("down_proj: the Hessian could not be factored" in note for note in facts["notes"])


@pytest.mark.parametrize("scaling_pays", [True, False])
def test_scaling_solves_the_unscaled_problem_once(scaling_pays, small_llama, calibration):
    solved, scaled = [], []

    class Counting(ErrorFeedback):
        def solve(self, problem):
            solved.append(problem.name)
            return super().solve(problem)

        def _search_alpha(self, *args):
            return 0.5

        def unscaled_if_better(self, problem, layers, scales):
            scaled.append(problem.name)
            unscaled = super().unscaled_if_better(problem, layers, scales)
            return None if scaling_pays else unscaled or layers

    source = open_checkpoint(small_llama)
    stage = GPTQ(4, 32, calibration=calibration, scaling="awq", grid=2, refine=0)
    method = Counting(stage, stage.schemes(source.spec), "float32")
    SequentialCalibration(source, method, None, stage.tokens(source)).run()
    assert len(scaled) == 6 * 4
    # once with scaled channels and once as they are
    assert sorted(solved) == sorted(2 * scaled)


def test_same_call_twice_gives_the_same_file(small_llama, calibration, tmp_path):
    stage = GPTQ(3, 32, calibration=calibration, static_groups=False, scaling="awq", grid=4)
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        stage.run(small_llama, tmp_path / name, Context())
    assert (tmp_path / "a" / "model.safetensors").read_bytes() == (
        tmp_path / "b" / "model.safetensors"
    ).read_bytes()
    weights = json.loads((tmp_path / "a" / "config.json").read_text())["quantization_config"][
        "config_groups"
    ]["group_0"]
    assert weights["weights"]["actorder"] == "group"


def test_refusals():
    with pytest.raises(SlimError, match=r"quant\.damping=2: .* from 0\.0 to 1\.0"):
        GPTQ(damping=2)
    with pytest.raises(SlimError, match=r"quant\.scaling=smooth: must be one of none, awq"):
        GPTQ(scaling="smooth")
    with pytest.raises(SlimError, match=r"quant\.true_sequential=true"):
        GPTQ(scaling="awq", true_sequential=False)
    with pytest.raises(SlimError, match=r"quant\.refine"):
        GPTQ(refine=-1)

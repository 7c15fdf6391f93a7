"""The rules that choose blocks: against every published order, and at the edges."""

from __future__ import annotations

import json

import pytest

from slim.core.errors import SlimError
from slim.data.calibration import Calibration
from slim.pruning.angular import Angular, candidate_runs, choose_run
from slim.pruning.magnitude import Magnitude
from slim.pruning.rules import block_list, default_blocks, default_ends, removal_order

PUBLISHED = [
    (model, criterion)
    for model, criteria in {
        "Llama-2-7b-hf": ("ppl", "taylor"),
        "Meta-Llama-3-8B": ("ppl", "taylor"),
        "llama-1-7b": ("magnitude", "ppl", "taylor"),
    }.items()
    for criterion in criteria
]


@pytest.fixture(scope="module")
def block_scores(shared) -> dict:
    return json.loads((shared / "reference" / "depth_block_scores.json").read_text())["models"]


@pytest.fixture(scope="module")
def angular(shared) -> dict:
    return json.loads((shared / "reference" / "angular_distances.json").read_text())["models"]


def test_no_published_model_is_left_out(block_scores):
    assert {
        (model, criterion) for model, criteria in block_scores.items() for criterion in criteria
    } == set(PUBLISHED)


@pytest.mark.parametrize(("model", "criterion"), PUBLISHED)
def test_order_and_removed_blocks_are_the_published_ones(block_scores, model, criterion):
    published = block_scores[model][criterion]
    stage = Magnitude()  # the rule is the same for all three criteria
    assert removal_order(published["scores"]) == published["published_order"]
    assert (
        removal_order(published["scores"], stage.protected(32))
        == published["order_after_plus_heuristic"]
    )
    assert stage.choose_by(published["scores"], 32).removed == published["removed_6_plus"]


def test_angular_run_is_the_published_one(angular):
    assert len(angular) == 4
    for model, published in angular.items():
        start, end, _ = published["argmin"]
        assert choose_run(published["distances"]) == (start, end), model


def test_angular_candidates_are_the_published_ones(angular):
    stage = Angular(calibration=Calibration("any/dataset"))
    for model, published in angular.items():
        rows = [(start, end) for start, end, _ in published["distances"]]
        length = rows[0][1] - rows[0][0]
        assert candidate_runs(32, length, stage.protected(32)) == rows, model


def test_equal_scores_go_in_block_order():
    assert removal_order([2.0, 1.0, 2.0, 1.0, 1.0], protected=[3]) == [1, 4, 0, 2]
    assert choose_run([(3, 5, 0.2), (1, 3, 0.1), (2, 4, 0.1)]) == (1, 3)


def test_nan_is_an_error_and_not_a_choice():
    with pytest.raises(SlimError, match="block 1 is NaN"):
        removal_order([1.0, float("nan"), 0.5])
    with pytest.raises(SlimError, match="NaN"):
        choose_run([(1, 3, 0.1), (2, 4, float("nan"))])


@pytest.mark.parametrize(
    ("depth", "removed", "ends"),
    [
        (32, 6, (4, 2)),
        (80, 15, (4, 2)),
        (24, 5, (3, 1)),
        (16, 3, (2, 1)),
        (8, 2, (1, 1)),
        (6, 1, (1, 1)),
        (3, 1, (1, 1)),
    ],
)
def test_defaults_follow_the_depth(depth, removed, ends):
    assert (default_blocks(depth), default_ends(depth)) == (removed, ends)
    assert default_blocks(depth) == max(1, int(6 * depth / 32 + 0.5))


def test_candidate_runs_avoid_protected_blocks():
    assert candidate_runs(8, 2, [0, 4]) == [(1, 3), (2, 4), (5, 7), (6, 8)]
    assert candidate_runs(8, 4, [0, 4]) == []


def test_block_lists_are_sorted_and_checked():
    assert block_list("pruner.remove", (5, 3)) == [3, 5]
    assert block_list("pruner.remove", None) is None
    for wrong in ("3", 3, [1, 1], [-1], [1.5], [True], ["2"]):
        with pytest.raises(SlimError, match="pruner.remove"):
            block_list("pruner.remove", wrong)

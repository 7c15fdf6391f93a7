"""The table in a terminal: chains of any length, sweeps and comparisons, at any width."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest

from slim.core.tables import text_width
from slim.evaluation.compare import Comparison
from slim.evaluation.differences import Difference
from slim.report.side_by_side import differences_table
from slim.report.table import headline_columns, terminal_table
from slim.search.outcome import show
from slim.sweeps.finish import points_table

WIDTHS = (80, 100, 200)
STEPS = ("tiny", "prune taylor 2 blocks", "tune lora r8", "distill kd", "quantize gptq 3b g64")
LONG = "/a/folder/with a rather/long-name-of-a-checkpoint-that-somebody/gave_to_it/step=3000"


def checkpoint(label: str, number: int, tasks: int = 3, dtype: str = "float32"):
    """A measured checkpoint as tables see it; larger ``number``, worse and smaller."""
    quality = {"perplexity": 2.0 + number, "tasks/acc": 0.9}
    for task in range(tasks):
        quality[f"a_task_of_some_name_{task}/acc"] = 0.9 - number / 100
    files = {"parameters": 135e6 - number, "bytes_on_disk": 270e6 / (1 + number)}
    speed = {
        "prefill_tokens_per_second": 14705.0 * (1 + number),
        "decode_tokens_per_second": 323.0 * (1 + number),
        "peak_bytes": 9e8,
        "weights_bytes": 5e8,
    }
    return SimpleNamespace(
        label=label,
        metrics={**files, **quality, **speed},
        quality={"metrics": quality, "protocol": {"dtype": "float32"}},
        speed={"metrics": speed, "protocol": {"speed": {"dtype": dtype}}},
    )


def a_chain(length: int, **settings) -> list:
    return [checkpoint(STEPS[number], number, **settings) for number in range(length)]


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("length", range(1, 6))
def test_a_chain_fits(width, length):
    lines = terminal_table(a_chain(length)).lines(width)
    assert max(text_width(line) for line in lines) <= width
    assert not any("…" in line for line in lines)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("length", range(1, 6))
def test_every_value_of_a_chain_is_there(width, length):
    chain = a_chain(length)
    text = "\n".join(terminal_table(chain).lines(width))
    for column in headline_columns(chain):
        for result in chain:
            assert column.metric.format(result.metrics[column.metric.name]) in text


def test_quality_comes_first_and_details_are_left_to_the_page():
    labels = [row[0] for row in terminal_table(a_chain(2)).rows]
    assert labels[0] == "perplexity"
    assert labels[-3:] == ["reading (tok/s)", "writing (tok/s)", "peak memory (MB)"]
    assert not any("weights" in label for label in labels)


def test_a_value_has_its_change_against_the_source_next_to_it():
    rows = {row[0]: row[1:] for row in terminal_table(a_chain(2)).rows}
    assert [cell.split() for cell in rows["perplexity"]] == [["2.000*"], ["3.000!", "+50.0%"]]
    assert rows["writing (tok/s)"][1].split() == ["646*", "2.00x"]
    assert rows["a_task_of_some_name_0 (%)"][1].split() == ["89.0!", "-1.0"]


def test_values_that_read_the_same_are_neither_best_nor_worst():
    rows = {row[0]: row[1:] for row in terminal_table(a_chain(3)).rows}
    assert not any("*" in cell or "!" in cell for cell in rows["peak memory (MB)"])


def test_a_value_that_is_not_a_number_is_shown_and_is_not_the_worst():
    chain = a_chain(3)
    chain[1].metrics["perplexity"] = math.nan
    row = next(row for row in terminal_table(chain).rows if row[0] == "perplexity")
    assert [cell.split() for cell in row[1:]] == [["2.000*"], ["NaN"], ["4.000!", "+100.0%"]]


def test_of_many_tasks_a_terminal_shows_the_mean():
    labels = [row[0] for row in terminal_table(a_chain(2, tasks=57)).rows]
    assert "mean accuracy (%)" in labels
    assert not any("a_task" in label for label in labels)


@pytest.mark.parametrize("width", WIDTHS)
def test_other_protocols_have_rows_of_their_own(width):
    chain = [*a_chain(2), checkpoint("quantize awq 4b", 2, dtype="bfloat16")]
    table = terminal_table(chain)
    assert max(text_width(line) for line in table.lines(width)) <= width
    row = next(row for row in table.rows if row[0] == "reading (tok/s), dtype bfloat16")
    assert [cell.split() for cell in row[1:]] == [["-"], ["-"], ["44,115"]]


@pytest.mark.parametrize("width", WIDTHS)
def test_checkpoints_with_long_names_have_numbers_and_a_legend(width):
    results = [checkpoint(f"{LONG}{number}", number) for number in range(9)]
    table = terminal_table(results, compared=True)
    assert table.headings == ["", *"123456789"]
    assert f"9: {LONG}8" in table.notes
    assert max(text_width(line) for line in table.lines(width)) <= width


@pytest.mark.parametrize("width", WIDTHS)
def test_differences_fit_and_have_a_row_per_metric(width):
    comparison = Comparison()
    for label in ("one", "another folder", LONG):
        comparison.differences[label] = {
            "perplexity": Difference("perplexity", 0.361, 0.02, 56, relative=True),
            "one/acc": Difference("one/acc", -0.03, 0.01, 100),
        }
    table = differences_table(comparison, "base")
    assert table.rows[0] == ["one", "-3.0 ± 1.0", "-3.0 ± 1.0", "-3.0 ± 1.0"]
    assert table.rows[1][:2] == ["perplexity", "+36.1 ± 2.0 %"]
    assert max(text_width(line) for line in table.lines(width)) <= width


def a_point(number: int, overrides: dict, status: str = "FINISHED") -> dict:
    last = checkpoint("quantize gptq", number)
    final = {"metrics": last.metrics, "quality": last.quality, "speed": last.speed}
    return {
        "number": number,
        "name": f"point {number}",
        "overrides": overrides,
        "final": final if status == "FINISHED" else None,
        "status": status,
        "seconds": 12.34,
        "error": None,
    }


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("value", ["64", LONG])
def test_a_sweep_fits(width, value):
    points = []
    for number in range(9):
        overrides = {"quantizer.bits": "3", "model.source": value, "tuner.learning_rate": "1e-4"}
        points.append(a_point(number, overrides, "FAILED" if number == 4 else "FINISHED"))
    lines = points_table(list(points[0]["overrides"]), points).lines(width)
    assert max(text_width(line) for line in lines) <= width
    assert not any("…" in line for line in lines)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("value", ["64", LONG])
def test_what_a_search_found_fits(width, value, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", str(width))
    points = []
    for number in range(3):
        settings = {"quantizer": "gptq", "quantizer.bits": number + 2, "quantizer.x": value}
        points.append(
            {
                "settings": {**settings, "pruner": "taylor", "pruner.blocks": 2},
                "objectives": {"perplexity": 2.5 + number, "bytes_on_disk": 1e6},
                "memory_bytes": 3e6,
                "tokens_per_second": 400.0,
                "folder": LONG,
                "state": "good",
            }
        )
    budget = {"memory_gb": 0.0025, "context": 2048}
    outcome = {"objectives": ["perplexity", "bytes_on_disk"], "budget": budget}
    outcome |= {"best": points, "points": points}
    show(outcome)
    out = capsys.readouterr().out
    assert max(text_width(line) for line in out.splitlines()) <= width
    assert "…" not in out


def test_a_sweep_marks_the_best_and_the_worst_point():
    points = [a_point(number, {"quantizer.bits": str(number)}) for number in range(3)]
    table = points_table(["quantizer.bits"], points)
    place = table.headings.index("perplexity")
    assert [row[place] for row in table.rows] == ["2.000*", "3.000 ", "4.000!"]


def test_a_point_that_failed_has_dashes_and_says_so():
    points = [a_point(0, {"a": "1"}), a_point(1, {"a": "2"}, "FAILED")]
    table = points_table(["a"], points)
    assert table.rows[1][0] == "2"
    assert {cell.strip() for cell in table.rows[1][1:-2]} == {"-"}
    assert table.rows[1][-1] == "failed"

"""Several checkpoints in one table: paired differences, protocols that never share a column, and
evaluate.py itself."""

from __future__ import annotations

import json
import math
import random
import statistics
from types import SimpleNamespace

import pytest
from omegaconf import OmegaConf

from slim.chain.compose import compose
from slim.checkpoints.store import Store
from slim.cli.compare import execute
from slim.core.errors import SlimError
from slim.evaluation.compare import compare, name_apart, similarity_wins
from slim.evaluation.differences import Difference, differences, paired
from slim.evaluation.protocol import protocol_of, variants
from slim.report.side_by_side import (
    answers_text,
    comparison_files,
    differences_text,
    judge_text,
    notes,
)
from slim.report.table import columns, markdown_table
from slim.tracking.tracker import record_files


def result(
    label: str, metrics: dict, protocol: dict | None = None, speed: dict | None = None, **records
) -> SimpleNamespace:
    """A result as tables see it. speed: protocol and metrics of the speed part."""
    speed = {"metrics": speed["metrics"], "protocol": {"speed": speed["protocol"]}} if speed else {}
    quality = {
        "metrics": metrics,
        "protocol": {"dtype": "float32", **(protocol or {})},
        "records": records,
    }
    everything = {**metrics, **speed.get("metrics", {})}
    return SimpleNamespace(label=label, metrics=everything, quality=quality, speed=speed)


WINDOWS = {"perplexity": {"window": 256, "windows": 4, "tokens_sha256": "a" * 64}}


def test_rows_of_different_protocols_never_share_a_column():
    other = {"perplexity": {**WINDOWS["perplexity"], "window": 2048, "tokens_sha256": "b" * 64}}
    rows = [result("a", {"perplexity": 9.0}, WINDOWS), result("b", {"perplexity": 7.0}, other)]
    table = markdown_table([*rows, result("c", {"perplexity": 8.0}, WINDOWS)])
    assert table.splitlines()[0] == (
        "| checkpoint | perplexity, window 256, tokens_sha256 aaaaaa | perplexity, window 2048, tokens_sha256 bbbbbb |"
    )
    assert table.splitlines()[2:] == ["| a | 9.000 | - |", "| b | - | 7.000 |", "| c | 8.000 | - |"]
    assert [column.heading for column in columns(rows[:1])] == ["perplexity"]


def test_speed_in_another_type_stands_in_another_column_and_counts_do_not():
    figures = {"decode_tokens_per_second": 100.0}
    rows = [
        result(
            "a",
            {},
            speed={"metrics": figures, "protocol": {"dtype": "float32", "machine": {"host": "x"}}},
        ),
        result(
            "b",
            {},
            speed={"metrics": figures, "protocol": {"dtype": "bfloat16", "machine": {"host": "x"}}},
        ),
    ]
    for row in rows:
        row.metrics["parameters"] = 2e6
    headings = [column.heading for column in columns(rows)]
    assert headings == [
        "parameters (M)",
        "decode (tok/s), dtype float32",
        "decode (tok/s), dtype bfloat16",
    ]


def test_the_mean_over_tasks_depends_on_all_of_them():
    tasks = {"one": {"questions": 5}, "two": {"questions": 6}, "lm_eval": "1"}
    row = result("a", {"one/acc": 0.5, "two/acc": 0.5, "tasks/acc": 0.5}, {"tasks": tasks})
    assert protocol_of(row, "one/acc") == {"dtype": "float32", "questions": 5, "lm_eval": "1"}
    assert protocol_of(row, "tasks/acc")["two"] == {"questions": 6}
    assert len(variants([row], "one/acc")) == 1


def test_the_best_of_a_column_is_bold_and_nan_never_is():
    values = [9.0, 7.0, math.nan, 7.0001]
    rows = [
        result(
            str(i), {"perplexity": v, "t/acc": 0.5}, {**WINDOWS, "tasks": {"t": {}, "lm_eval": "1"}}
        )
        for i, v in enumerate(values)
    ]
    lines = markdown_table(rows, compared=True).splitlines()[2:]
    assert lines == [
        "| 0 | 9.000 | 50.0 |", "| 1 | **7.000** | 50.0 |", "| 2 | NaN | 50.0 |", "| 3 | **7.000** | 50.0 |",
    ]  # fmt: skip
    assert "**" not in markdown_table(rows)


def test_paired_errors_are_those_of_the_differences():
    one, two = [1.0, 0, 1, 1, 0, 1], [1.0, 1, 1, 0, 0, 1]
    gaps = [b - a for a, b in zip(one, two, strict=True)]
    assert paired(gaps) == pytest.approx(
        (statistics.mean(gaps), statistics.stdev(gaps) / math.sqrt(6))
    )
    value, error = paired([0.5])
    assert value == 0.5 and math.isnan(error)


def test_the_error_of_a_weighted_mean_is_that_of_drawing_documents_anew():
    """Against the bootstrap: documents of very different lengths, differences that grow with
    them."""
    dice = random.Random(0)
    weights = [float(dice.randint(50, 3000)) for _ in range(80)]
    gaps = [w * dice.gauss(0.1, 0.3) / math.sqrt(w) for w in weights]
    ratio, error = paired(gaps, weights)
    assert ratio == pytest.approx(sum(gaps) / sum(weights))
    drawn = []
    for _ in range(2000):
        chosen = [dice.randrange(80) for _ in range(80)]
        drawn.append(sum(gaps[i] for i in chosen) / sum(weights[i] for i in chosen))
    assert error == pytest.approx(statistics.stdev(drawn), rel=0.1)


def question(number: int, acc: float) -> dict:
    return {
        "doc_id": number,
        "doc_hash": str(number),
        "scores": [0.0],
        "target": 0,
        "acc": acc,
        "acc_norm": acc,
    }


def pair(first: list[float], second: list[float]) -> tuple:
    protocol = {**WINDOWS, "tasks": {"t": {"questions": len(first)}, "lm_eval": "1"}}
    return tuple(
        result(
            name, {"perplexity": 1.0, "t/acc": 0.5}, protocol,
            perplexity={"nll": [2.0 + shift, 3.0 + shift, 4.0 + 2 * shift]},
            tasks={"t": [question(i, acc) for i, acc in enumerate(values)]},
        )
        for name, values, shift in (("a", first, 0.0), ("b", second, 0.1))
    )  # fmt: skip


def test_differences_of_accuracies_and_perplexities():
    a, b = pair([1, 0, 1, 1], [1, 1, 0, 0])
    found = differences(a, b)
    assert found["t/acc"].value == -0.25 and found["t/acc"].count == 4
    assert found["t/acc"].stderr == pytest.approx(statistics.stdev([0, 1, -1, -1]) / 2)
    shift = statistics.mean([0.1, 0.1, 0.2])
    error = statistics.stdev([0.1, 0.1, 0.2]) / math.sqrt(3)
    change = found["perplexity"]
    assert (change.value, change.stderr) == pytest.approx(
        (math.exp(shift) - 1, math.exp(shift) * error)
    )
    assert (
        change.relative
        and change.text() == f"{100 * change.value:+.1f} ± {100 * change.stderr:.1f} %"
    )
    assert Difference("m", math.nan, math.nan, 3).text() == "NaN"


def test_other_questions_and_other_protocols_have_no_difference():
    a, b = pair([1, 0], [1, 1])
    b.quality["records"]["tasks"]["t"][1]["doc_hash"] = "another"
    b.quality["protocol"]["perplexity"] = {**WINDOWS["perplexity"], "tokens_sha256": "c" * 64}
    assert differences(a, b) == {}
    b.quality["records"] = {}
    assert differences(a, b) == {}


def test_similarity_is_counted_per_question():
    a, b = (
        {"answers": [{"similarity": value} for value in values]}
        for values in ([0.5, 0.5, 0.5], [0.9, 0.505, 0.1])
    )
    first, second = (result("x", {}, **records) for records in (a, b))
    assert similarity_wins(first, second) == {"wins": 1, "ties": 1, "losses": 1}
    assert similarity_wins(first, result("y", {})) == {}


def test_texts_for_people(tmp_path):
    a, b = pair([1, 0, 1, 1], [1, 1, 0, 0])
    for row, said in ((a, "A hen."), (b, "A goat.")):
        row.quality["records"]["answers"] = [
            {"question": "Who?", "reference": "A hen.", "answer": said, "similarity": 0.5}
        ]
    b.quality["health"] = {
        "non_finite": {"module": "model.layers.2.mlp", "value": "nan", "cause": "weights"}
    }
    b.quality["metrics"]["repeated_4grams"] = 0.9
    found = compare([a, b], None, Store(tmp_path), "cpu")
    found.judged["b"] = [
        {"question": "Who?", "reference": "A hen.", "answers": {"one": "A hen.", "other": "A goat."}, "winner": "one",
         "opinions": [{"shown_first": "one", "verdict": "one", "reason": "It was\na hen."}]},
    ]  # fmt: skip
    assert "| b | " in differences_text(found, "a") and "t/acc" in differences_text(found, "a")
    assert "- **b** (0.50): 'A goat.'" in answers_text([a, b])
    text = judge_text(found, "a")
    assert "| b | 0 | 0 | 1 | 0 |" in text and "- winner: a" in text and "  - It was a hen." in text
    assert notes([a, b], found) == [
        "b: NaN starts in model.layers.2.mlp (its weights).",
        "b: repeats itself; 90 % of the 4-grams in its answers are repeated.",
        "b: judged better 0, equal 0, worse 1 times.",
        "b: nearer to the reference 0, equal 1, further 0 times.",
    ]
    assert set(comparison_files(found, [a, b])) == {
        "differences.md",
        "answers.md",
        "judge.md",
        "judge.json",
    }
    assert found.metrics()["judge/b/losses"] == 1


def test_records_become_lines():
    files = record_files(
        {"perplexity": {"nll": [1.0, 2.0]}, "tasks": {"t/x": [{"doc_id": 0}]}, "answers": []}
    )
    assert files == {
        "perplexity": '{"nll": 1.0}\n{"nll": 2.0}\n',
        "t_x": '{"doc_id": 0}\n',
        "answers": "",
    }


def test_equal_folder_names_are_told_apart(tmp_path):
    def at(path: str):
        return SimpleNamespace(
            label=path.split("/")[-1], checkpoint=SimpleNamespace(folder=tmp_path / path)
        )

    rows = [at("one/model"), at("two/model"), at("two/other")]
    name_apart(rows)
    assert [row.label for row in rows] == ["one/model", "two/model", "other"]


FEW = [
    "eval.perplexity.limit=3", "eval.tasks.names=[tiny_facts]", "eval.tasks.limit=20", "eval.speed=null", "eval.new_tokens=4",
]  # fmt: skip


def test_evaluate_measures_several_checkpoints_in_one_table(small_llama, tmp_path, capsys):
    config = compose("evaluate", [*FEW, f"model.source=[tiny,{small_llama}]", f"store={tmp_path}"])
    first, second = execute(config)
    shown = capsys.readouterr().out
    assert (first.label, second.label) == ("tiny", "llama")
    assert "* best and ! worst" in shown
    assert "Differences to tiny" in shown
    assert "final checkpoint" not in shown
    found = compare([first, second], None, Store(tmp_path), "cpu").differences["llama"]
    acc = [
        [row["acc"] for row in r.quality["records"]["tasks"]["tiny_facts"]] for r in (first, second)
    ]
    assert len(acc[0]) == 20
    assert found["tiny_facts/acc"].value == pytest.approx(
        second.metrics["tiny_facts/acc"] - first.metrics["tiny_facts/acc"]
    )
    ratio = second.metrics["perplexity"] / first.metrics["perplexity"]
    assert found["perplexity"].value == pytest.approx(ratio - 1)
    again = execute(OmegaConf.merge(config, {"model": {"source": [str(small_llama), "tiny"]}}))
    assert [r.quality for r in again] == [second.quality, first.quality], "found again by content"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["model.source=[]"], "the list is empty"),
        (["model.source=[tiny,tiny]"], "tiny is named twice"),
        (["model.source=[tiny,/no/folder]"], "There is no folder or file /no/folder"),
        (["model.source=[tiny]", "plan=true"], "take one checkpoint"),
        (["model.source=[tiny]", "quant=rtn"], "measured as they are"),
        (["eval=judged", "eval.judge.model=m"], "is no checkpoint folder"),
        (["eval.speed=fast"], "eval.speed=fast: must be"),
        (["eval.local_data=/no/folder", "eval.tasks.names=[piqa]"], "is not a folder"),
    ],
)
def test_mistakes_are_found_before_any_work(settings, message, tmp_path):
    with pytest.raises(Exception, match=message) as caught:
        execute(compose("evaluate", [*settings, f"store={tmp_path / 'runs'}"]))
    causes = [caught.value, caught.value.__cause__, caught.value.__context__]
    assert any(isinstance(cause, SlimError) for cause in causes)
    assert not (tmp_path / "runs").exists()


def test_a_failing_judge_loses_no_figures(small_llama, tmp_path, capsys):
    options = [
        "eval=judged", "eval.speed=null", "eval.prompts=[]", "eval.answers.limit=2", "eval.answers.new_tokens=4",
        "eval.answers.chat=false", "eval.judge.model=m", "eval.judge.endpoint=http://127.0.0.1:9/v1", "eval.judge.retries=0",
    ]  # fmt: skip
    config = compose(
        "evaluate", [*options, f"model.source=[tiny,{small_llama}]", f"store={tmp_path / 'runs'}"]
    )
    with pytest.raises(
        SlimError, match=r"does not answer after 1 tries: ConnectionError\. 0 verdicts are kept in"
    ):
        execute(config)
    assert "* best and ! worst" in capsys.readouterr().out, "the table comes first"
    artifacts = [path.name for path in (tmp_path / "runs" / "artifacts").rglob("*.*")]
    assert (
        "answers.md" in artifacts and "answers.jsonl" in artifacts and "results.json" in artifacts
    )
    (recorded,) = (tmp_path / "runs" / "artifacts").rglob("results.json")
    assert len(json.loads(recorded.read_text())) == 2

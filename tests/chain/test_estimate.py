"""How long a chain takes: estimated, compared with the truth, and learnt from it; names of
chains."""

from __future__ import annotations

import json
import shutil

import pytest

from slim.chain import estimate
from slim.chain.build import build_pipeline
from slim.chain.compose import compose
from slim.chain.estimate import Clock, time_line
from slim.chain.naming import chain_name
from slim.chain.pipeline import Pipeline
from slim.checkpoints.source import Source
from slim.checkpoints.store import Store
from slim.core.console import duration
from tests.support.stages import Scale


@pytest.fixture(autouse=True)
def fixed_rate(monkeypatch):
    monkeypatch.setattr(estimate, "measured_rate", lambda device: 1e9)


def plan(*overrides: str):
    return build_pipeline(compose("compress", list(overrides))).plan()


def test_the_first_estimate_counts_the_work(tmp_path):
    source, pruned, tuned = plan("pruner=taylor", "tuner=lora", "quant=none", f"store={tmp_path}")
    clock = Clock.read(tmp_path, "cpu")
    short = clock.stage_seconds(tuned.stage, pruned.spec)
    tuned.stage.steps *= 2
    long = clock.stage_seconds(tuned.stage, pruned.spec)
    assert 1.9 < (long - estimate.OVERHEAD) / (short - estimate.OVERHEAD) < 2.1


def test_the_machine_is_measured_once_per_store(tmp_path, monkeypatch):
    Clock.read(tmp_path, "cpu")
    monkeypatch.setattr(estimate, "measured_rate", lambda device: pytest.fail("measured again"))
    assert Clock.read(tmp_path, "cpu").rate == 1e9


def test_a_plan_writes_no_store(tmp_path):
    Clock.read(tmp_path / "none", "cpu")
    assert not (tmp_path / "none").exists()


def test_a_damaged_record_is_made_again(tmp_path):
    (tmp_path / estimate.FILE).write_text("{")
    assert Clock.read(tmp_path, "cpu").rate == 1e9


def test_an_estimate_that_was_wrong_gets_better(tmp_path):
    (_, pruned) = plan("pruner=taylor", "quant=none", f"store={tmp_path}")
    clock = Clock.read(tmp_path, "cpu")
    name = estimate.work_name(pruned.stage)
    first = clock.stage_seconds(pruned.stage, pruned.spec)
    clock.learn(name, first, 10 * first)
    again = Clock.read(tmp_path, "cpu").stage_seconds(pruned.stage, pruned.spec)
    assert again == pytest.approx(10 * first, rel=1e-3)
    clock.learn(name, again, again)
    assert clock.stage_seconds(pruned.stage, pruned.spec) == pytest.approx(again, rel=1e-3)


def test_the_plan_says_the_total(tmp_path):
    steps = plan("pruner=taylor", "quant=rtn", f"store={tmp_path}")
    clock = Clock.read(tmp_path, "cpu")
    seconds = []
    for parent, step in zip(steps, steps[1:], strict=False):
        seconds.append(clock.stage_seconds(step.stage, parent.spec))
    line = time_line(steps, None, tmp_path, "cpu")
    assert line.startswith(f"Time: about {duration(sum(seconds))} (prune taylor ")
    assert "a rough estimate" in line


def test_measuring_nothing_takes_no_time_and_teaches_nothing(tmp_path):
    (source,) = plan("pruner=none", "quant=none", f"store={tmp_path}")
    clock = Clock.read(tmp_path, "cpu")
    nothing = build_pipeline(compose("compress", ["eval=none"])).evaluation
    assert estimate.evaluation_name(nothing) == ""
    assert clock.evaluation_seconds(nothing, source.spec) == 0
    quick = build_pipeline(compose("compress", ["eval=quick"])).evaluation
    assert estimate.evaluation_name(quick) == "evaluate perplexity tasks prompts speed"
    assert clock.evaluation_seconds(quick, source.spec) > estimate.OVERHEAD


def test_what_is_there_takes_no_time(tmp_path):
    steps = plan("pruner=none", "quant=none", f"store={tmp_path}")
    assert time_line(steps, None, tmp_path, "cpu") == "Nothing has to be run."


def test_the_estimate_stands_next_to_the_truth(small_llama, tmp_path):
    source = shutil.copytree(small_llama, tmp_path / "source")
    result = Pipeline(Source(str(source)), [Scale(2.0)], None, Store(tmp_path / "runs")).run()[-1]
    manifest = json.loads((result.checkpoint.folder / "slim.json").read_text())
    assert manifest["estimated_seconds"] > 0 and manifest["seconds"] > 0
    assert Clock.read(tmp_path / "runs", "cpu").knows("prune Scale")


@pytest.mark.parametrize(
    ("overrides", "name"),
    [
        (["pruner=taylor", "tuner=lora", "quant=awq"], "tiny > taylor 2 > lora r8 > awq 4b g128"),
        (
            ["pruner=taylor", "pruner.reconstruct=true", "quant=none"],
            "tiny > taylor 2 reconstructed",
        ),
        (["pruner=width_l1", "quant=none"], "tiny > width_l1 0.25"),
        (["pruner=none", "quant=rtn", "quant.group_size=-1"], "tiny > rtn 4b"),
        (["pruner=none", "quant=none"], "tiny"),
    ],
)
def test_a_chain_is_named_by_what_tells_it_from_others(overrides, name, tmp_path):
    assert chain_name(plan(*overrides, f"store={tmp_path}")) == name


def test_measuring_a_part_takes_a_part_of_the_time(tmp_path):
    evaluation = build_pipeline(compose("compress", ["eval=wikitext2"])).evaluation
    everything = estimate.evaluation_tokens(evaluation)
    evaluation.perplexity.limit = 8
    part = estimate.evaluation_tokens(evaluation)
    assert everything - part == estimate.TEXT_TOKENS - 8 * 2048
    evaluation.perplexity.text = "tiny:heldout"  # as long as its file
    evaluation.perplexity.limit = None
    size = evaluation.perplexity.path.stat().st_size
    assert everything - estimate.evaluation_tokens(evaluation) == pytest.approx(
        estimate.TEXT_TOKENS - size / estimate.BYTES_PER_TOKEN
    )


def test_waiting_for_a_processor_is_not_learnt(monkeypatch):
    waited = iter([3.0, 10.0])
    monkeypatch.setattr(estimate, "seconds_waited", lambda: next(waited))
    moments = iter([100.0, 120.0])
    monkeypatch.setattr(estimate.time, "monotonic", lambda: next(moments))
    assert estimate.Stopwatch().seconds() == 13.0

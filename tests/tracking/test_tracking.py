"""MLflow: what a run leaves there, and what happens when the store is not to be had."""

from __future__ import annotations

import math
import multiprocessing
from pathlib import Path

import pytest

from slim.chain.pipeline import Pipeline
from slim.checkpoints.source import Source
from slim.checkpoints.store import Store
from slim.core.errors import SlimError
from slim.tracking.tracker import Tracker, flatten
from tests.support.stages import Scale


def client(root: Path):
    from mlflow import MlflowClient

    return MlflowClient(f"sqlite:///{root / 'mlflow.db'}")


def runs(root: Path, experiment: str = "test"):
    store = client(root)
    return store.search_runs(
        [store.get_experiment_by_name(experiment).experiment_id], order_by=["start_time"]
    )


def test_a_run_has_nested_runs_with_settings_figures_and_plots(small_llama, tmp_path):
    class Plotting(Scale):
        def run(self, source, target, context):
            facts = super().run(source, target, context)
            (target / "report").mkdir()
            (target / "report" / "scores.txt").write_text("1 2 3")
            return {**facts, "broken": float("nan")}

    pipeline = Pipeline(Source(str(small_llama)), [Plotting(3.0)], None, Store(tmp_path))
    with Tracker(tmp_path, "test", "my run") as tracker:
        tracker.log_settings({"model": {"source": "x"}, "seed": 0}, "seed: 0\n", ["seed=0"])
        results = pipeline.run(tracker)
        tracker.log_summary(results[-1].metrics, {"results.md": "| table |"})
    parent, source, stage = runs(tmp_path)
    store = client(tmp_path)
    assert [run.info.run_name for run in (parent, source, stage)] == [
        "my run",
        small_llama.name,
        "prune plotting",
    ]
    assert [run.info.status for run in (parent, source, stage)] == ["FINISHED"] * 3
    assert parent.data.params == {"model.source": "x", "seed": "0"}
    assert parent.data.tags["overrides"] == "seed=0"
    assert {path.path for path in store.list_artifacts(parent.info.run_id)} == {
        "config.yaml",
        "results.md",
    }
    assert stage.data.tags["mlflow.parentRunId"] == parent.info.run_id
    assert stage.data.params == {"factor": "3.0"}
    assert stage.data.metrics["parameters"] == results[0].parameters
    assert math.isnan(stage.data.metrics["broken"])
    assert results[0].digest in stage.data.tags["lineage"]
    assert stage.data.tags["hash"] == results[1].digest
    assert "version.torch" in stage.data.tags
    assert [path.path for path in store.list_artifacts(stage.info.run_id)] == ["scores.txt"]
    history = store.get_metric_history(stage.info.run_id, "loss")
    assert [(point.step, point.value) for point in history] == [(1, 1.5), (2, 0.5)]


@pytest.mark.parametrize(
    ("error", "status"), [(KeyboardInterrupt(), "KILLED"), (RuntimeError("broken"), "FAILED")]
)
def test_a_run_that_ends_early_says_so(tmp_path, error, status):
    with pytest.raises(type(error)), Tracker(tmp_path, "test"):
        raise error
    (run,) = runs(tmp_path)
    assert run.info.status == status
    assert type(error).__name__ in run.data.tags["error"]


def test_a_server_that_is_down_is_a_clear_error(tmp_path):
    with pytest.raises(SlimError, match="cannot be used"):
        Tracker(tmp_path, "test", uri="http://127.0.0.1:9")


def test_a_damaged_database_is_a_clear_error(tmp_path):
    (tmp_path / "mlflow.db").write_bytes(b"this is not a database" * 100)
    with pytest.raises(SlimError, match="cannot be used"):
        Tracker(tmp_path, "test")


def _track(root: str) -> None:
    with Tracker(Path(root), "test") as tracker:
        tracker.log_summary({"x": 1.0}, {})


def test_two_processes_create_the_database_at_once(tmp_path):
    context = multiprocessing.get_context("spawn")
    both = [context.Process(target=_track, args=(str(tmp_path),)) for _ in range(2)]
    for process in both:
        process.start()
    for process in both:
        process.join(120)
    assert [process.exitcode for process in both] == [0, 0]
    assert [run.info.status for run in runs(tmp_path)] == ["FINISHED"] * 2


def test_flatten():
    assert flatten({"a": {"b": 1, "c": {"d": [1, 2]}}, "e": None}) == {
        "a.b": "1",
        "a.c.d": "[1, 2]",
        "e": "None",
    }

"""MLflow: what a run leaves there, and what happens when the store is not to be had."""

from __future__ import annotations

import math
import multiprocessing
import shlex
from pathlib import Path

import pytest

from slim.chain.pipeline import Pipeline
from slim.checkpoints.source import Source
from slim.checkpoints.store import Store
from slim.core.errors import SlimError
from slim.tracking import connection
from slim.tracking.tracker import Tracker, flatten
from tests.support.stages import Scale
from tests.support.tracked import fresh_store


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
    with pytest.raises(SlimError, match=r"127.0.0.1:9 does not answer \(Connection refused\)"):
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


@pytest.mark.parametrize("name", ["a?b", "a#b", "a%20b", "a b", "ü'\"%?#"])
def test_a_store_may_have_any_path(tmp_path, name, monkeypatch):
    monkeypatch.setattr(connection, "_clients", {})
    root = fresh_store(tmp_path / name / "runs")
    with Tracker(root, "test", "here") as tracker:
        tracker.log_summary({"x": 1.0}, {"results.md": "table"})
        command, page = tracker.browse_lines().values()
    assert [path.name for path in tmp_path.iterdir()] == [name]
    # pasted into a shell, the address is one word and leads to the same runs
    address = shlex.split(command)[-1]
    assert connection.database_path(address) == root / "mlflow.db"
    store = connection.connect(address)
    experiment = store.get_experiment_by_name("test").experiment_id
    (run,) = connection.search_runs(store, [experiment])
    assert run.info.run_name == "here"
    assert Path(store.download_artifacts(run.info.run_id, "results.md")).read_text() == "table"
    address, _, menu = page.partition("?")
    assert address == f"http://127.0.0.1:5000/#/experiments/{experiment}/runs"
    assert menu == "workflowType=machine_learning"


def test_a_deleted_experiment_is_named_with_what_restores_it(tmp_path):
    store = client(fresh_store(tmp_path))
    number = store.create_experiment("test")
    store.delete_experiment(number)
    with pytest.raises(SlimError) as refused:
        Tracker(tmp_path, "test")
    lines = str(refused.value).splitlines()
    assert lines[0].endswith("was deleted. Use another: tracking.experiment=NAME")
    words = shlex.split(lines[1].partition("restore it: ")[2])
    assert words[0] == f"MLFLOW_TRACKING_URI=sqlite:///{tmp_path / 'mlflow.db'}"
    assert words[-5:] == ["mlflow", "experiments", "restore", "-x", number]
    store.restore_experiment(number)
    with Tracker(tmp_path, "test"):
        pass


@pytest.mark.parametrize("before", [None, {}, {"mlflow.experimentKind": "finetuning"}])
def test_an_experiment_opens_on_its_runs(tmp_path, before):
    store = client(fresh_store(tmp_path))
    if before is not None:
        store.create_experiment("test", tags=before)
    with Tracker(tmp_path, "test"):
        pass
    kind = store.get_experiment_by_name("test").tags["mlflow.experimentKind"]
    assert kind == (before or {}).get("mlflow.experimentKind", "custom_model_development")


def test_headline_figures_come_first_and_the_table_describes_the_run(tmp_path):
    figures = {"bytes_on_disk": 2.5e6, "macs_per_token": 7.0, "perplexity": 3.5, "tasks/acc": 0.5}
    with Tracker(fresh_store(tmp_path), "test") as tracker:
        tracker.log_summary(figures, {"results.md": "| a table |"})
    (run,) = runs(tmp_path)
    assert sorted(run.data.metrics)[:3] == ["1 perplexity", "2 accuracy", "3 size MB"]
    assert run.data.metrics["3 size MB"] == 2.5
    assert figures.items() <= run.data.metrics.items()
    assert run.data.tags["mlflow.note.content"] == "| a table |"


def test_a_server_is_browsed_by_its_own_address():
    lines = connection.browse_lines("http://mlflow.example:80/", "7")
    page = "http://mlflow.example:80/#/experiments/7/runs?workflowType=machine_learning"
    assert lines == {"browse the runs": page}


def test_a_database_whose_making_was_killed_is_made_again(tmp_path, monkeypatch):
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"

    def killed(address):
        (tmp_path / "mlflow.db.new").write_bytes(b"half of the tables")
        raise KeyboardInterrupt

    monkeypatch.setattr(connection, "_answering_client", killed)
    with pytest.raises(KeyboardInterrupt):
        connection.connect(uri)
    assert not (tmp_path / "mlflow.db").exists()
    monkeypatch.undo()
    assert connection.connect(uri).search_experiments()
    assert not list(tmp_path.glob("*.new*"))


def test_a_database_that_mlflow_cannot_open_is_an_error(tmp_path):
    (tmp_path / "mlflow.db").write_bytes(b"no database" * 100)
    with pytest.raises(SlimError, match="cannot be used(.|\n)*Move the file elsewhere"):
        connection.connect(f"sqlite:///{tmp_path / 'mlflow.db'}")

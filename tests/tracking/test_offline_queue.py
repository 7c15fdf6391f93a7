"""What is kept while a tracking server does not answer, and sent when it does again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import requests

from slim.chain.pipeline import Pipeline
from slim.checkpoints.source import Source
from slim.checkpoints.store import Store
from slim.core.errors import SlimError
from slim.tracking import connection
from slim.tracking import offline_queue as outbox
from slim.tracking.offline_queue import (
    EXPERIMENT_KIND,
    MODEL_DEVELOPMENT,
    OfflineQueue,
    TrackingClient,
)
from slim.tracking.tracker import Tracker
from tests.support.stages import Scale
from tests.support.tracked import client, fresh_store

SERVER = "http://tracking.example"


class Fragile:
    """A client that breaks down at a given call and stays so until it is mended. ``None``: it never
    does."""

    def __init__(self, root: Path, lasts: int | None):
        self.client, self.lasts, self.calls = client(root), lasts, 0

    def __getattr__(self, name):
        if self.lasts is not None and self.calls >= self.lasts:
            raise requests.exceptions.ConnectionError("refused")
        self.calls += 1
        return getattr(self.client, name)


class Reporting(Scale):
    def run(self, source, target, context):
        facts = super().run(source, target, context)
        (target / "report").mkdir()
        (target / "report" / "scores.txt").write_text("1 2 3")
        return facts


@pytest.fixture
def server(tmp_path, monkeypatch):
    """Let connections to SERVER go to a client over a database, which fails at the call
    ``lasts``."""

    def start(root: Path, lasts: int | None) -> Fragile:
        fragile = Fragile(root, lasts)

        def connect(uri):
            if lasts == 0 and fragile.lasts == 0:
                raise SlimError("cannot be used")
            return fragile

        monkeypatch.setattr(connection, "connect", connect)
        return fragile

    return start


def track(root: Path, source: Path, patient: bool = False) -> None:
    pipeline = Pipeline(Source(str(source)), [Reporting(3.0)], None, Store(root))
    with Tracker(root, "test", "my run", SERVER, {"slim.point": "p"}, patient=patient) as tracker:
        tracker.log_settings({"seed": 0}, "seed: 0\n", ["seed=0"])
        results = pipeline.run(tracker)
        tracker.log_summary(results[-1].metrics, {"results.md": "| table |"})


def content(root: Path) -> list:
    """Everything that was tracked, without ids and times."""
    store = client(root)
    found = store.get_experiment_by_name("test")
    runs = store.search_runs([found.experiment_id], order_by=["start_time"]) if found else []
    names = {run.info.run_id: run.info.run_name for run in runs}
    ids = ("mlflow.parentRunId", "folder", "cached")
    return [
        (
            run.info.run_name, run.info.status, run.data.params, names.get(run.data.tags.get("mlflow.parentRunId")),
            {key: value for key, value in run.data.tags.items() if key not in ids},
            {key: value for key, value in run.data.metrics.items() if key != "seconds"},
            [(point.step, point.value) for point in store.get_metric_history(run.info.run_id, "loss")],
            sorted(entry.path for entry in store.list_artifacts(run.info.run_id)),
        )
        for run in sorted(runs, key=lambda run: (run.info.start_time, run.info.run_name))
    ]  # fmt: skip


def test_whenever_the_server_goes_the_next_run_sends_all_there_is_to_know(
    small_llama, tmp_path, server
):
    kind = {EXPERIMENT_KIND: MODEL_DEVELOPMENT}
    healthy = server(fresh_store(tmp_path / "healthy"), None)
    place = (tmp_path / "healthy" / "artifacts").as_uri()
    client(tmp_path / "healthy").create_experiment("test", place, kind)
    track(tmp_path / "healthy", small_llama)
    expected = content(tmp_path / "healthy")
    assert len(expected) == 3 and healthy.calls > 15
    root = fresh_store(tmp_path / "runs")
    client(root).create_experiment("test", (root / "artifacts").as_uri(), kind)
    for lasts in range(1, healthy.calls, 8):
        before = len(content(root))
        fragile = server(root, lasts)
        track(root, small_llama)
        assert len(list(root.glob("outbox/*"))) == 1
        fragile.lasts = None
        TrackingClient(root, SERVER).close()
        assert list(root.glob("outbox/*")) == []
        assert sorted(map(str, content(root)[before:])) == sorted(map(str, expected)), lasts


def test_what_begins_without_a_server_is_kept_where_that_is_allowed(
    small_llama, tmp_path, server, capsys
):
    fragile = server(fresh_store(tmp_path), 0)
    with pytest.raises(SlimError):
        track(tmp_path, small_llama)
    track(tmp_path, small_llama, patient=True)
    assert capsys.readouterr().err.count("The work goes on") == 1
    assert content(tmp_path) == []
    fragile.lasts = None
    track(tmp_path, small_llama)
    assert f"Sent to {SERVER} what was kept" in capsys.readouterr().err
    assert [run[0] for run in content(tmp_path)].count("my run") == 2
    assert len(content(tmp_path)) == 6


def test_an_outbox_belongs_to_its_writer_and_its_server(tmp_path, server):
    server(fresh_store(tmp_path), None)
    writing, other = OfflineQueue(tmp_path, SERVER), OfflineQueue(tmp_path, "http://elsewhere")
    arguments = {
        "experiment": "test",
        "place": None,
        "name": "x",
        "tags": {},
        "time": 1,
        "run": "kept-1",
    }
    for box in (writing, other):
        box.add("create_run", arguments)
    other.close()
    TrackingClient(tmp_path, SERVER)
    assert content(tmp_path) == [], "one is still being written, the other is for another server"
    writing.close()
    TrackingClient(tmp_path, SERVER)
    assert len(content(tmp_path)) == 1 and other.folder.exists() and not writing.folder.exists()


def test_sending_goes_on_where_it_was_broken_off(tmp_path, server):
    box = OfflineQueue(tmp_path, SERVER)
    for name in ("a", "b"):
        box.add(
            "create_run",
            {"experiment": "test", "place": None, "name": name, "tags": {}, "time": 1, "run": name},
        )
    box.close()
    fragile = server(fresh_store(tmp_path), None)
    client(tmp_path).create_experiment("test", tags={EXPERIMENT_KIND: MODEL_DEVELOPMENT})
    fragile.lasts = 2  # asks for the experiment, makes a run, and no more
    TrackingClient(tmp_path, SERVER).close()
    assert json.loads((box.folder / "state.json").read_text())["sent"] == 1
    fragile.lasts = None
    TrackingClient(tmp_path, SERVER).close()
    assert sorted(run[0] for run in content(tmp_path)) == ["a", "b"]


def test_half_a_line_of_a_killed_process_holds_nothing_up(tmp_path, server):
    box = OfflineQueue(tmp_path, SERVER)
    box.add(
        "create_run",
        {"experiment": "test", "place": None, "name": "a", "tags": {}, "time": 1, "run": "a"},
    )
    with (box.folder / "calls.jsonl").open("a", encoding="utf-8") as file:
        file.write('["end", {"run": "a", "sta')
    box.close()
    server(fresh_store(tmp_path), None)
    TrackingClient(tmp_path, SERVER).close()
    assert [run[0] for run in content(tmp_path)] == ["a"] and not box.folder.exists()


def test_what_a_server_refuses_is_no_outage(tmp_path):
    from mlflow.exceptions import MlflowException

    assert not outbox.is_gone(MlflowException("Invalid value for parameter"))
    assert not outbox.is_gone(OSError("disk full"))
    try:
        try:
            raise requests.exceptions.Timeout("slow")
        except requests.exceptions.Timeout as error:
            raise MlflowException("wrapped") from error
    except MlflowException as error:
        assert outbox.is_gone(error)

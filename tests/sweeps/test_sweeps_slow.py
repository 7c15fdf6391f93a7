"""Sweeps in processes of their own: killed and resumed, several at once, a tracking server that
goes and comes back."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.support.tracked import client
from tests.sweeps.test_sweeps import SCALE, kinds, log_of, sweep  # noqa: F401

POINTS = [
    "texts=tiny",
    "pruner=magnitude",
    "pruner.blocks=2",
    "quant=rtn",
    "quant.bits=2,3,4,8",
    "quant.group_size=32,64",
    "eval.speed=null",
    "eval.tasks=null",
    "eval.prompts=[]",
]


def start(folder: Path, source: Path, *more: str) -> subprocess.Popen:
    folder.mkdir(parents=True, exist_ok=True)
    command = [
        sys.executable,
        str(ROOT / "compress.py"),
        "-m",
        "model=hf",
        f"model.source={source}",
        "store=runs",
        *more,
    ]
    # of the stage of the tests, also in a cluster's processes
    places = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=places
    )


def figures(folder: Path) -> dict:
    """Point -> the figures of all its checkpoints, without times and folders."""
    root, found = folder / "runs", {}
    for run in kinds(root)["run"]:
        assert run.info.status == "FINISHED"
        records = json.loads(
            Path(client(root).download_artifacts(run.info.run_id, "results.json")).read_text()
        )
        assert run.info.run_name not in found, "one run per point"
        found[run.info.run_name] = [(record["hash"], record["metrics"]) for record in records]
    return found


def ended(folder: Path, before: int) -> int:
    """Count the points that were run in the newest folder of the sweep, where there are more such
    folders than ``before``."""
    folders = sorted(folder.glob("multirun/*/*"))
    records = (
        [json.loads(path.read_text()) for path in folders[-1].glob("*/point.json")]
        if len(folders) > before
        else []
    )
    return sum(record["status"] == "FINISHED" and not record.get("reused") for record in records)


# six starts of the command, about two minutes: pytest -m slow tests/test_sweeps_slow.py
@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_sweep_killed_three_times_and_resumed_equals_one_that_ran_through(small_llama, tmp_path):
    broken, whole = tmp_path / "broken", tmp_path / "whole"
    for number in range(3):
        before = len(list(broken.glob("multirun/*/*")))
        process = start(broken, small_llama, *POINTS)
        while ended(broken, before) < 1 + number % 2:
            assert process.poll() is None, process.stdout.read()
            time.sleep(0.05)
        time.sleep(0.1 * number)
        process.kill()
        process.wait()
        assert kinds(broken / "runs")["sweep"][0].info.status == "RUNNING"
    for folder in (broken, whole):
        process = start(folder, small_llama, *POINTS)
        output, _ = process.communicate(timeout=300)
        assert process.returncode == 0, output
    assert len(kinds(broken / "runs")["sweep"]) == 1
    assert kinds(broken / "runs")["sweep"][0].info.status == "FINISHED"
    assert figures(broken) == figures(whole)
    assert len(figures(whole)) == 8


@pytest.mark.slow  # about a minute: pytest -m slow tests/test_sweeps_slow.py
@pytest.mark.parametrize("launcher", ["joblib", "submitit_local"])
def test_several_processes_share_the_stages_and_the_cores(small_llama, tmp_path, launcher):
    if launcher == "submitit_local":
        pytest.importorskip(
            "hydra_plugins.hydra_submitit_launcher", reason="pip install -e '.[cluster]'"
        )
    log = tmp_path / "log"
    more = ["hydra.launcher.n_jobs=2"] if launcher == "joblib" else []
    scale = [
        *SCALE,
        "++pruner.factor=2",
        f"++pruner.log={log}",
        "quant=rtn",
        "quant.bits=2,3,4,7",
        "quant.group_size=32",
    ]
    process = start(tmp_path, small_llama, *scale, f"hydra/launcher={launcher}", *more)
    output, _ = process.communicate(timeout=280)
    assert process.returncode == 2, output
    assert log_of(log) == ["2"], "what all points share is made once"
    found = kinds(tmp_path / "runs")
    states = {run.info.run_name[-1]: run.info.status for run in found["run"]}
    assert states == {"2": "FINISHED", "3": "FINISHED", "4": "FINISHED", "7": "FAILED"}
    assert {run.data.tags["mlflow.parentRunId"] for run in found["run"]} == {
        found["sweep"][0].info.run_id
    }
    assert output.count("point ") >= 4 and "Sweep of 4 points" in output, output


def serve(folder: Path, port: int) -> subprocess.Popen:
    """Start a tracking server and wait until it answers."""
    command = [
        sys.executable, "-m", "mlflow", "server", "--port", str(port), "--workers", "1",
        "--backend-store-uri", f"sqlite:///{folder / 'server.db'}", "--artifacts-destination", str(folder / "artifacts"),
    ]  # fmt: skip
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2):
                return process
        except OSError:
            time.sleep(0.3)
    stop(process)
    pytest.skip("mlflow server does not start here")


def stop(process: subprocess.Popen) -> None:
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@pytest.mark.slow  # about a minute: pytest -m slow tests/test_sweeps_slow.py
def test_a_server_that_goes_during_a_sweep_gets_everything_later(sweep, tmp_path, monkeypatch):  # noqa: F811
    from mlflow import MlflowClient

    from tests.support.stages import Scale

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    uri, run = f"http://127.0.0.1:{port}", Scale.run
    servers = [serve(tmp_path, port)]

    def goes(self, source, target, context):
        if self.factor == 3:
            stop(servers[-1])
        return run(self, source, target, context)

    try:
        monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
        monkeypatch.setattr(Scale, "run", goes)
        command = [*SCALE, "++pruner.factor=2,3,4", f"tracking.uri={uri}"]
        code, _, err = sweep(*command)
        assert code == 0 and "does not answer" in err, err
        assert list((tmp_path / "runs" / "outbox").iterdir())
        servers.append(serve(tmp_path, port))
        code, out, err = sweep(*command)
        assert code == 0 and "Sent to" in err and "3 done before, 0 to run" in err, err
        assert list((tmp_path / "runs" / "outbox").iterdir()) == []
        store = MlflowClient(uri)
        runs = store.search_runs([store.get_experiment_by_name("slim").experiment_id])
        points = [found for found in runs if found.data.tags["slim.kind"] == "run"]
        assert sorted(found.info.run_name for found in points) == [
            f"pruner.factor={factor}" for factor in (2, 3, 4)
        ]
        for found in points:
            below = [
                other
                for other in runs
                if other.data.tags.get("mlflow.parentRunId") == found.info.run_id
            ]
            assert found.info.status == "FINISHED" and {"source": 1, "prune scale": 1}.keys() & {
                b.info.run_name for b in below
            }
            assert {"results.json", "final.json", "config.yaml"} <= {
                f.path for f in store.list_artifacts(found.info.run_id)
            }
            scaled = next(other for other in below if other.info.run_name == "prune scale")
            assert [
                point.value for point in store.get_metric_history(scaled.info.run_id, "loss")
            ] == [1.5, 0.5]
            assert found.data.params["pruner.factor"] == found.info.run_name[-1] and len(below) == 2
    finally:
        for process in servers:
            stop(process)

"""The whole chain from the command line: prune, heal, quantise, evaluate, track; interrupted,
resumed, repeated."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.conftest import ROOT

SHORT = [
    "model=tiny", "pruner=taylor", "tuner=lora", "quant=awq", "tuner.steps=6", "calibration.samples=8",
    "eval.perplexity.limit=16", "eval.tasks.limit=24", "eval.speed.count=1", "eval.speed.repeats=1",
    "eval.speed.warmup=1", "eval.speed.new_tokens=8",
]  # fmt: skip
FULL = ["model=tiny", "pruner=taylor", "tuner=lora", "quant=awq"]
MACHINE = ("tokens_per_second", "resident_bytes", "peak_bytes", "seconds")


def start(store: Path, *arguments: str, script: str = "compress.py") -> subprocess.Popen:
    command = [sys.executable, str(ROOT / script), *arguments, f"store={store}"]
    return subprocess.Popen(
        command, cwd=store.parent, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def run(store: Path, *arguments: str, script: str = "compress.py") -> tuple[int, str, str]:
    process = start(store, *arguments, script=script)
    out, err = process.communicate(timeout=600)
    return process.returncode, out, err


def runs(store: Path):
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{store / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("slim")
    found = (
        client.search_runs([experiment.experiment_id], order_by=["start_time"])
        if experiment
        else []
    )
    return client, found


def results(store: Path) -> list[dict]:
    """The table of the last finished run, as it was tracked."""
    client, found = runs(store)
    parent = [
        run
        for run in found
        if "mlflow.parentRunId" not in run.data.tags and run.info.status == "FINISHED"
    ][-1]
    path = client.download_artifacts(parent.info.run_id, "results.json")
    return json.loads(Path(path).read_text())


def quality(store: Path) -> list[tuple[str, str, dict]]:
    """Names and figures of every row, without those that belong to the machine and the moment."""
    rows = []
    for row in results(store):
        kept = {
            name: value
            for name, value in row["metrics"].items()
            if not any(word in name for word in MACHINE)
        }
        rows.append((row["checkpoint"], row["hash"], kept))
    return rows


def stage_folders(store: Path) -> list[str]:
    folder = store / "stages"
    return (
        sorted(path.name for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> tuple[Path, str]:
    """The store and the printed table of a short chain that ran through."""
    store = tmp_path_factory.mktemp("chain") / "runs"
    code, out, err = run(store, *SHORT)
    assert code == 0, err
    return store, out


def test_the_chain_ends_in_one_table(finished):
    store, out = finished
    for text in (
        "tiny",
        "prune taylor",
        "tune lora",
        "quantize awq",
        "perplexity",
        "mlflow ui --backend-store-uri",
    ):
        assert text in out
    rows = results(store)
    assert [row["checkpoint"] for row in rows] == [
        "tiny",
        "prune taylor",
        "tune lora",
        "quantize awq",
    ]
    source, pruned, tuned, quantized = (row["metrics"] for row in rows)
    assert (
        pruned["parameters"]
        == tuned["parameters"]
        == quantized["parameters"]
        < source["parameters"]
    )
    assert quantized["bytes_on_disk"] < 0.6 * tuned["bytes_on_disk"] < source["bytes_on_disk"]
    assert quantized["weights_bytes"] < 0.6 * tuned["weights_bytes"]
    assert source["perplexity"] < tuned["perplexity"] < pruned["perplexity"]


def test_everything_is_tracked(finished):
    client, found = runs(finished[0])
    parent, *stages = found
    assert [run.info.run_name for run in stages] == [
        "tiny",
        "prune taylor",
        "tune lora",
        "quantize awq",
    ]
    assert all(run.data.tags["mlflow.parentRunId"] == parent.info.run_id for run in stages)
    assert {path.path for path in client.list_artifacts(parent.info.run_id)} >= {
        "config.yaml", "results.md", "results.json", "samples.md",
    }  # fmt: skip
    artifacts = [{path.path for path in client.list_artifacts(run.info.run_id)} for run in stages]
    assert "block_scores.png" in artifacts[1]
    assert "loss.png" in artifacts[2]
    assert "layer_errors.png" in artifacts[3]
    assert client.get_metric_history(stages[2].info.run_id, "train_loss")
    assert parent.data.params["quantizer.bits"] == "4"
    assert parent.data.metrics["perplexity"] == stages[3].data.metrics["perplexity"]


def test_the_same_command_again_computes_nothing(finished):
    store, out = finished
    before = {path: path.stat().st_mtime_ns for path in store.glob("stages/*/model.safetensors")}
    started = time.monotonic()
    code, again, err = run(store, *SHORT)
    assert code == 0, err
    assert time.monotonic() - started < 40  # 20 s on an idle machine
    assert {
        path: path.stat().st_mtime_ns for path in store.glob("stages/*/model.safetensors")
    } == before
    assert [row["cached"] for row in results(store)] == [True] * 4
    assert again.splitlines()[:9] == out.splitlines()[:9], (
        "the table, speed included, is the recorded one"
    )


def test_evaluate_finds_what_compress_has_measured(finished):
    store, _ = finished
    folder = results(store)[-1]["folder"]
    options = [option for option in SHORT if option.startswith("eval.")]
    code, _, err = run(store, f"model.source={folder}", *options, script="evaluate.py")
    assert code == 0, err
    assert "evaluating" not in err
    (row,) = results(store)
    assert row["metrics"]["bytes_on_disk"] < 3e6


def test_ctrl_c_leaves_nothing_half_written(tmp_path, finished):
    store = tmp_path / "runs"
    process = start(store, *SHORT, "tuner.steps=100000", "tuner.validate_every=100000")
    wait_for(lambda: list(store.glob("stages/tune-*.partial")), process)
    time.sleep(6)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 130, err
    assert err.strip().splitlines()[-1].startswith("slim: Interrupted. Finished stages are kept"), (
        err
    )
    assert [name.split("-")[0] for name in stage_folders(store)] == ["prune"]
    assert runs(store)[1][0].info.status == "KILLED"


def wait_for(condition, process: subprocess.Popen, seconds: float = 200) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.02)


# five runs of the short chain, about 5 minutes: pytest -m slow tests/test_chain.py
@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_killed_at_five_moments_it_resumes_to_the_same_table(tmp_path, finished):
    store = tmp_path / "runs"
    moments = [
        lambda: store.joinpath("mlflow.db").exists(),
        lambda: list(store.glob("stages/prune-*.partial")),
        lambda: list(store.glob("stages/tune-*.partial")),
        lambda: list(store.glob("stages/quantize-*.partial")),
        lambda: len(list(store.glob("evaluations/*.json"))) >= 7,
    ]
    draw = random.Random(0)
    for moment in moments:
        process = start(store, *SHORT)
        wait_for(moment, process)
        time.sleep(draw.uniform(0, 0.4))
        process.kill()
        process.wait()
    code, _, err = run(store, *SHORT)
    assert code == 0, err
    assert quality(store) == quality(finished[0])
    assert not list(store.glob("stages/*.partial"))


# two full runs with empty caches, about 4 minutes: pytest -m slow tests/test_chain.py
@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_same_command_twice_gives_the_same_numbers(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        code, _, err = run(tmp_path / name / "runs", *FULL)
        assert code == 0, err
    assert quality(tmp_path / "a" / "runs") == quality(tmp_path / "b" / "runs")


@pytest.mark.slow  # about 2 minutes: pytest -m slow tests/test_chain.py
@pytest.mark.timeout(1200)
def test_two_processes_at_once_share_the_work(tmp_path, finished):
    store = tmp_path / "runs"
    both = [start(store, *SHORT) for _ in range(2)]
    outputs = [process.communicate(timeout=900) for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs
    assert "Waiting for another process" in outputs[0][1] + outputs[1][1]
    _, found = runs(store)
    made = [run.info.run_name for run in found if run.data.tags.get("cached") == "false"]
    assert sorted(made) == ["prune taylor", "quantize awq", "tune lora"]
    assert quality(store) == quality(finished[0])


@pytest.mark.slow
def test_a_sweep_makes_shared_stages_once(tmp_path):
    store = tmp_path / "runs"
    options = [option for option in SHORT if not option.startswith(("tuner", "quant"))]
    process = subprocess.run(
        [sys.executable, str(ROOT / "compress.py"), "-m", *options, "quant=rtn", "quant.bits=4,2", f"store={store}",
         f"hydra.sweep.dir={tmp_path / 'sweep'}"],
        cwd=tmp_path, capture_output=True, text=True, timeout=300, env=os.environ,
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    assert [name.split("-")[0] for name in stage_folders(store)] == [
        "prune",
        "quantize",
        "quantize",
    ]

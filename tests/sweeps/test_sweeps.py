"""Sweeps: their runs in MLflow, points that fail, resuming, what is typed against what a file
sweeps. In this process."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import shutil
import sys
import time
from pathlib import Path

import pytest

from slim.chain.compose import CONF
from slim.checkpoints import checkpoint
from slim.cli.launch import launch
from slim.core.errors import SlimError
from slim.sweeps import finish, grid, watch
from slim.sweeps.folder import SweepFolder
from slim.sweeps.names import sweep_id
from tests.support.tracked import client, fresh_store, tracked

SCALE = ["pruner=none", "quant=none", "eval=none", "++pruner._target_=tests.support.stages.Scale"]


@pytest.fixture
def sweep(small_llama, tmp_path, monkeypatch, capsys):
    """Run ``compress.py -m`` in this process; returns the exit code, output and errors."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(finish, "attach_report", lambda tracker: None)  # has tests of its own

    def run(*arguments: str) -> tuple[int, str, str]:
        def main(config):
            from slim.cli.execute import execute

            execute(config)

        typed = [
            "-m",
            "model=hf",
            f"model.source={small_llama}",
            f"store={tmp_path / 'runs'}",
            *arguments,
        ]
        monkeypatch.setattr(sys, "argv", ["compress.py", *typed])
        with pytest.raises(SystemExit) as ended:
            launch("compress", main)
        return ended.value.code, *capsys.readouterr()

    return run


def kinds(root: Path) -> dict[str, list]:
    found = {"sweep": [], "run": [], "stage": []}
    for run in tracked(root):
        found[run.data.tags["slim.kind"]].append(run)
    return found


def log_of(path: Path) -> list[str]:
    return path.read_text().split() if path.exists() else []


def test_a_sweep_is_runs_below_runs_and_the_same_command_runs_what_is_missing(sweep, tmp_path):
    log, root = tmp_path / "log", fresh_store(tmp_path / "runs")
    command = [*SCALE, "++pruner.factor=2,3", "seed=0,1", f"++pruner.log={log}"]
    code, out, err = sweep(*command)
    assert code == 0, err
    assert "Sweep of 4 points" in out and "4 to run" in err and "point 4/4" in err
    found = kinds(root)
    (whole,) = found["sweep"]
    assert {run.data.tags["mlflow.parentRunId"] for run in found["run"]} == {whole.info.run_id}
    assert len(found["run"]) == 4 and len(found["stage"]) == 8
    below = [run.data.tags["mlflow.parentRunId"] for run in found["stage"]]
    assert all(below.count(run.info.run_id) == 2 for run in found["run"])
    assert {run.info.status for runs in found.values() for run in runs} == {"FINISHED"}
    assert log_of(log) == ["2", "3"], (
        "the seed changes nothing of this stage, which runs once for both"
    )
    check_record(tmp_path, found)
    code, out, err = sweep(*command)
    assert code == 0 and "4 done before, 0 to run" in err and out.count("done before") == 4
    gone = next(run for run in found["run"] if run.info.run_name == "pruner.factor=3 seed=0")
    shutil.rmtree(gone.data.tags["slim.folder"])
    code, _, err = sweep(*command)
    assert "2 done before, 2 to run" in err and log_of(log) == ["2", "3", "3"]
    last = kinds(root)
    assert [run.info.run_id for run in last["sweep"]] == [whole.info.run_id]
    names = [run.info.run_name for run in last["run"]]
    assert sorted(names) == [
        f"pruner.factor={factor} seed={seed}" for factor in "23" for seed in "01"
    ]
    assert gone.info.run_id not in {run.info.run_id for run in last["run"]}, (
        "a point made again replaces its earlier run"
    )


def check_record(folder: Path, found: dict[str, list]) -> None:
    """Check what ``sweep.json`` says of the first test's sweep, in its folder and in MLflow."""
    (file,) = folder.glob("multirun/*/*/sweep.json")
    record, (whole,) = json.loads(file.read_text()), found["sweep"]
    assert record["run_id"] == whole.info.run_id
    assert record["swept"] == {"pruner.factor": ["2", "3"], "seed": ["0", "1"]}
    settings = [{"pruner.factor": factor, "seed": seed} for factor in "23" for seed in "01"]
    assert [point["overrides"] for point in record["points"]] == settings
    assert {point["run_id"] for point in record["points"]} == {
        run.info.run_id for run in found["run"]
    }
    assert [point["status"] for point in record["points"]] == ["FINISHED"] * 4
    store = client(folder / "runs")
    assert "sweep.json" in {entry.path for entry in store.list_artifacts(whole.info.run_id)}
    point = found["run"][0].info.run_id
    assert {"config.yaml", "final.json", "results.json"} <= {
        entry.path for entry in store.list_artifacts(point)
    }


def test_a_point_that_cannot_be_is_recorded_and_the_others_run(sweep, tmp_path):
    fresh_store(tmp_path / "runs")
    # 5 bits are refused by the class, none has no setting bits: wrong after, and while, a
    # configuration is composed
    command = [
        "pruner=none",
        "quant=rtn,none",
        "quant.bits=4,5",
        "quant.group_size=32",
        "eval=none",
    ]
    code, out, _ = sweep(*command)
    assert code == 2 and out.count("failed") == 3 and out.count(" done") == 1
    found = kinds(tmp_path / "runs")
    states = {
        run.info.run_name: (run.info.status, run.data.tags.get("error", "")) for run in found["run"]
    }
    assert states.pop("quantizer=rtn quantizer.bits=4") == ("FINISHED", "")
    assert states["quantizer=rtn quantizer.bits=5"] == (
        "FAILED",
        "quant.bits=5: must be one of 2, 3, 4, 8, auto.",
    )
    assert all(states[f"quantizer=none quantizer.bits={bits}"][0] == "FAILED" for bits in (4, 5))
    assert "has no settings" in states["quantizer=none quantizer.bits=4"][1]
    assert found["sweep"][0].info.status == "FINISHED"
    code, _, err = sweep(*command)
    assert code == 2 and "1 done before, 3 cannot run, 0 to run" in err
    assert len(kinds(tmp_path / "runs")["run"]) == 4, (
        "a point that fails again replaces its earlier run"
    )


def test_what_is_wrong_with_every_point_is_said_at_once(sweep, tmp_path):
    code, out, err = sweep("quant.bitz=2,3")
    assert (code, out) == (2, "")
    assert "quantizer has no setting 'bitz'" in err
    assert list(tmp_path.iterdir()) == []


def test_an_output_for_several_points_is_refused_unless_it_names_them(sweep, tmp_path):
    code, _, err = sweep(*SCALE, "++pruner.factor=2,3", f"output={tmp_path / 'small'}", "plan=true")
    assert code == 2 and "several points" in err
    code, out, err = sweep(
        *SCALE, "++pruner.factor=2,3", f"output='{tmp_path}/small-${{pruner.factor}}'", "plan=true"
    )
    assert code == 0 and out.count("nothing has been run") == 2, err
    assert list(tmp_path.iterdir()) == []


def test_another_command_is_another_sweep():
    base = sweep_id("compress", "slim", ["quantizer.bits=2,3", "seed=1"], {})
    assert base == sweep_id(
        "compress", "slim", ["seed=1", "quantizer.bits=2,3", "store=x", "tracking.uri=http://x"], {}
    )
    others = [
        sweep_id("train", "slim", ["quantizer.bits=2,3", "seed=1"], {}),
        sweep_id("compress", "other", ["quantizer.bits=2,3", "seed=1"], {}),
        sweep_id("compress", "slim", ["quantizer.bits=2,3"], {}),
        sweep_id("compress", "slim", ["quantizer.bits=2,3", "seed=1"], {"seed": "1,2"}),
    ]
    assert len({base, *others}) == 5


def test_an_error_of_slims_own_ends_its_point_and_an_interrupt_the_sweep(
    sweep, tmp_path, monkeypatch
):
    from tests.support.stages import Scale

    fresh_store(tmp_path / "runs")

    def interrupted(self, source, target, context):
        if self.factor == 3:
            raise KeyboardInterrupt
        return run(self, source, target, context)

    run = Scale.run
    command = [*SCALE, "++pruner.factor=2,x,3"]  # x is no number: the stage stumbles over it
    monkeypatch.setattr(Scale, "run", interrupted)
    code, _, err = sweep(*command)
    assert code == 130 and "Interrupted" in err and "Traceback" not in err
    found = kinds(tmp_path / "runs")
    assert found["sweep"][0].info.status == "KILLED"
    assert [run.info.status for run in found["run"]] == ["FINISHED", "FAILED", "KILLED"]
    monkeypatch.setattr(Scale, "run", run)
    code, out, err = sweep(*command)
    assert code == 1 and "1 done before, 2 to run" in err and "Traceback" not in err + out
    found = kinds(tmp_path / "runs")
    assert found["sweep"][0].info.status == "FINISHED"
    states = {run.info.run_name: run.info.status for run in found["run"]}
    assert len(found["run"]) == 3
    assert [states[f"pruner.factor={factor}"] for factor in "2x3"] == [
        "FINISHED",
        "FAILED",
        "FINISHED",
    ]
    *_, file = sorted(tmp_path.glob("multirun/*/*/1/error.txt"))
    assert "Traceback" in file.read_text() and "tests/support/stages.py" in file.read_text()
    assert str(file) in out


def test_a_server_that_is_down_is_said_before_the_first_point(sweep, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    code, _, err = sweep(
        *SCALE,
        "++pruner.factor=2,3",
        f"++pruner.log={tmp_path / 'log'}",
        "tracking.uri=http://127.0.0.1:9",
    )
    assert code == 2 and "does not answer" in err
    assert not (tmp_path / "log").exists()


def test_the_plan_says_which_points_cannot_run(sweep, tmp_path):
    code, out, _ = sweep(
        "pruner=none", "quant=rtn", "quant.bits=4,5", "quant.group_size=32", "plan=true"
    )
    assert code == 0
    assert out.count("nothing has been run") == 1 and "cannot run: quant.bits=5" in out
    assert list(tmp_path.iterdir()) == []


def test_a_process_that_dies_takes_no_other_points_with_it(sweep, tmp_path, monkeypatch):
    from hydra._internal.core_plugins.basic_launcher import BasicLauncher

    def dies(self, job_overrides, initial_job_idx):
        raise RuntimeError("a worker was killed")

    root = fresh_store(tmp_path / "runs")
    monkeypatch.setattr(BasicLauncher, "launch", dies)
    code, out, _ = sweep(*SCALE, "++pruner.factor=2,3")
    assert code == 1 and out.count("RuntimeError: a worker was killed") == 2
    found = kinds(root)
    assert [run.info.status for run in found["run"]] == ["FAILED"] * 2 and found["sweep"][
        0
    ].info.status == "FINISHED"


def test_the_same_sweep_runs_once_at_a_time(sweep, small_llama, tmp_path):
    from filelock import FileLock

    fresh_store(tmp_path / "runs")
    name = sweep_id(
        "compress",
        "slim",
        ["model=hf", f"model.source={small_llama}", "seed=0,1", "pruner=none", "quantizer=none"],
        {},
    )
    lock = tmp_path / "runs" / "sweeps" / f".{name}.lock"
    lock.parent.mkdir()
    with FileLock(lock):
        code, _, err = sweep("seed=0,1", "pruner=none", "quant=none")
    assert code == 2 and "Another process is running this very sweep" in err


def test_a_folder_is_cleared_of_an_earlier_sweep_unless_that_is_running(tmp_path):
    folder = SweepFolder(tmp_path)
    folder.claim()
    folder.write_point(0, {"status": "FINISHED"})
    folder.write_header({"pid": 2**22 + 1})  # above the highest number of a process
    folder.claim()
    assert folder.points() == []
    folder.write_header({"pid": os.getppid()})
    with pytest.raises(SlimError, match="Another sweep is running in"):
        folder.claim()


def test_a_file_is_read_once_for_its_checksum_until_it_changes(tmp_path, monkeypatch):
    read, digest = [], hashlib.file_digest
    monkeypatch.setattr(
        hashlib, "file_digest", lambda file, kind: read.append(file.name) or digest(file, kind)
    )
    path = tmp_path / "weights"
    path.write_bytes(b"one")
    assert checkpoint.sha256(path) == checkpoint.sha256(path) == hashlib.sha256(b"one").hexdigest()
    assert len(read) == 2, "what changed just now may change again within the clock's resolution"
    os.utime(path, (time.time() - 60, time.time() - 60))
    assert checkpoint.sha256(path) == checkpoint.sha256(path) == hashlib.sha256(b"one").hexdigest()
    assert len(read) == 3
    path.write_bytes(b"two")
    assert checkpoint.sha256(path) == hashlib.sha256(b"two").hexdigest()


@pytest.fixture
def parse():
    """Parse what is typed together with what an experiment file sweeps."""
    import hydra
    from hydra.core.global_hydra import GlobalHydra
    from hydra.types import HydraContext

    from hydra_plugins.slim_sweeper.grid import GridSweeper

    def combinations(params: dict, *typed: str):
        sweeper = GridSweeper(None, params)
        with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
            loader = GlobalHydra.instance().config_loader()
            sweeper.hydra_context = HydraContext(config_loader=loader, callbacks=None)
            return grid.expand(grid.parse(sweeper, list(typed)))

    GlobalHydra.instance().clear()
    return combinations


def test_every_combination_is_a_point(parse):
    points, swept = parse(
        {}, "seed=1,2,3", "model=tiny", "quantizer.bits=range(2,5)", "++tuner.steps=5,6"
    )
    expected = itertools.product(["seed=1", "seed=2", "seed=3"], [2, 3, 4], [5, 6])
    assert points == [
        [a, "model=tiny", f"quantizer.bits={b}", f"++tuner.steps={c}"] for a, b, c in expected
    ]
    assert swept == {
        "seed": ["1", "2", "3"],
        "quantizer.bits": ["2", "3", "4"],
        "tuner.steps": ["5", "6"],
    }


def test_what_is_typed_wins_over_what_a_file_sweeps(parse):
    file = {"model": "mistral7b,llama3_8b", "quant.bits": "2,3"}
    points, swept = parse(file, "experiment=x", "model=tiny")
    assert points == [
        ["quantizer.bits=2", "experiment=x", "model=tiny"],
        ["quantizer.bits=3", "experiment=x", "model=tiny"],
    ]
    assert swept == {"quantizer.bits": ["2", "3"]}
    points, swept = parse(file, "++quantizer.bits=4,8")
    assert len(points) == 4 and swept == {
        "model": ["mistral7b", "llama3_8b"],
        "quantizer.bits": ["4", "8"],
    }


def test_an_interval_has_no_points(parse):
    with pytest.raises(SlimError, match=r"seed=interval\(0,1\) is no list of values"):
        parse({}, "seed=interval(0,1)")


def test_the_line_of_a_point_says_how_much_is_left():
    points = [
        {"number": n, "name": f"x={n}", "status": "FINISHED", "seconds": s, "error": None}
        for n, s in enumerate([90, 10, 12])
    ]
    assert watch.point_head(points, 9) == "point 3/9"
    assert "72 s left" in watch.point_line(points[2], points, 9, 1)
    assert "36 s left" in watch.point_line(points[2], points, 9, 2)
    points[2] |= {"status": "FAILED", "error": "no [room]"}
    assert "no [room]" in watch.point_line(points[2], points, 9, 1)
    assert "1 failed" in watch.point_line(points[2], points, 9, 1)
    assert "left" not in watch.point_line(points[1], points[:2], None, 1)

"""Runs whose process is gone are closed as killed by the next command."""

from __future__ import annotations

import json
import multiprocessing
import os
import platform
import signal
from pathlib import Path

import pytest

from slim.tracking import liveness
from slim.tracking.tracker import Tracker
from tests.support.tracked import fresh_store, tracked


def changed(**entries) -> str:
    return json.dumps({**json.loads(liveness.process_tag()), **entries})


def test_this_process_is_alive():
    assert not liveness.is_gone(liveness.process_tag())


@pytest.mark.parametrize(
    ("tag", "gone"),
    [
        (changed(pid=2**22 + 1), True),
        (changed(started="1"), True),
        (changed(boot="another"), True),
        (changed(host="another", pid=2**22 + 1), False),
        (changed(space="a container", pid=2**22 + 1), False),
        ("", False),
        ("{}", False),
        ("not JSON", False),
    ],
    ids=["no process", "number used again", "rebooted", "host", "container", "none", "{}", "text"],
)
def test_what_tells_that_a_process_is_gone(tag, gone):
    assert liveness.is_gone(tag) is gone


def _die_in_a_run(root: str) -> None:
    with Tracker(Path(root), "test", "doomed"):
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_run_is_closed_by_the_next_command_and_a_living_one_is_not(tmp_path, capsys):
    fresh_store(tmp_path)
    with Tracker(tmp_path, "test", "alive"):
        process = multiprocessing.get_context("spawn").Process(
            target=_die_in_a_run, args=(str(tmp_path),)
        )
        process.start()
        process.join(120)
        assert process.exitcode == -signal.SIGKILL
        assert [run.info.status for run in tracked(tmp_path, "test")] == ["RUNNING"] * 2
        with Tracker(tmp_path, "other", "next"):
            pass
        states = {run.info.run_name: run.info.status for run in tracked(tmp_path, "test")}
        assert states == {"alive": "RUNNING", "doomed": "KILLED"}
    assert "1 run(s) whose process is gone" in capsys.readouterr().err
    assert platform.node() in tracked(tmp_path, "test")[0].data.tags["slim.process"]

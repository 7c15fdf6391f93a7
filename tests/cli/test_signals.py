"""SIGTERM and SIGHUP end a run like Ctrl-C: its state saved, closed in MLflow, with their own exit
code."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

from tests.conftest import ROOT
from tests.support.tracked import fresh_store, tracked

START = """
import os, sys, time
from slim.checkpoints.stage import Stage
from tests.support.stages import Scale

def run(self, source, target, context):
    open({mark!r}, "w").close()
    time.sleep(60)

Scale.run = run
from slim.cli.commands import compress
compress()
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_run_that_is_told_to_end_is_closed_as_killed(tmp_path, number):
    store = fresh_store(tmp_path / "runs")
    mark = tmp_path / "running"
    stage = ["pruner=none", "++pruner._target_=tests.support.stages.Scale"]
    command = [sys.executable, "-c", START.format(mark=str(mark)), "model=tiny", *stage]
    process = subprocess.Popen(
        [*command, "quant=none", "eval=none", f"store={store}"],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    deadline = time.monotonic() + 120
    while not mark.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 128 + number, err
    assert err.splitlines()[-1].startswith("slim: Terminated. Finished stages are kept")
    assert "Traceback" not in err
    assert tracked(store)[0].info.status == "KILLED"
    assert not list((store / "stages").glob("*.partial"))

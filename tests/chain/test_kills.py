"""A chain that is killed or terminated at random moments, in any of its stages: typed again it ends
in the same table, and no run in MLflow stays open.

    SLIM_KILLS=20 python -m pytest -m slow tests/chain/test_kills.py
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import time

import pytest

from tests.chain.test_chain import quality, runs, start

KILLS = int(os.environ.get("SLIM_KILLS", "3"))
CHAIN = [
    "model=tiny",
    "pruner=taylor",
    "pruner.blocks=2",
    "tuner=lora",
    "tuner.steps=12",
    "tuner.validate_every=4",
    "tuner.validation_tokens=1024",
    "teacher=base",
    "teacher.steps=12",
    "teacher.validate_every=4",
    "teacher.validation_tokens=1024",
    "quant=gptq",
    "calibration.samples=8",
    "eval.perplexity.limit=8",
    "eval.tasks.names=[]",
    "eval.prompts=[]",
    "eval.speed=null",
]


def finish(store) -> None:
    process = start(store, *CHAIN)
    _, err = process.communicate(timeout=1500)
    assert process.returncode == 0, err


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_a_chain_that_is_killed_at_random_moments_ends_in_the_same_table(tmp_path):
    begin = time.monotonic()
    finish(tmp_path / "whole")
    seconds = time.monotonic() - begin
    draw = random.Random(int(os.environ.get("SLIM_KILLS_SEED", "0")))
    stores = [tmp_path / "killed-0"]
    ended = []
    while len(ended) < KILLS:
        sent = (signal.SIGKILL, signal.SIGTERM)[len(ended) % 2]
        process = start(stores[-1], *CHAIN)
        moment = draw.uniform(0.05, 0.5) * seconds  # short enough for several ends in one chain
        try:
            process.communicate(timeout=moment)
        except subprocess.TimeoutExpired:
            process.send_signal(sent)
            _, err = process.communicate(timeout=300)
            ended.append((sent.name, process.returncode))
            stages = sorted(path.name for path in stores[-1].glob("stages/*"))
            print(f"{sent.name} after {moment:.1f} s -> {process.returncode}; on disk: {stages}")
            assert "Traceback" not in err, err
            # 0 where the signal came when all was done
            assert process.returncode in (0, -signal.SIGKILL, 128 + signal.SIGTERM), err
        else:  # the chain is complete: begin another one
            stores.append(tmp_path / f"killed-{len(stores)}")
    print(f"{seconds:.0f} s for the whole chain; {len(ended)} ends in {len(stores)} chains")
    for store in stores:
        finish(store)
        assert quality(store) == quality(tmp_path / "whole")
        assert not list(store.glob("stages/*.partial"))
        assert not list(store.glob("stages/*.work"))
        statuses = [run.info.status for run in runs(store)[1]]
        print(f"{store.name}: {quality(store)}, runs: {statuses}")
        assert "RUNNING" not in statuses, statuses

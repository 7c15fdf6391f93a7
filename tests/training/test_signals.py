"""SIGTERM and Ctrl-C while a model trains: the state is saved where that is asked for, whoever
handled the signal before gets it, and the same command gives the same weights."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from slim.checkpoints.checkpoint import checksums
from slim.checkpoints.stage import Context
from slim.data.examples import TinyText
from slim.training.tune import Full, Lora
from tests.conftest import ROOT, build_small

QUICK = {
    "data": TinyText(),
    "steps": 6,
    "window": 64,
    "batch_tokens": 256,
    "validate_every": 2,
    "validation_tokens": 256,
    "learning_rate": 0.01,
}


class Terminated(KeyboardInterrupt):
    """As the commands raise it on SIGTERM."""


def raise_terminated(signum, frame) -> None:
    raise Terminated


def raise_exit(signum, frame) -> None:
    raise SystemExit(143)


@pytest.fixture(scope="module")
def little(tmp_path_factory):
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    return build_small("llama", tmp_path_factory.mktemp("little") / "llama", **sizes)


@pytest.fixture
def handler():
    """Let a test set a handler of SIGTERM."""
    before = signal.getsignal(signal.SIGTERM)
    yield lambda function: signal.signal(signal.SIGTERM, function)
    signal.signal(signal.SIGTERM, before)


def run(stage, source, target, resume_dir=None, metric=lambda *_: None) -> None:
    target.mkdir()
    stage.run(source, target, Context("cpu", resume_dir, metric))


def sends(kind: int, at: int, times: int = 1):
    """Return a metric that sends a signal to this process when the loss of a step is recorded."""

    def metric(name, value, step=None) -> None:
        if name == "train_loss" and step == at:
            for _ in range(times):
                os.kill(os.getpid(), kind)

    return metric


STAGES = {
    "lora": Lora(**QUICK),
    "full, two parts per step": Full(**QUICK, accumulation=2),
}


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize(
    ("function", "error"), [(raise_terminated, Terminated), (raise_exit, SystemExit)]
)
def test_a_terminated_training_is_saved_and_resumes_to_the_same_weights(
    little, tmp_path, handler, capfd, stage, function, error
):
    handler(function)
    run(STAGES[stage], little, tmp_path / "whole")
    work = tmp_path / "work"
    with pytest.raises(error):
        run(STAGES[stage], little, tmp_path / "ended", work, sends(signal.SIGTERM, 3))
    assert sorted(path.name for path in work.iterdir()) == ["step-3.training", "training.json"]
    run(STAGES[stage], little, tmp_path / "again", work)
    assert "Resuming after step 3" in capfd.readouterr().err
    assert checksums(tmp_path / "again") == checksums(tmp_path / "whole")


def test_a_terminated_training_ends_where_nothing_is_saved(little, tmp_path, handler):
    handler(raise_terminated)
    steps: list[int] = []

    def metric(name, value, step=None) -> None:
        if name == "train_loss":
            steps.append(step)
            sends(signal.SIGTERM, 3)(name, value, step)

    with pytest.raises(Terminated):
        run(Lora(**QUICK), little, tmp_path / "ended", None, metric)
    assert steps == [1, 2, 3]


def test_sigterm_in_the_last_step_ends_the_run_too(little, tmp_path, handler):
    handler(raise_terminated)
    with pytest.raises(Terminated):
        run(Lora(**QUICK), little, tmp_path / "ended", None, sends(signal.SIGTERM, 6))


def test_a_second_sigterm_does_not_wait(little, tmp_path, handler):
    """The state of the step before may be old, but who asks twice wants to go."""
    handler(raise_terminated)
    work = tmp_path / "work"
    with pytest.raises(Terminated):
        run(Lora(**QUICK), little, tmp_path / "ended", work, sends(signal.SIGTERM, 3, times=2))
    assert not work.exists()


@pytest.mark.parametrize("at", [0, 3])
def test_handlers_are_those_from_before_after_a_training(little, tmp_path, handler, at):
    handler(raise_terminated)
    interrupt = signal.getsignal(signal.SIGINT)
    try:
        run(Lora(**QUICK), little, tmp_path / "out", None, sends(signal.SIGTERM, at))
    except Terminated:
        assert at
    assert signal.getsignal(signal.SIGTERM) is raise_terminated
    assert signal.getsignal(signal.SIGINT) is interrupt


def test_ctrl_c_is_a_keyboard_interrupt(little, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        run(Lora(**QUICK), little, tmp_path / "out", None, sends(signal.SIGINT, 2))
    assert signal.getsignal(signal.SIGINT) is not signal.SIG_IGN


def test_without_a_handler_the_process_ends_by_the_signal_without_a_traceback(little, tmp_path):
    code = f"""
import os, signal
from pathlib import Path
from tests.training.test_signals import QUICK, Lora, run, sends
run(Lora(**QUICK), Path({str(little)!r}), Path({str(tmp_path / "out")!r}),
    Path({str(tmp_path / "work")!r}), sends(signal.SIGTERM, 2))
"""
    ended = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=250
    )
    assert ended.returncode == -signal.SIGTERM
    assert "Traceback" not in ended.stderr
    assert (tmp_path / "work" / "step-2.training").is_file()

"""Several processes on one machine, started by torchrun as a user would: the same training as one
process gives."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from slim.checkpoints.checkpoint import checksums, open_checkpoint
from slim.checkpoints.reader import TensorReader
from tests.conftest import ROOT

pytestmark = pytest.mark.slow
SETTINGS = [
    "model=tiny", "eval=none", "data=tiny_chat", "tuner.steps=12", "tuner.window=64", "tuner.batch_tokens=256",
    "tuner.accumulation=2", "tuner.validate_every=4", "tuner.validation_tokens=1000", "tuner.clip=0.05",
    "tuner.learning_rate=0.001",
]  # fmt: skip
SAVE_OFTEN = "import slim.training.resume as resume; resume.SAVE_SECONDS, resume.SHARE = 0.0, 1e9;"
needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None,
    reason="DeepSpeed is not installed: pip install 'slim[deepspeed]'",
)

SHARDED = [
    "fsdp",
    *(
        pytest.param(f"deepspeed_{stage}", marks=needs_deepspeed)
        for stage in ("zero2", "zero3", "zero3_offload")
    ),
]


def start(store: Path, *settings: str, processes: int = 2, before: str = "") -> subprocess.Popen:
    """Start ``train.py`` with ``settings``; ``before`` is Python to run in every process first."""
    script = store.parent / f"{store.name}.py"
    script.write_text(
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{before}\n"
        "from slim.cli.launch import launch\nfrom slim.cli.execute import execute\nlaunch('train', lambda config: execute(config) and None)\n"
    )
    torchrun = (
        ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
        if processes > 1
        else []
    )
    command = [sys.executable, *torchrun, str(script), *SETTINGS, *settings, f"store={store}"]
    pipe = subprocess.PIPE
    env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.Popen(command, cwd=ROOT, env=env, stdout=pipe, stderr=pipe, text=True)


def finish(process: subprocess.Popen) -> tuple[str, str]:
    out, err = process.communicate(timeout=900)
    assert process.returncode == 0, err[-4000:]
    return out, err


def result(store: Path) -> Path:
    (folder,) = store.glob("stages/[td]*-*[0-9a-f]")
    return folder


def curves(store: Path) -> tuple[list[float], list[float]]:
    found = json.loads((result(store) / "report" / "loss.json").read_text())
    return [point["loss"] for point in found["train"]], [
        point["loss"] for point in found["validation"]
    ]


def assert_same_training(one: Path, other: Path, tolerance: float = 1e-4) -> None:
    for mine, theirs in zip(curves(one), curves(other), strict=True):
        assert len(mine) >= 4 and mine == pytest.approx(theirs, rel=tolerance)
    readers = [TensorReader(open_checkpoint(result(store))) for store in (one, other)]
    for name in readers[0].checkpoint.tensors:
        first, second = (reader.read(name).float() for reader in readers)
        assert (first - second).norm() <= 0.01 * first.norm(), name


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> Path:
    """The store of one process."""
    store = tmp_path_factory.mktemp("alone") / "store"
    finish(start(store, processes=1))
    return store


def test_two_processes_give_the_curve_of_one(alone, tmp_path):
    """The whole chain, pruning before and quantisation behind the training included, is run and
    tracked once."""
    out, err = finish(start(tmp_path / "store", "trainer=ddp"))
    assert_same_training(alone, tmp_path / "store")
    assert out.count("final checkpoint") == 1 and "Traceback" not in err

    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{tmp_path / 'store' / 'mlflow.db'}")
    (experiment,) = client.search_experiments(filter_string="name = 'slim'")
    names = [
        found.data.tags["mlflow.runName"]
        for found in client.search_runs([experiment.experiment_id])
    ]
    assert len(names) == 3 and "tune lora" in names  # the run, its source and its stage


@pytest.mark.parametrize("trainer", SHARDED)
@pytest.mark.parametrize("tuner", ["lora", "full"])
def test_sharded_training_gives_the_curve_of_one_process(alone, tmp_path, trainer, tuner):
    if tuner == "full":
        finish(start(tmp_path / "alone", "tuner=full", processes=1))
        alone = tmp_path / "alone"
    finish(start(tmp_path / "store", f"trainer={trainer}", f"tuner={tuner}"))
    assert_same_training(alone, tmp_path / "store")


@pytest.mark.parametrize(
    "trainer", ["ddp", "fsdp", pytest.param("deepspeed_zero3", marks=needs_deepspeed)]
)
def test_a_student_and_its_teacher_in_two_processes(tmp_path, trainer):
    settings = ("teacher=base", "teacher.stage=tune", "pruner=magnitude")
    finish(start(tmp_path / "alone", *settings, processes=1))
    finish(start(tmp_path / "store", *settings, f"trainer={trainer}"))
    assert_same_training(tmp_path / "alone", tmp_path / "store")


@pytest.mark.parametrize("trainer", ["ddp", *SHARDED])
def test_two_processes_killed_during_training_go_on(tmp_path, trainer):
    settings = (f"trainer={trainer}", "tuner.steps=40")
    finish(start(tmp_path / "whole", *settings))
    process = start(tmp_path / "killed", *settings, before=SAVE_OFTEN)
    while not list((tmp_path / "killed").glob("stages/*.work/step-1?.training")):
        assert process.poll() is None, process.communicate()[1][-4000:]
        time.sleep(0.01)
    for child in children(process.pid):
        os.kill(child, signal.SIGKILL)
    process.communicate()
    _, err = finish(start(tmp_path / "killed", *settings))
    assert err.count("Resuming after step") == 1
    assert checksums(result(tmp_path / "killed")) == checksums(result(tmp_path / "whole"))


def children(process: int) -> list[int]:
    return [
        int(number)
        for number in Path(f"/proc/{process}/task/{process}/children").read_text().split()
    ]


def test_a_loss_that_is_not_finite_in_one_process_ends_all(tmp_path):
    spoil = (
        "import os; from slim.training.module import LanguageModelling as L; honest, seen = L.nll, iter(range(1000))\n"
        "L.nll = lambda self, batch: honest(self, batch) * ("
        "float('nan') if self.model.training and os.environ['RANK'] == '1' and next(seen) == 13 else 1)\n"
    )
    _, err = finish(start(tmp_path / "store", "trainer=ddp", before=spoil))
    assert "The loss is nan at step 7, in windows" in " ".join(err.split())
    assert (
        json.loads((result(tmp_path / "store") / "slim.json").read_text())["facts"]["best_step"]
        == 4
    )


def test_a_mistake_is_said_once(tmp_path):
    process = start(tmp_path / "store", "trainer=ddp", "tuner.r=0")
    _, err = process.communicate(timeout=120)
    assert process.returncode != 0 and err.count("slim: tuner.r=0: must be") == 1

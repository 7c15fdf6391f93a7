"""The training loop: going on after an interruption, early stop, precision, settings of the
trainer."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from slim.checkpoints.checkpoint import checksums, open_checkpoint
from slim.checkpoints.stage import Context
from slim.checkpoints.tokenizer import load_tokenizer
from slim.core import processes
from slim.core.errors import SlimError
from slim.data.examples import TinyChat, TinyText
from slim.training import distributed, resume
from slim.training.trainer_settings import TrainerSettings
from slim.training.tune import Full, Lora
from tests.conftest import ROOT, build_small

QUICK = dict(
    steps=6,
    window=64,
    batch_tokens=256,
    validate_every=2,
    validation_tokens=512,
    learning_rate=0.01,
)


class Killed(BaseException):
    """Stands for the end of the process."""


@pytest.fixture(scope="module")
def little(tmp_path_factory, small_llama) -> Path:
    """A random Llama of two narrow blocks, with the vocabulary of its tokenizer."""
    folder = tmp_path_factory.mktemp("little") / "llama"
    sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2)
    return build_small("llama", folder, vocab_size=len(load_tokenizer(small_llama)), **sizes)


def run(
    stage, source: Path, target: Path, work: Path | None = None, metric=lambda *_: None
) -> dict:
    target.mkdir(parents=True)
    stage.check(open_checkpoint(source).spec)
    return stage.run(source, target, Context(resume_dir=work, metric=metric))


def save_always(monkeypatch) -> None:
    """Save behind every step, whatever the time."""
    monkeypatch.setattr(resume, "SAVE_SECONDS", 0.0)
    monkeypatch.setattr(resume, "SHARE", 1e9)


def killed_after(points: int, recorded: list):
    """Return a metric that records, and ends everything once it has been called ``points``
    times."""

    def metric(*point):
        recorded.append(point)
        if len(recorded) == points:
            raise Killed

    return metric


def curves(recorded: list) -> list:
    return [point for point in recorded if point[0] != "tokens_per_second"]


@pytest.mark.parametrize(
    "stage",
    [
        Lora(data=TinyChat(), **QUICK, dropout=0.2, accumulation=2),
        Full(data=TinyText(), **QUICK, schedule="linear", weight_decay=0.1),
        Full(
            data=TinyText(), **QUICK, optimizer="sgd", trainer=TrainerSettings(precision="16-mixed")
        ),
    ],
)
def test_an_interrupted_training_goes_on_to_the_same_weights(
    little, tmp_path, monkeypatch, capfd, stage
):
    """Killed when step 5 is recorded, with step 4 saved: batches, dropout, moments, rate, scale and
    best state go on."""
    save_always(monkeypatch)
    whole: list = []
    facts = run(stage, little, tmp_path / "whole", metric=lambda *point: whole.append(point))

    first: list = []
    points = [
        number
        for number, point in enumerate(whole, 1)
        if point[0] == "train_loss" and point[2] == 5
    ][0]
    with pytest.raises(Killed):
        run(stage, little, tmp_path / "killed", tmp_path / "work", killed_after(points, first))
    saved = sorted(path.name for path in (tmp_path / "work").iterdir())
    assert saved == ["step-4.training", "training.json"]

    torch.manual_seed(99)  # what happened before must not matter
    second: list = []
    again = run(
        stage, little, tmp_path / "again", tmp_path / "work", lambda *point: second.append(point)
    )
    assert "Resuming after step 4" in capfd.readouterr().err
    assert checksums(tmp_path / "again") == checksums(tmp_path / "whole")
    assert curves(second) == curves(whole)
    assert again.pop("tokens_per_second") and facts.pop("tokens_per_second")
    assert again == facts


def test_only_what_trains_is_saved(little, tmp_path, monkeypatch):
    from safetensors.torch import load_file

    save_always(monkeypatch)
    stage = Lora(data=TinyText(), **QUICK, targets=["q_proj"])
    with pytest.raises(Killed):
        run(stage, little, tmp_path / "out", tmp_path / "work", killed_after(9, []))
    tensors = load_file(next((tmp_path / "work").glob("*.training")))
    kept = {name for name in tensors if name.startswith("parameter.")}
    assert len(kept) == 4 and all("lora_" in name for name in kept)
    assert {name.split(".")[0] for name in tensors} == {"parameter", "best", "optimiser", "random"}


def test_a_state_of_other_versions_or_precision_is_not_used(little, tmp_path, monkeypatch, capfd):
    save_always(monkeypatch)
    stage = Lora(data=TinyText(), **QUICK)
    with pytest.raises(Killed):
        run(stage, little, tmp_path / "out", tmp_path / "work", killed_after(14, []))
    record = tmp_path / "work" / "training.json"
    saved = json.loads(record.read_text())
    saved["setting"]["versions"]["torch"] = "1.0"
    record.write_text(json.dumps(saved))
    run(stage, little, tmp_path / "again", tmp_path / "work")
    assert "Resuming" not in capfd.readouterr().err


def test_saving_takes_a_small_share_of_the_time(monkeypatch):
    """After a save of 10 s the next comes 200 s later at the earliest: a share of 5 %."""
    from types import SimpleNamespace

    clock = iter([0.0, 100.0, 100.0, 110.0, 300.0, 311.0, 311.0, 321.0])
    monkeypatch.setattr(resume, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    monkeypatch.setattr(resume, "training_state", lambda *_: ({}, {}))
    written = []
    keeper = resume.StateSaver(
        SimpleNamespace(write=lambda *_: written.append(1)), None, None, None
    )
    trainer = SimpleNamespace(global_step=1, accumulate_grad_batches=1)
    module = SimpleNamespace(optimisation=SimpleNamespace(steps=10))
    for expected in (1, 1, 2):  # at 100 s, at 300 s, at 311 s
        keeper.on_train_batch_end(trainer, module, None, None, 0)
        assert len(written) == expected


# Early stop, failures


def test_training_ends_when_it_stops_helping(little, tmp_path, monkeypatch):
    from slim.training import callbacks

    made_up = iter([30.0, 20.0, 25.0, 22.0, 21.0])
    monkeypatch.setattr(callbacks, "mean_nll", lambda *_: next(made_up))
    facts = run(
        Full(data=TinyText(), **{**QUICK, "steps": 20}, patience=2), little, tmp_path / "out"
    )
    assert facts["stopped"] == "No better for 2 validations, at step 6"
    assert facts["best_step"] == 2 and facts["tokens_seen"] == 6 * 256
    seen = json.loads((tmp_path / "out" / "report" / "loss.json").read_text())
    assert seen["train"][-1]["step"] == 6 and [point["step"] for point in seen["validation"]] == [
        0,
        2,
        4,
        6,
    ]


def test_the_windows_of_a_loss_that_is_not_finite_are_named(little, tmp_path, monkeypatch):
    from slim.training.batches import window_order
    from slim.training.module import LanguageModeling

    honest, calls = LanguageModeling.nll, iter(range(100))
    monkeypatch.setattr(
        LanguageModeling,
        "nll",
        lambda self, batch: honest(self, batch) * (float("inf") if next(calls) == 2 else 1),
    )
    stage = Lora(data=TinyText(), **QUICK)
    facts = run(stage, little, tmp_path / "out")
    count = len(stage.data.windows("train", load_tokenizer(little), 64, 6 * 256))
    bad = ", ".join(str(number) for number in window_order(count, 24, 0)[8:12].tolist())
    assert facts["stopped"] == f"The loss is inf at step 3, in windows {bad} of the training data"
    assert facts["best_step"] == 2


# Precision


@pytest.mark.parametrize("tuner", [Lora, Full])
def test_float16_with_a_scaled_loss_trains_nearly_the_same(little, tmp_path, tuner):
    """Clipping must see gradients without the scale, 65536 at first: else nothing moves."""
    losses = {}
    for precision in ("32-true", "16-mixed"):
        stage = tuner(
            data=TinyText(), **QUICK, clip=0.5, trainer=TrainerSettings(precision=precision)
        )
        losses[precision] = run(stage, little, tmp_path / precision)["validation_loss_after"]
    assert losses["32-true"] != losses["16-mixed"]
    assert losses["32-true"] == pytest.approx(losses["16-mixed"], rel=0.01)


def test_autocast_is_that_of_the_training():
    from slim.training.fit import autocast

    for precision, dtype in (
        ("32-true", torch.float32),
        ("bf16-mixed", torch.bfloat16),
        ("16-mixed", torch.float16),
    ):
        with autocast("cpu", precision)():
            assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype is dtype


# Settings


def launch(monkeypatch, rank: int, world: int) -> None:
    """Let this process look as if torchrun had started it."""
    for name, value in {"TORCHELASTIC_RUN_ID": "x", "RANK": rank, "LOCAL_RANK": rank}.items():
        monkeypatch.setenv(name, str(value))
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.setenv(name, str(world))


def test_trainers_that_cannot_be_are_refused(little, monkeypatch):
    import importlib.util

    spec = open_checkpoint(little).spec
    with pytest.raises(SlimError, match="trainer.strategy=dpp: must be.*Did you mean ddp"):
        TrainerSettings(strategy="dpp")
    with pytest.raises(
        SlimError, match="fsdp does not scale losses. Use trainer.precision=bf16-mixed"
    ):
        TrainerSettings(strategy="fsdp", precision="16-mixed")
    for strategy in ("ddp", "fsdp"):
        with pytest.raises(SlimError, match="Start them: torchrun --nproc_per_node 2"):
            Lora(data=TinyText(), trainer=TrainerSettings(strategy=strategy)).check(spec)
    honest = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *rest: None if name == "deepspeed" else honest(name, *rest),
    )
    with pytest.raises(
        SlimError, match=r"needs DeepSpeed. Install it: pip install 'slim\[deepspeed\]'"
    ):
        Lora(data=TinyText(), trainer=TrainerSettings(strategy="deepspeed_zero2")).check(spec)
    launch(monkeypatch, 0, 3)
    with pytest.raises(
        SlimError,
        match="3 processes cannot share 4 windows per micro-batch. Make tuner.batch_tokens larger",
    ):
        Lora(data=TinyText()).check(spec)


def test_several_processes_mean_ddp_unless_said_otherwise(monkeypatch):
    assert (
        TrainerSettings().resolved_strategy == "auto"
        and processes.is_main_process()
        and processes.world_size() == 1
    )
    launch(monkeypatch, 1, 2)
    assert TrainerSettings().resolved_strategy == "ddp" and not processes.is_main_process()
    assert (
        TrainerSettings(strategy="fsdp").resolved_strategy == "fsdp"
        and TrainerSettings(strategy="fsdp").sharded
    )
    assert not TrainerSettings().sharded


def test_processes_share_rows_and_batches(monkeypatch):
    from slim.data.packing import IGNORE

    tokens = torch.arange(12).view(4, 3)
    batches = [{"tokens": tokens + n, "labels": tokens + n, "loss_tokens": 8} for n in range(3)]
    rows, held_out = [], []
    for rank in range(2):
        launch(monkeypatch, rank, 2)
        mine = distributed.rows_of(batches[0])
        assert mine["loss_tokens"] == 8 and torch.equal(mine["tokens"], mine["labels"])
        rows.append(mine["tokens"])
        held_out.append(distributed.shares(batches))
    assert sorted(torch.cat(rows).flatten().tolist()) == list(range(12))
    assert len(held_out[0]) == len(held_out[1]) == 2
    counted = [
        batch["tokens"][0, 0].item()
        for part in held_out
        for batch in part
        if (batch["labels"] != IGNORE).any()
    ]
    assert sorted(counted) == [0, 1, 2]


# The whole command


@pytest.mark.slow
def test_a_command_killed_during_training_goes_on_to_the_same_weights(tmp_path):
    """``kill -9`` while the command trains; typed again, it gives the file that an uninterrupted
    one gives."""
    code = (
        "import sys, slim.training.resume as resume; resume.SAVE_SECONDS, resume.SHARE = 0.0, 1e9;"
        "from slim.cli.launch import launch; from slim.cli.execute import execute;"
        "launch('train', lambda config: execute(config) and None)"
    )
    settings = [
        "tuner.steps=60",
        "tuner.window=64",
        "tuner.batch_tokens=256",
        "tuner.validate_every=10",
        "eval=none",
    ]

    def start(store: str) -> subprocess.Popen:
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-c", code, *settings, f"store={tmp_path / store}"]
        return subprocess.Popen(
            command, cwd=ROOT, env=env, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
        )

    def step(store: str) -> int:
        found = list((tmp_path / store).glob("stages/*.work/step-*.training"))
        return max((int(path.stem.split("-")[1]) for path in found), default=0)

    def weights(store: str) -> dict:
        return checksums(next((tmp_path / store / "stages").glob("tune-*[0-9a-f]")))

    assert start("whole").wait() == 0
    process = start("killed")
    while step("killed") < 15:
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    process = start("killed")
    assert "Resuming after step" in process.communicate()[1] and process.returncode == 0
    assert weights("killed") == weights("whole")
    assert not list((tmp_path / "killed" / "stages").glob("*.work"))

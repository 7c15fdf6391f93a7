"""Resuming a training that was interrupted: what is saved of it, how often, and how it is put back.

Saved are the parameters that train, the optimiser's and the schedule's state, the random
generator's, the best state so far and the curves. Of the data the number of the step is enough:
micro-batches have a fixed order. Tensors are a safetensors file and the rest is JSON, written last
and renamed into place, so that a killed process leaves the old or the new state. Under DeepSpeed
every process also has a file of its own, with its part of the optimiser.
"""

from __future__ import annotations

import json
import time
from pathlib import Path

import lightning.pytorch as pl
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from slim.core import processes
from slim.core.console import say
from slim.core.hardware import versions
from slim.core.io import save_tensors, write_json
from slim.training import distributed
from slim.training.callbacks import Outcome, Record, Report, trained_state
from slim.training.zero_state import is_partitioned, own_state, restore_own_state

SAVE_SECONDS = 20.0  # between two saves, at least
SHARE = 0.05  # of the time may go into saving, at most


class SavedTraining:
    """The saved state of one training in a folder."""

    def __init__(self, folder: Path, setting: dict):
        """Name the state.

        Args:
            folder: Where it lies; made with the first save.
            setting: What must be the same for the results to be the same, as plain JSON values.
        """
        self.folder = folder
        self.setting = {"versions": versions(), **setting}

    @property
    def _record(self) -> Path:
        return self.folder / "training.json"

    def _part(self, step: int) -> Path:
        return self.folder / f"step-{step}.part-{processes.rank()}.training"

    def read(self) -> dict | None:
        """Return the saved record with its ``tensors``, or None where none fits."""
        if not self._record.is_file():
            return None
        record = json.loads(self._record.read_text(encoding="utf-8"))
        if record["setting"] != self.setting:
            return None
        tensors = load_file(self.folder / record["file"])
        if record.get("parts"):
            tensors |= load_file(self._part(record["step"]))
        return {**record, "tensors": tensors}

    def write(self, record: dict, tensors: dict[str, Tensor], part: dict[str, Tensor]) -> None:
        """Replace what is saved, at once or not at all. All processes call this.

        Args:
            record: Plain JSON values.
            tensors: What is the same in every process, by name.
            part: What every process has of its own, by name; empty where nothing is split.
        """
        if part:
            self.folder.mkdir(parents=True, exist_ok=True)
            save_tensors(part, self._part(record["step"]))
            # The record must not name parts that are not there yet.
            distributed.sum_over_processes(torch.zeros(1))
        if not processes.is_main_process():
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        file = self.folder / f"step-{record['step']}.training"
        save_tensors(tensors, file)
        record = {**record, "setting": self.setting, "file": file.name, "parts": bool(part)}
        write_json(self._record, record)
        for old in self.folder.glob("step-*.training"):
            if not old.name.startswith(f"{file.stem}."):
                old.unlink()


class StateSaver(pl.Callback):
    """Saves the state of a training from time to time, and puts back what was saved."""

    def __init__(self, saved: SavedTraining, record: dict | None, outcome: Outcome, report: Report):
        """Begin to count the time.

        Args:
            saved: Where the state goes.
            record: What :meth:`SavedTraining.read` gave.
            outcome: What the training has given so far.
            report: The callback that records the curve; its unfinished point is saved too.
        """
        self.saved = saved
        self.record = record
        self.outcome = outcome
        self.report = report
        self.wait = SAVE_SECONDS
        self.last = time.monotonic()

    def on_train_start(self, trainer, module) -> None:
        if self.record is None:
            return
        restore_training(self.record, trainer, module, self.report)
        step = self.record["step"]
        say(f"Resuming after step {step}, where an earlier run was interrupted.")
        self.record = None  # its tensors are no longer needed
        self.last = time.monotonic()

    def on_train_batch_end(self, trainer, module, outputs, batch, index) -> None:
        whole_step = (index + 1) % trainer.accumulate_grad_batches == 0
        if not whole_step or trainer.global_step >= module.optimisation.steps or not self.due():
            return
        begin = time.monotonic()
        self.save(trainer, module)
        self.last = time.monotonic()
        self.wait = max(SAVE_SECONDS, (self.last - begin) / SHARE)

    def save(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Save the state after a whole step.

        Args:
            trainer: Lightning's trainer.
            module: What is trained.
        """
        self.saved.write(*training_state(trainer, module, self.report, self.outcome))

    def due(self) -> bool:
        """Whether it is time to save: one process decides, since sharded states are gathered by
        all."""
        return processes.broadcast_flag(time.monotonic() - self.last >= self.wait)


# The state


def training_state(
    trainer: pl.Trainer, module: pl.LightningModule, report: Report, outcome: Outcome
) -> tuple[dict, dict[str, Tensor], dict[str, Tensor]]:
    """Return what is needed to resume after the current step.

    Args:
        trainer: Lightning's trainer.
        module: What is trained.
        report: The callback that records the curve.
        outcome: What the training has given so far.

    Returns:
        Plain JSON values, tensors on the CPU by name, and this process' part of parameters and
        optimiser by name under DeepSpeed, else nothing.
    """
    optimizer = trainer.optimizers[0]
    part: dict[str, Tensor] = {}
    if is_partitioned(optimizer):
        moments, flat = own_state(optimizer)
        plain, part = optimiser_state(moments)
        for number, parameters in enumerate(flat):
            part[f"flat.{number}"] = parameters.to("cpu", copy=True)
        tensors: dict[str, Tensor] = {}
    else:
        plain, tensors = optimiser_state(optimizer.state_dict())
        tensors |= {f"parameter.{name}": value for name, value in trained_state(module).items()}
    tensors |= {f"best.{name}": value for name, value in (outcome.best_state or {}).items()}
    tensors["random.cpu"] = torch.get_rng_state()
    if module.device.type == "cuda":
        tensors["random.cuda"] = torch.cuda.get_rng_state(module.device)
    record = {
        "step": trainer.global_step,
        "outcome": outcome.state(),
        "seen": report.seen.state(),
        "optimiser": plain,
        "schedule": trainer.lr_scheduler_configs[0].scheduler.state_dict(),
        "scaler": trainer.strategy.precision_plugin.state_dict(),
    }
    return record, contiguous(tensors), contiguous(part)


def contiguous(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors as safetensors takes them.

    Args:
        tensors: Of any layout, by name.
    """
    return {name: tensor.contiguous() for name, tensor in tensors.items()}


def optimiser_state(state: dict) -> tuple[dict, dict[str, Tensor]]:
    """Split an optimiser's state dictionary into what JSON takes and tensors.

    Args:
        state: As torch's optimisers give it.

    Returns:
        ``{"state": number of the parameter -> plain values, "groups": parameter groups}``, and the
        tensors, whole and on the CPU, by ``optimiser.<number of the parameter>.<name>``.
    """
    plain: dict[str, dict] = {}
    tensors: dict[str, Tensor] = {}
    for number, values in state["state"].items():
        plain[str(number)] = {}
        for name, value in values.items():
            if isinstance(value, Tensor):
                gathered = distributed.gather_full(value).detach()
                tensors[f"optimiser.{number}.{name}"] = gathered.to("cpu", copy=True)
            else:
                plain[str(number)][name] = value
    return {"state": plain, "groups": state["param_groups"]}, tensors


def resumed_outcome(record: dict) -> Outcome:
    """Return what the interrupted training had given so far.

    Args:
        record: What :meth:`SavedTraining.read` gave.
    """
    return Outcome.resumed(record["outcome"], without_prefix(record["tensors"], "best.") or None)


def without_prefix(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Return the tensors whose names begin with a prefix, by what follows it.

    Args:
        tensors: By name.
        prefix: What the names begin with.
    """
    return {
        name.removeprefix(prefix): value
        for name, value in tensors.items()
        if name.startswith(prefix)
    }


def restore_training(record: dict, trainer: pl.Trainer, module: nn.Module, report: Report) -> None:
    """Bring a training that is about to take its first step to where its record was made.

    Args:
        record: What :meth:`SavedTraining.read` gave.
        trainer: Lightning's trainer.
        module: What is trained.
        report: The callback that records the curve.
    """
    tensors, step = record["tensors"], record["step"]
    parameters = dict(module.named_parameters())
    with torch.no_grad():
        for name, value in without_prefix(tensors, "parameter.").items():
            distributed.copy_full(parameters[name], value)
    restore_optimiser(trainer.optimizers[0], record["optimiser"], tensors)
    trainer.lr_scheduler_configs[0].scheduler.load_state_dict(record["schedule"])
    trainer.strategy.precision_plugin.load_state_dict(record["scaler"])
    report.seen = Record(**record["seen"])
    progress = (
        trainer.fit_loop.epoch_loop.automatic_optimization.optim_progress.optimizer.step.total
    )
    progress.ready = progress.completed = step  # what Lightning calls the global step
    torch.set_rng_state(tensors["random.cpu"])
    if "random.cuda" in tensors and module.device.type == "cuda":
        torch.cuda.set_rng_state(tensors["random.cuda"], module.device)


def restore_optimiser(
    optimizer: torch.optim.Optimizer, plain: dict, tensors: dict[str, Tensor]
) -> None:
    """Put back what :func:`optimiser_state` gave.

    Args:
        optimizer: The new optimiser over the same parameters.
        plain: The JSON values, read again: tuples have become lists, numbers as keys texts.
        tensors: All saved tensors by name.
    """
    partitioned = is_partitioned(optimizer)
    inner = optimizer.optimizer if partitioned else optimizer
    parameters = [parameter for group in inner.param_groups for parameter in group["params"]]
    state = {int(number): dict(values) for number, values in plain["state"].items()}
    for name, value in without_prefix(tensors, "optimiser.").items():
        number, key = name.split(".", 1)
        if not partitioned:
            value = distributed.shard_like(value, parameters[int(number)])
        state[int(number)][key] = value
    groups = [
        with_tuples(saved, group)
        for group, saved in zip(inner.param_groups, plain["groups"], strict=True)
    ]
    moments = {"state": state, "param_groups": groups}
    if not partitioned:
        optimizer.load_state_dict(moments)
        return
    flat = without_prefix(tensors, "flat.")
    restore_own_state(optimizer, moments, [flat[str(number)] for number in range(len(flat))])


def with_tuples(saved: dict, group: dict) -> dict:
    """Return a saved parameter group with tuples where the optimiser has them.

    Args:
        saved: The group as JSON gives it.
        group: The optimiser's own.
    """
    result = dict(saved)
    for key, value in saved.items():
        if isinstance(group.get(key), tuple):
            result[key] = tuple(value)
    return result

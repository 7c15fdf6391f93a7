"""Going on with a training that was interrupted: what is saved of it, by time, and how it is taken
up.

Saved are the parameters that train, the optimiser's and the schedule's state, the random
generator's, the best state so far and the curves. Data needs nothing but the number of the step:
micro-batches have a fixed order. Tensors are a safetensors file and the rest is JSON, written last
and renamed into place, so that a killed process leaves the old or the new state. Under DeepSpeed
every process also has a file of its own, with its part of the optimiser."""

from __future__ import annotations

import json
import time
from pathlib import Path

import lightning.pytorch as pl
import torch
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
    """The saved state of one training in ``folder``. setting: what must be the same for the results
    to be the same."""

    def __init__(self, folder: Path, setting: dict):
        self.folder = folder
        self.setting = {"versions": versions(), **setting}

    @property
    def _record(self) -> Path:
        return self.folder / "training.json"

    def read(self) -> dict | None:
        """Return the saved record with its tensors, or None where there is none that can be used
        here."""
        if not self._record.is_file():
            return None
        record = json.loads(self._record.read_text(encoding="utf-8"))
        if record["setting"] != self.setting:
            return None
        from safetensors.torch import load_file

        mine = load_file(self._own(record["step"])) if record.get("parts") else {}
        return {**record, "tensors": {**load_file(self.folder / record["file"]), **mine}}

    def _own(self, step: int) -> Path:
        return self.folder / f"step-{step}.part-{processes.rank()}.training"

    def write(self, record: dict, tensors: dict[str, Tensor], mine: dict[str, Tensor]) -> None:
        """Replace what is saved, at once or not at all. mine: tensors that every process has of its
        own; all call this."""
        if mine:
            self.folder.mkdir(parents=True, exist_ok=True)
            save_tensors(mine, self._own(record["step"]))
            distributed.sum_over_processes(torch.zeros(1))  # no one goes on before all have written
        if not processes.is_main_process():
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        file = self.folder / f"step-{record['step']}.training"
        save_tensors(tensors, file)
        record = {**record, "setting": self.setting, "file": file.name, "parts": bool(mine)}
        write_json(self._record, record)
        for old in self.folder.glob("step-*.training"):
            if not old.name.startswith(f"{file.stem}."):
                old.unlink()


class StateSaver(pl.Callback):
    """Saves the state of a training from time to time, and puts back what was saved. The last of
    the callbacks.

    record: what :meth:`SavedTraining.read` found, or None.
    """

    def __init__(self, saved: SavedTraining, record: dict | None, outcome: Outcome, report: Report):
        self.saved, self.record, self.outcome, self.report = saved, record, outcome, report
        self.wait = SAVE_SECONDS
        self.last = time.monotonic()

    def on_train_start(self, trainer, module) -> None:
        if self.record is None:
            return
        step, self.record = (
            self.record["step"],
            restore_training(self.record, trainer, module, self.report),
        )
        say(f"Resuming after step {step}, where an earlier run was interrupted.")
        self.last = time.monotonic()

    def on_train_batch_end(self, trainer, module, outputs, batch, index) -> None:
        whole_step = (index + 1) % trainer.accumulate_grad_batches == 0
        if not whole_step or trainer.global_step >= module.optimisation.steps or not self.due():
            return
        begin = time.monotonic()
        self.saved.write(*training_state(trainer, module, self.report, self.outcome))
        self.last = time.monotonic()
        self.wait = max(SAVE_SECONDS, (self.last - begin) / SHARE)

    def due(self) -> bool:
        """Whether it is time to save: one process decides, since sharded states are gathered by
        all."""
        return processes.broadcast_flag(time.monotonic() - self.last >= self.wait)


# The state


def training_state(
    trainer, module, report: Report, outcome: Outcome
) -> tuple[dict, dict[str, Tensor], dict[str, Tensor]]:
    """Return what is needed to go on behind the current step: plain JSON values, and tensors on the
    CPU by name.

    The last is what other processes have otherwise: their part of parameters and optimiser under
    DeepSpeed, else nothing."""
    optimizer, mine, tensors = trainer.optimizers[0], {}, {}
    if is_partitioned(optimizer):
        state, flat = own_state(optimizer)
        plain, mine = optimiser_state(state)
        mine |= {f"flat.{number}": part.to("cpu", copy=True) for number, part in enumerate(flat)}
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
    contiguous = [
        {name: value.contiguous() for name, value in part.items()} for part in (tensors, mine)
    ]
    return record, *contiguous


def optimiser_state(state: dict) -> tuple[dict, dict[str, Tensor]]:
    """Return the groups and whatever is no tensor as JSON values, and the tensors by
    ``optimizer.<parameter>.<name>``.

    state: a state dictionary of torch's.
    """
    plain: dict[str, dict] = {}
    tensors: dict[str, Tensor] = {}
    for number, values in state["state"].items():
        plain[str(number)] = {
            name: value for name, value in values.items() if not isinstance(value, Tensor)
        }
        tensors |= {
            f"optimiser.{number}.{name}": distributed.gather_full(value)
            .detach()
            .to("cpu", copy=True)
            for name, value in values.items()
            if isinstance(value, Tensor)
        }
    return {"state": plain, "groups": state["param_groups"]}, tensors


def resumed_outcome(record: dict) -> Outcome:
    """Return what the interrupted training had given so far."""
    best = {
        name.removeprefix("best."): value
        for name, value in record["tensors"].items()
        if name.startswith("best.")
    }
    return Outcome.resumed(record["outcome"], best or None)


def restore_training(record: dict, trainer, module: nn.Module, report: Report) -> None:
    """Bring a training that is about to take its first step to where ``record`` was made."""
    tensors, step = record["tensors"], record["step"]
    parameters = dict(module.named_parameters())
    with torch.no_grad():
        for name, value in tensors.items():
            if name.startswith("parameter."):
                distributed.copy_full(parameters[name.removeprefix("parameter.")], value)
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
    """Put back what :func:`optimiser_state` gave; JSON has made lists of tuples and texts of
    numbers."""
    parts = is_partitioned(optimizer)
    inner = optimizer.optimizer if parts else optimizer
    state: dict[int, dict] = {
        int(number): dict(values) for number, values in plain["state"].items()
    }
    parameters = [parameter for group in inner.param_groups for parameter in group["params"]]
    for name, value in tensors.items():
        if name.startswith("optimiser."):
            _, number, key = name.split(".", 2)
            state[int(number)][key] = (
                value if parts else distributed.shard_like(value, parameters[int(number)])
            )
    groups = [
        {
            key: tuple(value) if isinstance(own.get(key), tuple) else value
            for key, value in saved.items()
        }
        for own, saved in zip(inner.param_groups, plain["groups"], strict=True)
    ]
    moments = {"state": state, "param_groups": groups}
    if parts:
        flat = [
            tensors[f"flat.{number}"]
            for number in range(sum(name.startswith("flat.") for name in tensors))
        ]
        restore_own_state(optimizer, moments, flat)
    else:
        optimizer.load_state_dict(moments)

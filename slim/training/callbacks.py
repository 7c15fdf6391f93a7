"""What watches a training: the curve and the progress bar, and validation, which keeps the best
state and may end it early."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field, fields

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from slim.core import processes
from slim.training import distributed
from slim.training.forward import mean_nll
from slim.training.module import LanguageModeling

RECORDS = 100  # points of the training curve, about
FASTEST = 1e-9  # seconds: a clock that has not moved must not divide by zero


@dataclass
class Outcome:
    """What a training gave.

    Attributes:
        train: Records of ``step``, ``loss``, ``learning_rate`` and ``tokens_per_second``.
        validation: Step -> loss in nats per token; step 0 is the untouched model.
        best_step: Where validation was best; 0 for the untouched model.
        best_state: The trained parameters there; None for the untouched model.
        tokens: Seen in training by all processes together, validation apart.
        seconds: Of training, validation apart.
        stopped: Why it ended early; None where it did not.
        curves: All points in the order in which they were recorded, as (name, value, step).
    """

    train: list[dict] = field(default_factory=list)
    validation: dict[int, float] = field(default_factory=dict)
    best_step: int = 0
    best_state: dict[str, Tensor] | None = None
    tokens: int = 0
    seconds: float = 0.0
    stopped: str | None = None
    curves: list[list] = field(default_factory=list)

    @property
    def before(self) -> float:
        """Validation loss of the untouched model."""
        return self.validation[0]

    @property
    def tokens_per_second(self) -> float:
        """Mean speed; 0 before the first record."""
        return self.tokens / self.seconds if self.seconds else 0.0

    def state(self) -> dict:
        """Return all but the tensors as plain JSON values."""
        names = [item.name for item in fields(self) if item.name != "best_state"]
        plain = {name: getattr(self, name) for name in names}
        return {**plain, "validation": list(self.validation.items())}

    @classmethod
    def resumed(cls, state: dict, best_state: dict[str, Tensor] | None) -> Outcome:
        """Return the outcome so far of an interrupted training.

        Args:
            state: What :meth:`state` gave, read from JSON.
            best_state: The best state so far.
        """
        validation = dict(state["validation"])
        return cls(**{**state, "validation": validation, "best_state": best_state})


@dataclass
class Record:
    """What has been seen since the last point of the curve.

    Attributes:
        losses: One per optimiser step, in nats per token.
        tokens: Of all processes.
        seconds: Of training.
    """

    losses: list[float] = field(default_factory=list)
    tokens: int = 0
    seconds: float = 0.0

    state = asdict


class Report(pl.Callback):
    """Records the training curve, hands it to the tracker and moves the progress bar."""

    def __init__(self, outcome: Outcome, steps: int, metric: Callable, advance: Callable):
        """Begin an empty record.

        Args:
            outcome: Takes the curve.
            steps: Of the whole training.
            metric: ``metric(name, value, step)`` takes a point of a curve.
            advance: ``advance(steps, text)`` moves the progress bar.
        """
        self.outcome = outcome
        self.steps = steps
        self.metric = metric
        self.advance = advance
        self.every = max(1, steps // RECORDS)
        self.started = 0.0
        self.seen = Record()

    def on_train_batch_start(self, trainer, module, batch, index) -> None:
        self.started = time.perf_counter()

    def on_train_batch_end(self, trainer, module, outputs, batch, index) -> None:
        seen, step = self.seen, trainer.global_step
        seen.seconds += time.perf_counter() - self.started
        seen.tokens += batch["tokens"].numel()  # of all processes: each takes its rows from it
        if (index + 1) % trainer.accumulate_grad_batches:
            return
        seen.losses.append(float(module.step_nll) / batch["loss_tokens"])
        speed = seen.tokens / max(seen.seconds, FASTEST)
        self.advance(1, f"loss {seen.losses[-1]:.3f}, {speed:,.0f} tokens/s")
        if step % self.every == 0 or step == self.steps:
            self.record(step, trainer.optimizers[0].param_groups[0]["lr"])

    def on_train_end(self, trainer, module) -> None:
        if self.seen.losses:  # stopped between two points
            self.record(trainer.global_step, trainer.optimizers[0].param_groups[0]["lr"])

    def record(self, step: int, rate: float) -> None:
        """Put down mean loss and speed since the last record.

        Args:
            step: The last one.
            rate: Its learning rate.
        """
        seen, self.seen = self.seen, Record()
        self.outcome.tokens += seen.tokens
        self.outcome.seconds += seen.seconds
        loss = sum(seen.losses) / len(seen.losses)
        speed = seen.tokens / max(seen.seconds, FASTEST)
        self.outcome.train.append(
            {"step": step, "loss": loss, "learning_rate": rate, "tokens_per_second": speed}
        )
        self.metric("train_loss", loss, step)
        self.metric("learning_rate", rate, step)
        self.metric("tokens_per_second", speed, step)


class Validation(pl.Callback):
    """Measures the validation loss before training, every few steps and at the end, and keeps the
    best state.

    Only trained parameters are kept, on the CPU; for the untouched state nothing, because the
    source still has it.
    """

    def __init__(
        self,
        outcome: Outcome,
        batches: list[dict],
        every: int,
        steps: int,
        metric: Callable,
        autocast: Callable[[], AbstractContextManager],
        patience: int = 0,
    ):
        """Measure nothing yet.

        Args:
            outcome: Takes losses and the best state.
            batches: To validate on.
            every: Steps between two validations.
            steps: Of the whole training.
            metric: ``metric(name, value, step)`` takes a point of a curve.
            autocast: Makes contexts with the precision of the training.
            patience: End the training after so many measurements in a row that were no better than
                the best; 0: never.
        """
        self.outcome = outcome
        self.batches = batches
        self.every = every
        self.steps = steps
        self.metric = metric
        self.autocast = autocast
        self.patience = patience

    def on_train_start(self, trainer, module) -> None:
        if not self.outcome.validation:  # a resumed training has measured before
            self.measure(module, 0)

    def on_train_batch_end(self, trainer, module, outputs, batch, index) -> None:
        step = trainer.global_step
        if step not in self.outcome.validation and (step % self.every == 0 or step == self.steps):
            self.measure(module, step)
            self.stop_early(trainer, step)

    def measure(self, module: LanguageModeling, step: int) -> None:
        """Measure the loss and keep the state if it is the best.

        Args:
            module: What is trained.
            step: After which it is measured.
        """
        with self.autocast():
            loss = self.loss(module)
        self.outcome.validation[step] = loss
        self.metric("validation_loss", loss, step)
        if loss < self.outcome.validation[self.outcome.best_step]:  # never true for NaN
            self.outcome.best_step = step
            self.outcome.best_state = trained_state(module.model)

    def loss(self, module: LanguageModeling) -> float:
        """Return the validation loss, in nats per token.

        Args:
            module: What is trained.
        """
        if processes.world_size() == 1:
            return mean_nll(module.model, self.batches, module.device)
        return distributed.mean_nll(module, self.batches)

    def stop_early(self, trainer: pl.Trainer, step: int) -> None:
        """End the training where the patience is over.

        Args:
            trainer: Lightning's trainer.
            step: The last one.
        """
        worse = sum(measured > self.outcome.best_step for measured in self.outcome.validation)
        if self.patience and worse >= self.patience and step < self.steps:
            self.outcome.stopped = f"No better for {worse} validations, at step {step}"
            trainer.should_stop = True


def trained_state(model: nn.Module) -> dict[str, Tensor]:
    """Return copies of the parameters that require gradients, whole, on the CPU.

    Args:
        model: Plain or sharded; all processes must ask.
    """
    return {
        name: distributed.gather_full(parameter).detach().to("cpu", copy=True)
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


@torch.no_grad()
def restore(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Put the values of :func:`trained_state` back.

    Args:
        model: With parameters of the same names.
        state: The values, whole.
    """
    parameters = dict(model.named_parameters())
    for name, value in state.items():
        distributed.copy_full(parameters[name], value)

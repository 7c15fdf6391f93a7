"""One training: Lightning's loop with validation before, during and after, and the best state kept in memory."""

from __future__ import annotations

import contextlib
import logging
import signal
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from slim.progress import console
from slim.training.batches import WindowData
from slim.training.forward import mean_nll
from slim.training.module import LanguageModelling, NotFinite

RECORDS = 100  # points of the training curve, about


@dataclass
class Outcome:
    """What a training gave.

    train: records of step, loss, learning_rate, tokens_per_second. validation: step -> loss; step 0 is untouched.
    best_step, best_state: where validation was best and the trained parameters there; 0 and None for untouched.
    tokens, seconds: seen in training, validation apart. stopped: why it ended early.
    """

    train: list[dict] = field(default_factory=list)
    validation: dict[int, float] = field(default_factory=dict)
    best_step: int = 0
    best_state: dict[str, Tensor] | None = None
    tokens: int = 0
    seconds: float = 0.0
    stopped: str | None = None

    @property
    def before(self) -> float:
        return self.validation[0]

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds if self.seconds else 0.0


class Report(pl.Callback):
    """Records the training curve, hands it to the tracker and moves the progress bar."""

    def __init__(self, outcome: Outcome, steps: int, metric: Callable, advance: Callable):
        self.outcome, self.steps, self.metric, self.advance = outcome, steps, metric, advance
        self.every = max(1, steps // RECORDS)
        self.started = 0.0
        self.clear()

    def clear(self) -> None:
        """Begin a new record."""
        self.losses: list[float] = []
        self.tokens, self.seconds = 0, 0.0

    def on_train_batch_start(self, trainer, module, batch, index) -> None:
        self.started = time.perf_counter()

    def on_train_batch_end(self, trainer, module, outputs, batch, index) -> None:
        self.seconds += time.perf_counter() - self.started
        self.tokens += batch["tokens"].numel()
        if (index + 1) % trainer.accumulate_grad_batches:
            return
        step = trainer.global_step
        self.losses.append(float(module.step_nll) / batch["loss_tokens"])
        self.advance(1, f"loss {self.losses[-1]:.3f}, {self.tokens / self.seconds:,.0f} tokens/s")
        if step % self.every == 0 or step == self.steps:
            self.record(step, trainer.optimizers[0].param_groups[0]["lr"])

    def record(self, step: int, rate: float) -> None:
        """Put mean loss and speed since the last record down under ``step``."""
        self.outcome.tokens += self.tokens
        self.outcome.seconds += self.seconds
        loss, speed = sum(self.losses) / len(self.losses), self.tokens / self.seconds
        self.outcome.train.append({"step": step, "loss": loss, "learning_rate": rate, "tokens_per_second": speed})
        for name, value in (("train_loss", loss), ("learning_rate", rate), ("tokens_per_second", speed)):
            self.metric(name, value, step)
        self.clear()


class Validation(pl.Callback):
    """Measures the validation loss before training, every ``every`` steps and at the end; keeps the best state.

    Only trained parameters are kept, on the CPU; for the untouched state nothing, because the source still has it.
    """

    def __init__(self, outcome: Outcome, batches: list[dict], every: int, steps: int, metric: Callable, autocast: Callable):
        self.outcome, self.batches, self.every, self.steps = outcome, batches, every, steps
        self.metric, self.autocast = metric, autocast

    def on_train_start(self, trainer, module) -> None:
        self.measure(module, 0)

    def on_train_batch_end(self, trainer, module, outputs, batch, index) -> None:
        step = trainer.global_step
        if step not in self.outcome.validation and (step % self.every == 0 or step == self.steps):
            self.measure(module, step)

    def measure(self, module: LanguageModelling, step: int) -> None:
        with self.autocast():
            loss = mean_nll(module.model, self.batches, module.device)
        self.outcome.validation[step] = loss
        self.metric("validation_loss", loss, step)
        if loss < self.outcome.validation[self.outcome.best_step]:  # never true for NaN
            self.outcome.best_step, self.outcome.best_state = step, trained_state(module.model)


def trained_state(model: nn.Module) -> dict[str, Tensor]:
    """Return copies of the parameters that require gradients, on the CPU."""
    return {
        name: parameter.detach().to("cpu", copy=True) for name, parameter in model.named_parameters() if parameter.requires_grad
    }


@torch.no_grad()
def restore(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Put the values of :func:`trained_state` back."""
    parameters = dict(model.named_parameters())
    for name, value in state.items():
        parameters[name].copy_(value)


def autocast(device: str, precision: str) -> Callable[[], contextlib.AbstractContextManager]:
    """Return a maker of contexts in which forward passes run as in a training of this precision."""
    return lambda: torch.autocast(device, torch.bfloat16, enabled=precision == "bf16-mixed")


def fit(
    module: LanguageModelling,
    data: WindowData,
    validation: list[dict],
    validate_every: int,
    device: str,
    precision: str,
    metric: Callable,
    advance: Callable,
) -> Outcome:
    """Train ``module`` on ``data`` and return what happened; the model is left in its last state.

    A loss that is not finite ends the training; it is reported in ``Outcome.stopped``. Raises KeyboardInterrupt on
    Ctrl-C.
    """
    steps = module.optimisation.steps
    outcome = Outcome()
    report = Report(outcome, steps, metric, advance)
    watch = Validation(outcome, validation, validate_every, steps, metric, autocast(device, precision))
    # from_pretrained leaves the evaluation mode on and Lightning keeps what it finds: dropout and gradient
    # checkpointing would silently be off.
    module.train()
    with quiet_lightning(), tempfile.TemporaryDirectory() as scratch:
        trainer = pl.Trainer(
            accelerator="gpu" if device.startswith("cuda") else "cpu",
            devices=1,
            precision=precision,
            max_epochs=1,
            max_steps=steps,
            accumulate_grad_batches=data.batches.accumulation,
            callbacks=[report, watch],
            default_root_dir=scratch,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
        )
        try:
            with interruptible():
                trainer.fit(module, datamodule=data)
        except NotFinite as problem:
            outcome.stopped = str(problem)
            console().print(f"[bold red]{problem}; training stopped, the best state before it is kept.")
    return outcome


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Let Ctrl-C be a KeyboardInterrupt: Lightning turns it into ``sys.exit(1)`` and leaves the signal ignored."""
    main = threading.current_thread() is threading.main_thread()
    handler = signal.getsignal(signal.SIGINT) if main else None
    try:
        yield
    except SystemExit as error:
        if isinstance(error.__context__, KeyboardInterrupt):
            raise KeyboardInterrupt from None
        raise
    finally:
        if main and handler is not None:
            signal.signal(signal.SIGINT, handler)


@contextlib.contextmanager
def quiet_lightning() -> Iterator[None]:
    """Silence Lightning's tips, device tables and warnings about data loader workers."""
    loggers = [logging.getLogger(name) for name in ("lightning", "lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"lightning\.")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)

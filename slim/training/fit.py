"""One training: Lightning's loop with validation before, during and after; the best state is kept;
it goes on if killed."""

from __future__ import annotations

import contextlib
import logging
import signal
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import lightning.pytorch as pl
import torch

from slim.core import processes
from slim.core.console import warn
from slim.training.batches import WindowData
from slim.training.callbacks import Outcome, Report, Validation
from slim.training.hardware import DEEPSPEED
from slim.training.module import LanguageModeling, NotFinite
from slim.training.resume import SavedTraining, StateSaver, resumed_outcome
from slim.training.strategies import AUTOCAST, trainer_settings


@dataclass
class Loop:
    """How a training runs.

    validate_every: steps. device: torch's name. precision: Lightning's. strategy: see
        ``strategies.py``.
    patience: end after so many validations in a row without a better one; 0: never.
    work: folder to save the state in, from time to time, and to go on from; None: nothing is saved.
    """

    validate_every: int
    device: str = "cpu"
    precision: str = "32-true"
    strategy: str = "auto"
    patience: int = 0
    work: Path | None = None

    def saved(self) -> SavedTraining | None:
        """Return where the state is saved, with what it fits: DeepSpeed's is in pieces, one for
        each process."""
        if self.work is None:
            return None
        setting = {"device": self.device.split(":")[0], "precision": self.precision}
        pieces = (
            {"strategy": self.strategy, "processes": processes.world_size()}
            if self.strategy in DEEPSPEED
            else {}
        )
        return SavedTraining(self.work, {**setting, **pieces})


def autocast(device: str, precision: str) -> Callable[[], contextlib.AbstractContextManager]:
    """Return a maker of contexts in which forward passes run as in a training of this precision."""
    dtype = getattr(torch, AUTOCAST.get(precision, "bfloat16"))
    return lambda: torch.autocast(device.split(":")[0], dtype, enabled=precision in AUTOCAST)


def fit(
    module: LanguageModeling,
    data: WindowData,
    validation: list[dict],
    loop: Loop,
    metric: Callable,
    advance: Callable,
) -> Outcome:
    """Train ``module`` on ``data`` and return what happened; the model is left in its last state.

    A training that was interrupted goes on from what ``loop.work`` holds of it, to the same weights
    as without. A loss that is not finite ends the training; it is reported in ``Outcome.stopped``.
    Raises KeyboardInterrupt on Ctrl-C."""
    saved = loop.saved()
    record = saved.read() if saved else None
    outcome = resumed_outcome(record) if record else Outcome()
    callbacks = watchers(module, validation, loop, outcome, metric, advance)
    if saved:
        callbacks.append(StateSaver(saved, record, outcome, callbacks[0]))
    if record:
        replay(outcome, record["step"], metric, advance)
        data.first = record["step"] * data.batches.accumulation
    # from_pretrained leaves the evaluation mode on and Lightning keeps what it finds: dropout and
    # gradient checkpointing would silently be off.
    module.train()
    with quiet_lightning(), tempfile.TemporaryDirectory() as scratch:
        trainer = pl.Trainer(
            **trainer_settings(
                loop.strategy, loop.device, loop.precision, module.optimisation.clip
            ),
            max_epochs=1,
            max_steps=module.optimisation.steps,
            accumulate_grad_batches=data.batches.accumulation,
            callbacks=callbacks,
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
            warn(f"{problem}; training stopped, the best state before it is kept.")
    return outcome


def watchers(
    module: LanguageModeling,
    validation: list[dict],
    loop: Loop,
    outcome: Outcome,
    metric: Callable,
    advance: Callable,
) -> list[pl.Callback]:
    """Return the callbacks that record and validate."""

    def keep(name: str, value: float, step: int) -> None:
        outcome.curves.append([name, value, step])
        metric(name, value, step)

    steps = module.optimisation.steps
    context = autocast(loop.device, loop.precision)
    return [
        Report(outcome, steps, keep, advance),
        Validation(outcome, validation, loop.validate_every, steps, keep, context, loop.patience),
    ]


def replay(outcome: Outcome, step: int, metric: Callable, advance: Callable) -> None:
    """Give the tracker and the progress bar what an interrupted training had recorded up to
    ``step``."""
    for point in outcome.curves:
        metric(*point)
    advance(step)


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Let Ctrl-C and SIGTERM be what they were raised as: Lightning turns a KeyboardInterrupt into
    ``sys.exit(1)`` and leaves the signal ignored."""
    main = threading.current_thread() is threading.main_thread()
    handler = signal.getsignal(signal.SIGINT) if main else None
    try:
        yield
    except SystemExit as error:
        if isinstance(error.__context__, KeyboardInterrupt):
            raise error.__context__ from None
        raise
    finally:
        if main and handler is not None:
            signal.signal(signal.SIGINT, handler)


@contextlib.contextmanager
def quiet_lightning() -> Iterator[None]:
    """Silence Lightning's tips, device tables and warnings about data loader workers."""
    loggers = [
        logging.getLogger(name) for name in ("lightning", "lightning.pytorch", "lightning.fabric")
    ]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"lightning\.")
            warnings.filterwarnings(
                "ignore", category=FutureWarning, module=r"torch\.distributed\."
            )
            # a float16 training leaves out the first steps until the scale fits, and the schedule
            # goes on
            warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)

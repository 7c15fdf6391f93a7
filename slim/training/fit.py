"""One training: Lightning's loop with validation before, during and after. The best state is kept,
and an interrupted training resumes from its saved state."""

from __future__ import annotations

import contextlib
import logging
import tempfile
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
from slim.training.module import LanguageModeling, NotFinite
from slim.training.resume import SavedTraining, StateSaver, resumed_outcome
from slim.training.signals import Termination, interruptible
from slim.training.strategies import AUTOCAST, trainer_arguments
from slim.training.trainer_settings import DEEPSPEED


@dataclass
class Loop:
    """How a training runs.

    Attributes:
        validate_every: Steps between two validations.
        device: Torch's name of the device.
        precision: Lightning's name of the precision.
        strategy: See ``strategies.py``.
        patience: End after so many validations in a row without a better one; 0: never.
        resume_dir: Folder to save the state in from time to time, and to resume from; None: nothing
            is saved.
    """

    validate_every: int
    device: str = "cpu"
    precision: str = "32-true"
    strategy: str = "auto"
    patience: int = 0
    resume_dir: Path | None = None

    def saved(self) -> SavedTraining | None:
        """Return where the state is saved, with the settings that it fits."""
        if self.resume_dir is None:
            return None
        setting = {"device": self.device.split(":")[0], "precision": self.precision}
        if self.strategy in DEEPSPEED:  # its state is in pieces, one for each process
            setting |= {"strategy": self.strategy, "processes": processes.world_size()}
        return SavedTraining(self.resume_dir, setting)


def autocast(device: str, precision: str) -> Callable[[], contextlib.AbstractContextManager]:
    """Return a maker of contexts in which forward passes run as in a training of this precision.

    Args:
        device: Torch's name of the device.
        precision: Lightning's name of the precision.
    """
    dtype = getattr(torch, AUTOCAST.get(precision, "bfloat16"))
    enabled = precision in AUTOCAST
    return lambda: torch.autocast(device.split(":")[0], dtype, enabled=enabled)


def fit(
    module: LanguageModeling,
    data: WindowData,
    validation: list[dict],
    loop: Loop,
    metric: Callable[[str, float, int], None],
    advance: Callable[..., None],
) -> Outcome:
    """Train, resuming what ``loop.resume_dir`` holds, to the same weights as without interruption.

    Args:
        module: What is trained; it is left in its last state.
        data: The micro-batches in their order.
        validation: Batches that decide which state is the best.
        loop: How the training runs.
        metric: ``metric(name, value, step)`` takes a point of a curve.
        advance: ``advance(steps, text)`` moves the progress bar.

    Returns:
        What happened. A loss that is not finite ends the training; ``Outcome.stopped`` says so.

    Raises:
        KeyboardInterrupt: Ctrl-C.
    """
    saved = loop.saved()
    record = saved.read() if saved else None
    outcome = resumed_outcome(record) if record else Outcome()
    report, validate = watchers(module, validation, loop, outcome, metric, advance)
    saver = StateSaver(saved, record, outcome, report) if saved else None
    termination = Termination(saver.save if saver else None)
    callbacks = [callback for callback in (report, validate, saver, termination) if callback]
    if record:
        replay(outcome, record["step"], metric, advance)
        data.first = record["step"] * data.batches.accumulation
    # from_pretrained leaves the evaluation mode on and Lightning keeps what it finds: dropout and
    # gradient checkpointing would silently be off.
    module.train()
    with quiet_lightning(), tempfile.TemporaryDirectory() as scratch:
        trainer = make_trainer(module, data, loop, callbacks, scratch)
        try:
            with interruptible():
                trainer.fit(module, datamodule=data)
        except NotFinite as problem:
            outcome.stopped = str(problem)
            warn(f"{problem}; training stopped, the best state before it is kept.")
    if termination.asked:  # in the last step
        termination.hand_on()
    return outcome


def make_trainer(
    module: LanguageModeling,
    data: WindowData,
    loop: Loop,
    callbacks: list[pl.Callback],
    scratch: str,
) -> pl.Trainer:
    """Return Lightning's trainer without what slim does itself.

    Args:
        module: What is trained.
        data: The micro-batches.
        loop: How the training runs.
        callbacks: What watches it.
        scratch: A folder for what Lightning may write.
    """
    where = trainer_arguments(loop.strategy, loop.device, loop.precision, module.optimisation.clip)
    return pl.Trainer(
        **where,
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


def watchers(
    module: LanguageModeling,
    validation: list[dict],
    loop: Loop,
    outcome: Outcome,
    metric: Callable[[str, float, int], None],
    advance: Callable[..., None],
) -> tuple[Report, Validation]:
    """Return the callbacks that record and validate.

    Args:
        module: What is trained.
        validation: Batches to validate on.
        loop: How the training runs.
        outcome: Takes what happens.
        metric: Takes a point of a curve.
        advance: Moves the progress bar.
    """

    def keep(name: str, value: float, step: int) -> None:
        outcome.curves.append([name, value, step])
        metric(name, value, step)

    steps = module.optimisation.steps
    context = autocast(loop.device, loop.precision)
    return (
        Report(outcome, steps, keep, advance),
        Validation(outcome, validation, loop.validate_every, steps, keep, context, loop.patience),
    )


def replay(outcome: Outcome, step: int, metric: Callable, advance: Callable) -> None:
    """Give the tracker and the progress bar what an interrupted training had recorded.

    Args:
        outcome: What it had given.
        step: Up to where it came.
        metric: Takes a point of a curve.
        advance: Moves the progress bar.
    """
    for point in outcome.curves:
        metric(*point)
    advance(step)


@contextlib.contextmanager
def quiet_lightning() -> Iterator[None]:
    """Silence Lightning's tips, device tables and warnings about data loader workers."""
    names = ("lightning", "lightning.pytorch", "lightning.fabric")
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"lightning\.")
            warnings.filterwarnings(
                "ignore", category=FutureWarning, module=r"torch\.distributed\."
            )
            # A float16 training leaves out the first steps until its scale fits, and the schedule
            # does not wait for that.
            warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)

"""What all kinds of tuning share: settings, checks, and the way from a checkpoint to a better
one."""

from __future__ import annotations

import importlib.util
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from slim.checkpoints.checkpoint import open_checkpoint
from slim.checkpoints.stage import Context, Stage
from slim.checkpoints.writer import write_blocks
from slim.core import processes
from slim.core.console import progress_bar, warn
from slim.core.errors import SlimError
from slim.core.lazy import LazyModule
from slim.core.settings import require_choice, require_number
from slim.data import preview
from slim.data.examples import TrainingData
from slim.data.labelled import Labelled
from slim.data.scored import Scored
from slim.loading.save_model import save_model
from slim.models.encoders import BODY, CLASSES
from slim.training.optimizers import OPTIMIZERS, require_device, require_optimizer
from slim.training.schedule import SCHEDULES
from slim.training.trainer_settings import TrainerSettings

if TYPE_CHECKING:
    import torch

    from slim.checkpoints.checkpoint import Checkpoint
    from slim.models.spec import ModelSpec
    from slim.training import batches, callbacks, curves, fit, forward, module, stored, task
else:
    torch = LazyModule("torch")
    batches, callbacks, curves, fit, forward, module, stored, task = (
        LazyModule(f"slim.training.{name}")
        for name in ("batches", "callbacks", "curves", "fit", "forward", "module", "stored", "task")
    )

# of an encoder, times its width: 5e-5 where that is 768, the highest that BERT's paper tries
ENCODER_RATE = 0.0384


@dataclass
class Tuner(Stage):
    """Settings that all kinds of tuning share.

    Attributes:
        data: What to learn.
        trainer: On which hardware.
        steps: Optimiser steps, at least 1.
        epochs: Passes over the data; where given they count instead of ``steps``.
        window: Tokens per sequence, at most the model's context.
        batch_tokens: Tokens per optimiser step, a multiple of ``window * accumulation``.
        accumulation: Parts in which a step is computed, to save memory; the result is the same to
            rounding.
        learning_rate: Highest one. None takes ``width_rate / hidden size``, since Adam's best rate
            falls as the width grows (Yang et al., arXiv:2203.03466), and for an encoder
            0.0384 / hidden size.
        schedule: ``cosine``, ``linear`` or ``constant`` after the warm-up.
        warmup: Share of the steps over which the rate rises, 0 to 1.
        floor: Share of the learning rate that is left at the end, 0 to 1.
        optimizer: A name in ``slim/training/optimizers.py``.
        betas: Decay of the optimiser's two moments, each 0 to 0.9999.
        weight_decay: On matrices only, 0 to 1.
        clip: Largest norm of the gradient; 0 for no limit.
        validate_every: Steps between two validations.
        validation_tokens: About how many tokens to validate on.
        patience: End after so many validations in a row without a better one; 0: never.
        seed: Of the order of the data, new weights and dropout.
    """

    data: TrainingData
    trainer: TrainerSettings = field(default_factory=TrainerSettings)
    steps: int | None = 150
    epochs: float | None = None
    window: int = 256
    batch_tokens: int = 1024
    accumulation: int = 1
    learning_rate: float | None = None
    schedule: str = "cosine"
    warmup: float = 0.05
    floor: float = 0.0
    optimizer: str = "adamw"
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.0
    clip: float = 1.0
    validate_every: int = 50
    validation_tokens: int = 8192
    patience: int = 0
    seed: int = 0

    kind: ClassVar[str] = "tune"
    together: ClassVar[bool] = True
    group: ClassVar[str] = "tuner"  # where the settings are typed
    title: ClassVar[str] = "Tuning"
    width_rate: ClassVar[float]

    def __post_init__(self) -> None:
        if not isinstance(self.data, TrainingData):
            raise SlimError(
                f"{self.group}.data is not a choice of the data group. "
                "Use for example data=tiny or data=text."
            )
        self._check_length()
        self._check_batch()
        self._check_optimizer()
        for name in ("validate_every", "validation_tokens"):
            require_number(self.setting(name), getattr(self, name), 1, integer=True)
        for name in ("patience", "seed"):
            require_number(self.setting(name), getattr(self, name), 0, integer=True)

    def _check_length(self) -> None:
        if self.epochs is None:
            require_number(self.setting("steps"), self.steps, 1, integer=True)
            return
        require_number(self.setting("epochs"), self.epochs, 0.001)
        if self.data.endless:
            raise SlimError(
                f"{self.data.title} never ends, so it has no epochs. "
                f"Use {self.group}.epochs=null {self.group}.steps=150 (say) instead."
            )
        self.steps = None

    def _check_batch(self) -> None:
        require_number(self.setting("window"), self.window, 8, integer=True)
        require_number(self.setting("accumulation"), self.accumulation, 1, integer=True)
        require_number(self.setting("batch_tokens"), self.batch_tokens, 1, integer=True)
        unit = self.window * self.accumulation
        if self.batch_tokens % unit:
            fitting = max(unit, self.batch_tokens // unit * unit)
            raise SlimError(
                f"{self.setting('batch_tokens')}={self.batch_tokens} is no multiple of "
                f"{self.setting('window')} x {self.group}.accumulation = {unit}. "
                f"Use for example {self.group}.batch_tokens={fitting}."
            )

    def _check_optimizer(self) -> None:
        if self.learning_rate is not None:
            require_number(self.setting("learning_rate"), self.learning_rate, 1e-9, 1)
        require_choice(self.setting("schedule"), self.schedule, SCHEDULES)
        require_choice(self.setting("optimizer"), self.optimizer, OPTIMIZERS)
        for name in ("warmup", "floor", "weight_decay"):
            require_number(self.setting(name), getattr(self, name), 0, 1)
        require_number(self.setting("clip"), self.clip, 0)
        self.betas = tuple(self.betas)
        if len(self.betas) != 2:
            raise SlimError(
                f"{self.setting('betas')}={list(self.betas)}: must be two numbers from 0 to 0.9999."
            )
        for beta in self.betas:
            require_number(self.setting("betas"), beta, 0, 0.9999)

    def setting(self, name: str) -> str:
        """Name a setting as the user types it.

        Args:
            name: The field's name.
        """
        return f"{self.group}.{name}"

    @property
    def rows(self) -> int:
        """Windows per micro-batch."""
        return self.batch_tokens // (self.window * self.accumulation)

    def rate(self, spec: ModelSpec) -> float:
        """Return the highest learning rate.

        Args:
            spec: The model to train.
        """
        width_rate = ENCODER_RATE if spec.is_encoder else self.width_rate
        return self.learning_rate or width_rate / spec.hidden_size

    # Checks and estimates, before any work

    def check(self, spec: ModelSpec) -> None:
        for package in ("lightning", *self.packages()):
            if importlib.util.find_spec(package) is None:
                raise SlimError(
                    f"Tuning needs the package {package}. Install it: pip install {package}"
                )
        require_optimizer(self.optimizer, self.setting("optimizer"))
        self.trainer.check(self.rows, self.setting("batch_tokens"))
        spec.family  # noqa: B018 - refuses families whose parts are unknown
        spec.require_merged()
        self.check_weights(spec)
        require_fitting(self.data, spec)
        if self.window > spec.context_length:
            raise SlimError(
                f"{self.group}.window={self.window} exceeds the context of {spec.name}. "
                f"Use at most {spec.context_length}."
            )

    def check_weights(self, spec: ModelSpec) -> None:
        """Check that the weights can be trained.

        Args:
            spec: The model to train.

        Raises:
            SlimError: They cannot.
        """
        spec.require_plain(
            "Tune first and quantize the result, or train adapters: tuner=lora tuner.merge=false."
        )

    def packages(self) -> tuple[str, ...]:
        """Packages needed besides Lightning."""
        return ()

    def activation_bytes(self, spec: ModelSpec) -> int:
        """Estimate the bytes that one micro-batch keeps for its backward pass, logits included.

        Args:
            spec: The model to train.
        """
        tokens = self.batch_tokens // self.accumulation
        width = 12 * spec.hidden_size + 6 * spec.intermediate_size + 4 * spec.heads * spec.head_dim
        # With gradient checkpointing only one block has its activations at a time.
        blocks = 1 if self.trainer.gradient_checkpointing else spec.blocks
        return 4 * tokens * (width * blocks + spec.hidden_size * spec.blocks + 3 * spec.vocab_size)

    @property
    def bytes_per_trained(self) -> int:
        """Bytes that a trained parameter takes: weight, gradient, the optimiser's moments and the
        best state."""
        return 12 + OPTIMIZERS[self.optimizer][2]

    # The parts of the work that kinds of tuning do differently

    def trained_on(self, checkpoint: Checkpoint, context: Context) -> Checkpoint:
        """Return the checkpoint whose model trains.

        Args:
            checkpoint: The source, which is also the default.
            context: Where the stage runs.
        """
        return checkpoint

    def prepare(self, source: Path, device: str, spec: ModelSpec):
        """Load the model and choose what trains.

        Args:
            source: Folder of what :meth:`trained_on` gives.
            device: Where to load it to.
            spec: Its description.

        Returns:
            The model; the parameters that train require gradients.
        """
        raise NotImplementedError

    def finish(self, model, learned: task.Task) -> tuple[torch.nn.Module, dict]:
        """Turn the trained model into the one to save.

        Args:
            model: The trained model, in its best state.
            learned: The task.

        Returns:
            The model with its numbers rounded as they will be stored, and metadata of this step.
        """
        return model, stored.finalize(model, learned.checkpoint)

    def measure(self, model, learned: task.Task) -> float:
        """Return the validation loss in the precision of the training, in nats per token.

        Args:
            model: What is measured.
            learned: The task, which has the validation data.
        """
        with fit.autocast(learned.device, learned.precision)():
            return forward.mean_nll(model, learned.held_out, learned.device)

    def untouched_loss(self, outcome: fit.Outcome, learned: task.Task) -> float:
        """Return the validation loss of what is saved where the training did not help.

        Args:
            outcome: What the training gave.
            learned: The task.
        """
        return outcome.before

    def task(self, checkpoint: Checkpoint, device: str, precision: str) -> task.Task:
        """Return what is learned: here, to predict the next token, or an encoder's classes.

        Args:
            checkpoint: The source.
            device: Torch's name of the device.
            precision: Lightning's name of the precision.
        """
        kind = task.Task
        if isinstance(self.data, Scored):
            kind = task.PairTask
        elif checkpoint.spec.is_encoder:
            kind = task.ClassificationTask
        return kind(task.TaskPlan(**self.task_settings()), checkpoint, device, precision)

    def task_settings(self) -> dict:
        """Return the settings that every task needs, by the names of ``TaskPlan``'s fields."""
        names = ("data", "window", "rows", "accumulation", "steps", "validation_tokens", "seed")
        return {name: getattr(self, name) for name in names}

    # The work

    def run(self, source: Path, target: Path, context: Context) -> dict:
        checkpoint = open_checkpoint(source)
        device = self.trainer.device(context.device)
        require_device(self.optimizer, self.setting("optimizer"), device)
        learned = self.task(checkpoint, device, self.trainer.resolved_precision(device))
        preview.show_example(learned.training, learned.tokenizer)
        steps = self.steps or max(1, math.ceil(self.epochs * learned.epoch_steps))

        base = self.trained_on(checkpoint, context)
        model = self._seeded_model(base, "cpu" if self.trainer.sharded else device)
        learner = learned.learner(model, self.optimisation(steps, checkpoint.spec))
        outcome = self.train(learner, learned, context)
        if not processes.is_main_process():
            return {}
        if self.trainer.sharded:  # this process has only its part of what was trained
            model = self._seeded_model(base, device)
        metadata = self._keep_best(model.to(device), outcome, learned, base, target)

        curves.write_curves(outcome, target)
        preview.write_examples(learned.training, learned.tokenizer, target / curves.REPORT)
        return {
            **self.training_metadata(outcome, steps),
            **learned.metadata(),
            "learning_rate": self.rate(checkpoint.spec),
            **metadata,
        }

    def _seeded_model(self, base: Checkpoint, device: str):
        """Load what trains; new adapters and dropout are the same each time."""
        torch.manual_seed(self.seed)
        model = self.prepare(base.folder, device, base.spec)
        if self.trainer.gradient_checkpointing:
            # The reentrant way needs inputs with gradients, which frozen embeddings do not give.
            model.gradient_checkpointing_enable(
                gradient_checkpointing_kwargs={"use_reentrant": False}
            )
        return model

    def _keep_best(
        self, model, outcome: fit.Outcome, learned: task.Task, base: Checkpoint, target: Path
    ) -> dict:
        """Save the best state, or the untouched weights where no state beats them as stored."""
        loss = self.untouched_loss(outcome, learned)
        metadata: dict = {}
        better = False
        if outcome.best_state is not None:
            callbacks.restore(model, outcome.best_state)
            model, metadata = self.finish(model, learned)
            # Merging and rounding change the loss, so it is measured anew.
            trained_loss = self.measure(model, learned)
            better = trained_loss < loss  # never true for NaN
            if better:
                loss = trained_loss
        self.save(model, better, learned.checkpoint, base, target)
        return {"validation_loss_after": loss, **metadata}

    def optimisation(self, steps: int, spec: ModelSpec) -> module.Optimization:
        """Return how the parameters are moved.

        Args:
            steps: Optimiser steps.
            spec: The model to train.
        """
        return module.Optimization(
            steps=steps,
            learning_rate=self.rate(spec),
            schedule=self.schedule,
            warmup=round(self.warmup * steps),
            weight_decay=self.weight_decay,
            floor=self.floor,
            betas=self.betas,
            clip=self.clip,
            optimizer=self.optimizer,
        )

    def train(
        self, learner: module.LanguageModeling, learned: task.Task, context: Context
    ) -> fit.Outcome:
        """Run the training.

        Args:
            learner: The Lightning module.
            learned: The task, which has the data.
            context: Where the state is saved and where curves go.

        Returns:
            What happened; ``learner`` is left in its last state.

        Raises:
            SlimError: The training changed nothing.
        """
        steps = learner.optimisation.steps
        data = batches.WindowData(learned.micro_batches(steps))
        loop = fit.Loop(
            validate_every=self.validate_every,
            device=learned.device,
            precision=learned.precision,
            strategy=self.trainer.resolved_strategy,
            patience=self.patience,
            resume_dir=context.resume_dir,
        )
        with progress_bar(f"{self.title} ({type(self).__name__.lower()})", steps) as advance:
            outcome = fit.fit(learner, data, learned.held_out, loop, context.metric, advance)
        if outcome.stopped is None and outcome.validation[steps] == outcome.before:
            raise SlimError(
                "Training had no effect: after it the validation loss is the same to every digit. "
                f"Check {self.group}.targets, or raise {self.group}.learning_rate."
            )
        return outcome

    def save(
        self, model, better: bool, checkpoint: Checkpoint, base: Checkpoint, target: Path
    ) -> None:
        """Write the tuned model, or the tensors of the source where that is not worse.

        Args:
            model: The tuned model.
            better: Whether its validation loss is lower than the source's.
            checkpoint: The source.
            base: What was trained, see :meth:`trained_on`.
            target: The empty folder to write.
        """
        if better:
            save_model(model, checkpoint.folder, target)
            return
        warn(
            f"Try a lower {self.group}.learning_rate, more {self.group}.steps or other data.",
            head=f"{self.title} did not lower the validation loss: the result is the untouched "
            "model.",
        )
        write_blocks(checkpoint, target, list(range(checkpoint.spec.blocks)))

    def training_metadata(self, outcome: fit.Outcome, steps: int) -> dict:
        """Return what the manifest keeps of the training.

        Args:
            outcome: What the training gave.
            steps: Optimiser steps that were planned.

        Returns:
            ``validation_loss_before`` and ``validation_loss_trained`` (at the last step) in nats
            per token, ``best_step``, ``steps``, ``tokens_seen``, ``tokens_per_second`` and, where
            the training ended early, ``stopped`` with the reason.
        """
        metadata = {
            "validation_loss_before": outcome.before,
            "validation_loss_trained": outcome.validation[max(outcome.validation)],
            "best_step": outcome.best_step,
            "steps": steps,
            "tokens_seen": outcome.tokens,
            "tokens_per_second": outcome.tokens_per_second,
        }
        if outcome.stopped:
            metadata["stopped"] = outcome.stopped
        return metadata


def require_fitting(data: TrainingData, spec: ModelSpec) -> None:
    """Check that a model can learn from data of this kind.

    Args:
        data: Texts, conversations, or texts with labels.
        spec: The model.

    Raises:
        SlimError: It cannot.
    """
    has_labels = isinstance(data, Labelled)
    if isinstance(data, (Labelled, Scored)) and not spec.is_encoder:
        raise SlimError(
            f"{data.title} has labels or scores, which an encoder learns, and {spec.name} is a "
            "decoder.\n"
            "Use an encoder (docs/encoders.md), or other data, such as data=tiny."
        )
    if not spec.is_encoder:
        return
    if isinstance(data, Scored):
        if spec.top != BODY and len(spec.labels) != 1:
            raise SlimError(
                f"{spec.name} tells {len(spec.labels)} classes apart and learns no scores of pairs."
                "\nUse an encoder without a head: task=similarity, or task=cross_encoder."
            )
        return
    if spec.top != CLASSES:
        raise SlimError(
            f"{spec.name} is an encoder without a head for classes. Use task=classification, which "
            "gives it one."
        )
    if not has_labels:
        raise SlimError(
            f"{spec.name} is a classifier and learns from texts with labels, not from "
            f"{data.title}.\nUse task=classification, with data=headlines or data=labelled "
            "data.text=FILE.csv."
        )
    data.check_classes(spec.labels, spec.name)

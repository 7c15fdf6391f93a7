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
from slim.core.errors import SlimError
from slim.core.lazy import LazyModule
from slim.core.settings import require_choice, require_number
from slim.data import preview
from slim.data.examples import TrainingData
from slim.loading.save_model import save_model
from slim.training.hardware import Hardware
from slim.training.optimizers import OPTIMIZERS, require_device, require_optimizer
from slim.training.schedule import SCHEDULES

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


@dataclass
class Tuner(Stage):
    """Settings that all kinds of tuning share.

    data: what to learn. trainer: on which hardware.
    steps, epochs: how long; epochs (passes over the data) count instead of steps where they are
        given.
    window: tokens per sequence, at most the model's context. batch_tokens: tokens per optimiser
        step.
    accumulation: parts in which a step is computed, to save memory; the result is the same to
        rounding.
    learning_rate: highest one; null takes ``width_rate / hidden size`` (Adam's best rate falls as
        the width grows: Yang et al., arXiv:2203.03466). schedule: ``cosine``, ``linear``,
        ``constant`` after the warm-up.
    warmup: share of the steps. floor: share of the learning rate that is left at the end.
    optimizer: one of ``slim/training/optimizers.py``. betas: decay of its moments.
    weight_decay: on matrices only. clip: largest norm of the gradient; 0 for no limit.
    validate_every: steps. validation_tokens: about how many to validate on.
    patience: end after so many validations in a row without a better one; 0: never.
    seed: of the order of the data, new weights and dropout.
    """

    data: TrainingData
    trainer: Hardware = field(default_factory=Hardware)
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
                f"{self.group}.data is not a choice of the data group. Use for example data=tiny or data=text."
            )
        self._check_length()
        if self.learning_rate is not None:
            require_number(self.setting("learning_rate"), self.learning_rate, 1e-9, 1)
        require_choice(self.setting("schedule"), self.schedule, SCHEDULES)
        require_choice(self.setting("optimizer"), self.optimizer, OPTIMIZERS)
        for name in ("warmup", "floor", "weight_decay"):
            require_number(self.setting(name), getattr(self, name), 0, 1)
        require_number(self.setting("clip"), self.clip, 0)
        self.betas = tuple(self.betas)
        if len(self.betas) != 2:
            shown = f"{self.setting('betas')}={list(self.betas)}"
            raise SlimError(f"{shown}: must be two numbers from 0 to 0.9999.")
        for beta in self.betas:
            require_number(self.setting("betas"), beta, 0, 0.9999)
        require_number(self.setting("validate_every"), self.validate_every, 1, integer=True)
        require_number(self.setting("validation_tokens"), self.validation_tokens, 1, integer=True)
        require_number(self.setting("patience"), self.patience, 0, integer=True)
        require_number(self.setting("seed"), self.seed, 0, integer=True)

    def _check_length(self) -> None:
        if self.epochs is None:
            require_number(self.setting("steps"), self.steps, 1, integer=True)
        else:
            require_number(self.setting("epochs"), self.epochs, 0.001)
            if self.data.endless:
                raise SlimError(
                    f"{self.data.title} never ends, so it has no epochs. "
                    f"Use {self.group}.epochs=null {self.group}.steps=150 (say) instead."
                )
            self.steps = None
        require_number(self.setting("window"), self.window, 8, integer=True)
        require_number(self.setting("accumulation"), self.accumulation, 1, integer=True)
        require_number(self.setting("batch_tokens"), self.batch_tokens, 1, integer=True)
        unit = self.window * self.accumulation
        if self.batch_tokens % unit:
            fitting = max(unit, self.batch_tokens // unit * unit)
            raise SlimError(
                f"{self.setting('batch_tokens')}={self.batch_tokens} is no multiple of {self.setting('window')} x "
                f"{self.group}.accumulation = {unit}. Use for example {self.group}.batch_tokens={fitting}."
            )

    def setting(self, name: str) -> str:
        """Name a setting as the user types it."""
        return f"{self.group}.{name}"

    @property
    def rows(self) -> int:
        """Windows per micro-batch."""
        return self.batch_tokens // (self.window * self.accumulation)

    def rate(self, spec: ModelSpec) -> float:
        """Return the highest learning rate for ``spec``."""
        return self.learning_rate or self.width_rate / spec.hidden_size

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
        if self.window > spec.context_length:
            raise SlimError(
                f"{self.group}.window={self.window} exceeds the context of {spec.name}. At most {spec.context_length}."
            )

    def check_weights(self, spec: ModelSpec) -> None:
        """Raise ``SlimError`` for weights that cannot be trained."""
        spec.require_plain(
            "Tune first and quantize the result, or train adapters: tuner=lora tuner.merge=false."
        )

    def packages(self) -> tuple[str, ...]:
        """Packages needed beside Lightning."""
        return ()

    def activation_bytes(self, spec: ModelSpec) -> int:
        """Estimate the bytes that one micro-batch keeps for its backward pass, logits included."""
        tokens = self.batch_tokens // self.accumulation
        width = 12 * spec.hidden_size + 6 * spec.intermediate_size + 4 * spec.heads * spec.head_dim
        blocks = 1 if self.trainer.gradient_checkpointing else spec.blocks
        return 4 * tokens * (width * blocks + spec.hidden_size * spec.blocks + 3 * spec.vocab_size)

    @property
    def bytes_per_trained(self) -> int:
        """Bytes that a trained parameter takes: weight, gradient, the optimiser's moments and the
        best state."""
        return 12 + OPTIMIZERS[self.optimizer][2]

    # The work

    def trained_on(self, checkpoint: Checkpoint, context: Context) -> Checkpoint:
        """Return the checkpoint that is trained: the source, unless the tuner quantises it
        first."""
        return checkpoint

    def prepare(self, source: Path, device: str, spec: ModelSpec):
        """Load the model and choose what trains."""
        raise NotImplementedError

    def finish(self, model, learnt: task.Task) -> tuple[torch.nn.Module, dict]:
        """Return the model to save, from the trained one, its numbers rounded as stored, and facts
        about the step between."""
        return model, stored.finalize(model, learnt.checkpoint)

    def measure(self, model, learnt: task.Task) -> float:
        """Return the validation loss of ``model`` in the precision of the training, nats per
        token."""
        with fit.autocast(learnt.device, learnt.precision)():
            return forward.mean_nll(model, learnt.held_out, learnt.device)

    def untouched_loss(self, outcome: fit.Outcome, learnt: task.Task) -> float:
        """Return the validation loss of what is saved where the training did not help."""
        return outcome.before

    def inherited(self, checkpoint: Checkpoint) -> dict:
        """Return facts of the source that hold for the result."""
        return stored.mask_facts(checkpoint)

    def run(self, source: Path, target: Path, context: Context) -> dict:
        checkpoint = open_checkpoint(source)
        device = self.trainer.device(context.device)
        require_device(self.optimizer, self.setting("optimizer"), device)
        precision = self.trainer.resolved_precision(device)
        learnt = self.task(checkpoint, device, precision)
        preview.show_example(learnt.training, learnt.tokenizer)
        steps = self.steps or max(1, math.ceil(self.epochs * learnt.epoch_steps))

        base = self.trained_on(checkpoint, context)
        torch.manual_seed(self.seed)  # new adapters, dropout
        model = self.prepare(base.folder, "cpu" if self.trainer.sharded else device, base.spec)
        if self.trainer.gradient_checkpointing:
            model.gradient_checkpointing_enable(
                gradient_checkpointing_kwargs={"use_reentrant": False}
            )
        learner = learnt.learner(model, self.optimisation(steps, checkpoint.spec))
        outcome = self.train(learner, learnt, context)
        if not processes.is_main_process():
            return {}

        if self.trainer.sharded:  # this process has only its part of what was trained
            torch.manual_seed(self.seed)
            model = self.prepare(base.folder, device, base.spec)
        model = model.to(device)
        untouched, facts, better = self.untouched_loss(outcome, learnt), {}, False
        if outcome.best_state is not None:
            callbacks.restore(model, outcome.best_state)
            model, facts = self.finish(model, learnt)
            after = self.measure(model, learnt)
            better = after < untouched
        self.save(model, better, checkpoint, base, target)
        after = after if better else untouched
        curves.write_curves(outcome, target)
        preview.write_examples(learnt.training, learnt.tokenizer, target / curves.REPORT)
        facts = {
            "validation_loss_after": after,
            "learning_rate": self.rate(checkpoint.spec),
            **facts,
        }
        facts |= self.inherited(checkpoint)
        return {**self.facts(outcome, steps), **learnt.facts(), **facts}

    def task(self, checkpoint: Checkpoint, device: str, precision: str) -> task.Task:
        """Return what is learnt: here, to predict the next token."""
        return task.Task(self, checkpoint, device, precision)

    def optimisation(self, steps: int, spec: ModelSpec) -> module.Optimization:
        """Return how the parameters are moved."""
        return module.Optimization(
            steps, self.rate(spec), self.schedule, round(self.warmup * steps), self.weight_decay, self.floor,
            self.betas, self.clip, self.optimizer,
        )  # fmt: skip

    def train(
        self, learner: module.LanguageModeling, learnt: task.Task, context: Context
    ) -> fit.Outcome:
        """Run the training. Raises ``SlimError`` if it changed nothing."""
        from slim.core.console import progress_bar

        steps = learner.optimisation.steps
        data = batches.WindowData(learnt.micro_batches(steps))
        with progress_bar(f"{self.title} ({type(self).__name__.lower()})", steps) as advance:
            where = learnt.device, learnt.precision, self.trainer.resolved_strategy
            loop = fit.Loop(self.validate_every, *where, self.patience, context.work)
            outcome = fit.fit(learner, data, learnt.held_out, loop, context.metric, advance)
        if outcome.stopped is None and outcome.validation[steps] == outcome.before:
            raise SlimError(
                "Training had no effect: after it the validation loss is the same to every digit. "
                f"Check {self.group}.targets, or raise {self.group}.learning_rate."
            )
        return outcome

    def save(
        self, model, better: bool, checkpoint: Checkpoint, base: Checkpoint, target: Path
    ) -> None:
        """Write the tuned model, or, where that is not better than ``checkpoint``, the tensors of
        that.

        base: what was trained, see :meth:`trained_on`.
        """
        if better:
            save_model(model, checkpoint.folder, target)
            return
        from slim.core.console import warn

        warn(
            f"Try a lower {self.group}.learning_rate, more {self.group}.steps or other data.",
            head=f"{self.title} did not lower the validation loss: the result is the untouched model.",
        )
        write_blocks(checkpoint, target, list(range(checkpoint.spec.blocks)))

    def facts(self, outcome: fit.Outcome, steps: int) -> dict:
        """Return what the manifest keeps of the training."""
        found = {
            "validation_loss_before": outcome.before,
            "validation_loss_trained": outcome.validation[max(outcome.validation)],
            "best_step": outcome.best_step,
            "steps": steps,
            "tokens_seen": outcome.tokens,
            "tokens_per_second": outcome.tokens_per_second,
        }
        return found | ({"stopped": outcome.stopped} if outcome.stopped else {})

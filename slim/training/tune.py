"""Tuning: train a checkpoint further, by low-rank adapters that are then merged, or all of its weights."""

from __future__ import annotations

import importlib.util
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from slim.checkpoint import load_model, open_checkpoint, save_model, write_blocks
from slim.data.examples import TrainingData
from slim.errors import SlimError, did_you_mean
from slim.lazy import LazyModule
from slim.settings import require_choice, require_number
from slim.stage import Context, Stage
from slim.training.hardware import Hardware
from slim.training.schedule import SCHEDULES

if TYPE_CHECKING:
    import torch

    from slim.architecture import ModelDescription
    from slim.checkpoint import Checkpoint
    from slim.training import adapters, batches, curves, fit, forward, module, stored, task
else:
    torch = LazyModule("torch")
    adapters, batches, curves, fit, forward, module, stored, task = (
        LazyModule(f"slim.training.{name}")
        for name in ("adapters", "batches", "curves", "fit", "forward", "module", "stored", "task")
    )


@dataclass
class Tuner(Stage):
    """Settings that all kinds of tuning share.

    data: what to learn. trainer: on which hardware.
    steps, epochs: how long; epochs (passes over the data) count instead of steps where they are given.
    window: tokens per sequence, at most the model's context. batch_tokens: tokens per optimiser step.
    accumulation: parts in which a step is computed, to save memory; the result is the same to rounding.
    learning_rate: highest one; null takes ``width_rate / hidden size`` (Adam's best rate falls as the width grows:
        Yang et al., arXiv:2203.03466). schedule: ``cosine``, ``linear``, ``constant`` after the warm-up.
    warmup: share of the steps. floor: share of the learning rate that is left at the end. betas: of AdamW.
    weight_decay: on matrices only. clip: largest norm of the gradient; 0 for no limit.
    validate_every: steps. validation_tokens: about how many to validate on.
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
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.0
    clip: float = 1.0
    validate_every: int = 50
    validation_tokens: int = 8192
    seed: int = 0

    kind: ClassVar[str] = "tune"
    group: ClassVar[str] = "tuner"  # where the settings are typed
    title: ClassVar[str] = "Tuning"
    width_rate: ClassVar[float]

    def __post_init__(self) -> None:
        if not isinstance(self.data, TrainingData):
            raise SlimError(f"{self.group}.data is not a choice of the data group. Use for example data=tiny or data=text.")
        self._check_length()
        if self.learning_rate is not None:
            require_number(self.setting("learning_rate"), self.learning_rate, 1e-9, 1)
        require_choice(self.setting("schedule"), self.schedule, SCHEDULES)
        for name in ("warmup", "floor", "weight_decay"):
            require_number(self.setting(name), getattr(self, name), 0, 1)
        require_number(self.setting("clip"), self.clip, 0)
        self.betas = tuple(self.betas)
        if len(self.betas) != 2:
            shown = f"{self.setting('betas')}={list(self.betas)}"
            raise SlimError(f"{shown} is not possible. It takes two numbers from 0 to 0.9999.")
        for beta in self.betas:
            require_number(self.setting("betas"), beta, 0, 0.9999)
        require_number(self.setting("validate_every"), self.validate_every, 1, integer=True)
        require_number(self.setting("validation_tokens"), self.validation_tokens, 1, integer=True)
        require_number(self.setting("seed"), self.seed, 0, integer=True)

    def _check_length(self) -> None:
        if self.epochs is None:
            require_number(self.setting("steps"), self.steps, 1, integer=True)
        else:
            require_number(self.setting("epochs"), self.epochs, 0.001)
            if self.data.endless:
                raise SlimError(f"{self.data.title} never ends, so it has no epochs. Use {self.group}.steps=... instead.")
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

    def rate(self, model: ModelDescription) -> float:
        """Return the highest learning rate for ``model``."""
        return self.learning_rate or self.width_rate / model.hidden_size

    def check(self, model: ModelDescription) -> None:
        for package in ("lightning", *self.packages()):
            if importlib.util.find_spec(package) is None:
                raise SlimError(f"Tuning needs the package {package}. Install it: pip install {package}")
        model.family  # noqa: B018 - refuses families whose parts are unknown
        if model.quantization is not None:
            raise SlimError(
                f"{model.name} is quantised, and only plain weights can be tuned. Tune first and quantise the result."
            )
        if self.window > model.context_length:
            raise SlimError(
                f"{self.group}.window={self.window} exceeds the context of {model.name}. At most {model.context_length}."
            )

    def packages(self) -> tuple[str, ...]:
        """Packages needed beside Lightning."""
        return ()

    def activation_bytes(self, model: ModelDescription) -> int:
        """Estimate the bytes that one micro-batch keeps for its backward pass, logits included."""
        tokens = self.batch_tokens // self.accumulation
        width = 12 * model.hidden_size + 6 * model.intermediate_size + 4 * model.heads * model.head_dim
        blocks = 1 if self.trainer.gradient_checkpointing else model.blocks
        return 4 * tokens * (width * blocks + model.hidden_size * model.blocks + 3 * model.vocab_size)

    # The work

    def prepare(self, source: Path, device: str, description: ModelDescription):
        """Load the model and choose what trains."""
        raise NotImplementedError

    def finish(self, model, probe: torch.Tensor) -> tuple[torch.nn.Module, dict[str, float]]:
        """Return the plain model to save, from the trained one, and facts about the step between."""
        return model, {}

    def run(self, source: Path, target: Path, context: Context) -> dict:
        checkpoint = open_checkpoint(source)
        device = self.trainer.device(context.device)
        precision = self.trainer.resolved_precision(device)
        learnt = self.task(checkpoint, device, precision)
        steps = self.steps or max(1, math.ceil(self.epochs * learnt.epoch_steps))

        torch.manual_seed(self.seed)  # new adapters, dropout
        model = self.prepare(source, device, checkpoint.description)
        if self.trainer.gradient_checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        learner = learnt.learner(model, self.optimisation(steps, checkpoint.description))
        outcome = self.train(learner, learnt, context)

        model = model.to(device)
        after, facts = outcome.before, {}
        if outcome.best_state is not None:
            fit.restore(model, outcome.best_state)
            model, facts = self.finish(model, learnt.held_out[0]["tokens"][:1].to(device))
            facts |= stored.keep_zeros(model, checkpoint)
            stored.round_to(model, checkpoint.description.dtype)
            with fit.autocast(device, precision)():
                after = forward.mean_nll(model, learnt.held_out, device)
            facts["weights_changed"] = stored.weights_changed(model, checkpoint)
        self.save(model, after < outcome.before, checkpoint, target)
        curves.write_curves(outcome, target)
        facts = {"validation_loss_after": after, "learning_rate": self.rate(checkpoint.description), **facts}
        facts |= stored.mask_facts(checkpoint)
        return {**self.facts(outcome, steps), **learnt.facts(), **facts}

    def task(self, checkpoint: Checkpoint, device: str, precision: str) -> task.Task:
        """Return what is learnt: here, to predict the next token."""
        return task.Task(self, checkpoint, device, precision)

    def optimisation(self, steps: int, description: ModelDescription) -> module.Optimisation:
        """Return how the parameters are moved."""
        return module.Optimisation(
            steps, self.rate(description), self.schedule, round(self.warmup * steps), self.weight_decay, self.floor,
            self.betas, self.clip,
        )  # fmt: skip

    def train(self, learner: module.LanguageModelling, learnt: task.Task, context: Context) -> fit.Outcome:
        """Run the training. Raises ``SlimError`` if it changed nothing."""
        from slim.progress import progress_bar

        steps = learner.optimisation.steps
        data = batches.WindowData(learnt.micro_batches(steps))
        with progress_bar(f"{self.title} ({type(self).__name__.lower()})", steps) as advance:
            outcome = fit.fit(
                learner, data, learnt.held_out, self.validate_every, learnt.device, learnt.precision, context.metric, advance
            )
        if outcome.stopped is None and outcome.validation[steps] == outcome.before:
            raise SlimError(
                "Training had no effect: after it the validation loss is the same to every digit. "
                f"Check {self.group}.targets, or raise {self.group}.learning_rate."
            )
        return outcome

    def save(self, model, better: bool, checkpoint: Checkpoint, target: Path) -> None:
        """Write the tuned model, or, where that is not better than the source, the source's own tensors."""
        if better:
            save_model(model, checkpoint.folder, target)
            return
        from slim.progress import console

        console().print(
            f"[bold red]{self.title} did not lower the validation loss: the result is the untouched model. "
            f"[/]Try a lower {self.group}.learning_rate, more {self.group}.steps or other data."
        )
        write_blocks(checkpoint, target, list(range(checkpoint.description.blocks)))

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


@dataclass
class Lora(Tuner):
    """Low-rank adapters on linear layers of the blocks, merged afterwards (Hu et al., arXiv:2106.09685).

    r: rank. alpha: the adapters' output is scaled by alpha / r. dropout: of the adapters' input.
    targets: projections with adapters, such as ``[q_proj, v_proj]``; null for all linear layers of the blocks.
    """

    r: int = 8
    alpha: float = 16
    dropout: float = 0.0
    targets: list[str] | None = None

    width_rate: ClassVar[float] = 1.2

    def __post_init__(self) -> None:
        super().__post_init__()
        require_number(self.setting("r"), self.r, 1, 4096, integer=True)
        require_number(self.setting("alpha"), self.alpha, 1e-6)
        require_number(self.setting("dropout"), self.dropout, 0, 0.99)
        if self.targets is not None:
            self.targets = [str(target) for target in self.targets]
            if not self.targets:
                raise SlimError(f"{self.group}.targets=[] leaves nothing to train. Use null for all linear layers.")

    def packages(self) -> tuple[str, ...]:
        return ("peft",)

    def check(self, model: ModelDescription) -> None:
        super().check(model)
        self.target_names(model)

    def target_names(self, model: ModelDescription) -> list[str]:
        """Return the linear layers with adapters, named within a block. Raises ``SlimError`` for an unknown target."""
        linears = list(model.block_linears())
        short = {name.split(".")[-1]: name for name in linears}
        for target in self.targets or ():
            if target not in short and target not in linears:
                hint = did_you_mean(target, short)
                possible = ", ".join(short)
                raise SlimError(f"{self.group}.targets: no layer '{target}' in {model.name}. Possible: {possible}.{hint}")
        return linears if self.targets is None else [short.get(target, target) for target in self.targets]

    def adapter_parameters(self, model: ModelDescription) -> int:
        """Count the adapters' parameters: r (in + out) per linear layer."""
        sizes = model.block_linears()
        return model.blocks * sum(self.r * sum(sizes[name]) for name in self.target_names(model))

    def peak_bytes(self, model: ModelDescription, device: str) -> int:
        weights = model.weight_bytes("float32" if device == "cpu" else None)
        # weight, gradient, two moments and the best state of every adapter; merging makes one layer's product.
        return weights + 20 * self.adapter_parameters(model) + self.activation_bytes(model)

    def prepare(self, source: Path, device: str, description: ModelDescription):
        model = load_model(source, device=device)
        return adapters.add_adapters(model, self.r, self.alpha, self.dropout, self.target_names(description))

    def finish(self, model, probe: torch.Tensor) -> tuple[torch.nn.Module, dict[str, float]]:
        return adapters.merge_adapters(model, probe)


@dataclass
class Full(Tuner):
    """All weights are trained, in float32."""

    width_rate: ClassVar[float] = 0.1

    def peak_bytes(self, model: ModelDescription, device: str) -> int:
        # weight, gradient, two moments and the best state, each in float32.
        return 5 * model.weight_bytes("float32") + self.activation_bytes(model)

    def prepare(self, source: Path, device: str, description: ModelDescription):
        return load_model(source, "float32", device).requires_grad_(True)

"""What a tuner teaches a model: the windows to train and to validate on, and what is minimised on
them."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn
from torch.utils.data import Dataset

from slim.checkpoints.checkpoint import Checkpoint
from slim.checkpoints.tokenizer import load_tokenizer
from slim.data.examples import TRAIN, VALIDATION, TrainingData
from slim.data.packing import Windows
from slim.loading.sentence import pools_first
from slim.models.encoders import CLASSES
from slim.training.batches import MicroBatches, in_order, window_order
from slim.training.module import LanguageModeling, Optimization


@dataclass(frozen=True)
class TaskPlan:
    """What a task needs to know of the stage that it belongs to.

    Attributes:
        data: What is learned.
        window: Tokens per sequence.
        rows: Windows per micro-batch.
        accumulation: Micro-batches per optimiser step.
        steps: Optimiser steps; None where passes over the data are counted instead.
        validation_tokens: About how many tokens to validate on.
        seed: Of the order of the data.
    """

    data: TrainingData
    window: int
    rows: int
    accumulation: int
    steps: int | None
    validation_tokens: int
    seed: int

    @property
    def training_tokens(self) -> int | None:
        """Tokens that the steps need; None for all that the data has."""
        if self.steps is None:
            return None
        return self.steps * self.accumulation * self.rows * self.window


class Task:
    """Predicting the next token of the data; the base of other tasks."""

    def __init__(self, plan: TaskPlan, checkpoint: Checkpoint, device: str, precision: str):
        """Read the data.

        Args:
            plan: What the stage wants.
            checkpoint: What is trained.
            device: Torch's name of the device, such as ``cuda:0``.
            precision: Lightning's name of the precision, such as ``bf16-mixed``.
        """
        self.plan = plan
        self.checkpoint = checkpoint
        self.device = device
        self.precision = precision
        self.tokenizer = load_tokenizer(checkpoint.folder)
        self.training = self.read_training()
        self.validation = self.read_validation()
        self.held_out = in_order(self.validation, plan.rows)

    def read_training(self) -> Windows:
        """Return the windows to train on: as many as the steps need, or all of them where epochs
        are counted."""
        return self.read_part(TRAIN, self.plan.training_tokens)

    def read_validation(self) -> Windows:
        """Return the windows that decide which state is the best."""
        return self.read_part(VALIDATION, self.plan.validation_tokens)

    def read_part(self, part: str, tokens: int | None) -> Windows:
        """Return windows of the data as this task reads them.

        Args:
            part: ``train`` or ``validation``.
            tokens: how many; None: all.
        """
        return self.plan.data.windows(part, self.tokenizer, self.plan.window, tokens)

    @property
    def epoch_steps(self) -> float:
        """Optimiser steps in one pass over the training data."""
        return len(self.training) / (self.plan.rows * self.plan.accumulation)

    def learner(self, model: nn.Module, optimisation: Optimization) -> LanguageModeling:
        """Return the Lightning module that trains the model.

        Args:
            model: The causal language model, plain or wrapped by PEFT.
            optimisation: How its parameters are moved.
        """
        return LanguageModeling(model, optimisation)

    def micro_batches(self, steps: int) -> Dataset:
        """Return the micro-batches of the whole training in their order.

        Args:
            steps: Optimiser steps.
        """
        plan = self.plan
        needed = steps * plan.rows * plan.accumulation
        order = window_order(len(self.training), needed, plan.seed)
        return MicroBatches(self.training, order, plan.rows, plan.accumulation)

    def metadata(self) -> dict:
        """Return what the manifest keeps of the data.

        Returns:
            ``loss_tokens_per_window`` (mean number of tokens that count), ``utilisation`` (share of
            the windows that is filled) and ``data`` (counts of ``train`` and ``validation``).
        """
        return {
            "loss_tokens_per_window": self.training.loss_tokens.double().mean().item(),
            "utilisation": self.training.utilisation,
            "data": {"train": self.training.counts, "validation": self.validation.counts},
        }


class ClassificationTask(Task):
    """Telling the classes of texts apart."""

    def read_part(self, part: str, tokens: int | None) -> Windows:
        """Return a part of the data with the numbers that the model's head gives its classes."""
        plan, names = self.plan, self.checkpoint.spec.labels
        return plan.data.labelled(part, self.tokenizer, plan.window, tokens, names)


class PairTask(Task):
    """Telling how alike two texts are: by the cosine of their vectors, or by a score of both."""

    def read_part(self, part: str, tokens: int | None) -> Windows:
        """Return a part of the pairs as this model reads them."""
        plan = self.plan
        together = self.checkpoint.spec.top == CLASSES
        first = pools_first(self.checkpoint.folder)
        return plan.data.scored(part, self.tokenizer, plan.window, tokens, together, first)

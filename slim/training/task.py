"""What a tuner teaches a model: the windows to train and to validate on, and what is minimised on
them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn
from torch.utils.data import Dataset

from slim.checkpoints.checkpoint import Checkpoint
from slim.checkpoints.tokenizer import load_tokenizer
from slim.data.examples import TRAIN, VALIDATION
from slim.data.packing import Windows
from slim.training.batches import MicroBatches, in_order, window_order
from slim.training.module import LanguageModeling, Optimization

if TYPE_CHECKING:
    from slim.training.tuner import Tuner


class Task:
    """Predicting the next token of the tuner's data; the base of other tasks.

    checkpoint: what is trained. device, precision: where and how; precision by Lightning's name.
    """

    def __init__(self, tuner: Tuner, checkpoint: Checkpoint, device: str, precision: str):
        self.tuner, self.checkpoint, self.device, self.precision = (
            tuner,
            checkpoint,
            device,
            precision,
        )
        self.tokenizer = load_tokenizer(checkpoint.folder)
        self.training = self.read_training()
        self.validation = self.read_validation()
        self.held_out = in_order(self.validation, tuner.rows)

    def read_training(self) -> Windows:
        """Return the windows to train on: as many as the steps need, or all where epochs are
        counted."""
        needed = None if self.tuner.steps is None else self.tuner.steps * self.tuner.batch_tokens
        return self.tuner.data.windows(TRAIN, self.tokenizer, self.tuner.window, needed)

    def read_validation(self) -> Windows:
        """Return the windows that decide which state is the best."""
        return self.tuner.data.windows(
            VALIDATION, self.tokenizer, self.tuner.window, self.tuner.validation_tokens
        )

    @property
    def epoch_steps(self) -> float:
        """Optimiser steps in one pass over the training data."""
        return len(self.training) / (self.tuner.rows * self.tuner.accumulation)

    def learner(self, model: nn.Module, optimisation: Optimization) -> LanguageModeling:
        """Return the Lightning module that trains ``model``."""
        return LanguageModeling(model, optimisation)

    def micro_batches(self, steps: int) -> Dataset:
        """Return the micro-batches of the whole training in their order."""
        rows, accumulation = self.tuner.rows, self.tuner.accumulation
        order = window_order(len(self.training), steps * rows * accumulation, self.tuner.seed)
        return MicroBatches(self.training, order, rows, accumulation)

    def facts(self) -> dict:
        """Return what the manifest keeps of the data."""
        return {
            "loss_tokens_per_window": self.training.loss_tokens.double().mean().item(),
            "utilisation": self.training.utilisation,
            "data": {"train": self.training.counts, "validation": self.validation.counts},
        }

"""DSKD as a task: data in both tokenizers where they differ, projectors that begin where the heads
say, the objective."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from slim.checkpoints.tokenizer import load_tokenizer
from slim.core.errors import SlimError
from slim.data.encoding import end_token
from slim.data.examples import TRAIN, VALIDATION
from slim.data.packing import IGNORE, Windows
from slim.distillation.alignment import aligned_windows
from slim.distillation.dual_space import (
    CrossModelAttention,
    DualSpace,
    ExactAlignment,
    head_projectors,
    query_projector,
)
from slim.distillation.module import Distilling
from slim.distillation.pairing import Rows, paired_windows, teacher_batch
from slim.distillation.tasks import DistillationTask, to_device
from slim.distillation.teacher import full_vocabulary, same_vocabulary
from slim.training.fit import autocast
from slim.training.forward import last_hidden, plain_model, sequence_nll
from slim.training.module import Optimization

if TYPE_CHECKING:
    from slim.distillation.stage import Distillation


class DualSpaceTask(DistillationTask):
    """Learning in both models' spaces; with different tokenizers, aligned by cross-model
    attention."""

    def __init__(self, tuner: Distillation, checkpoint, *where):
        folder = tuner.teacher.checkpoint.folder
        self.same = same_vocabulary(checkpoint.folder, folder)
        self.teacher_tokenizer = load_tokenizer(folder)
        self.read: Rows = []
        self.read_held_out: Rows = []
        self.aligned: float | None = None
        super().__init__(tuner, checkpoint, *where)

    # Data in both tokenizers

    def paired(self, part: str, tokens: int | None) -> tuple[Windows, Rows]:
        stage = self.tuner
        longest = stage.teacher.source.describe().context_length
        return paired_windows(
            stage.data, part, self.tokenizer, self.teacher_tokenizer, stage.window, tokens, longest
        )

    def read_training(self) -> Windows:
        if self.same:
            return super().read_training()
        stage = self.tuner
        windows, self.read = self.paired(
            TRAIN, None if stage.steps is None else stage.steps * stage.batch_tokens
        )
        return windows

    def read_validation(self) -> Windows:
        if self.same:
            return super().read_validation()
        windows, self.read_held_out = self.paired(VALIDATION, self.tuner.validation_tokens)
        return windows

    @torch.no_grad()
    def measure_teacher(self, teacher: nn.Module) -> float:
        """Return the teacher's validation loss, in nats per token of the student's, so that both
        can be compared."""
        if self.same:
            return self.measure(teacher)
        pad, total = end_token(self.teacher_tokenizer), 0.0
        for row in self.read_held_out:
            batch = to_device(teacher_batch([row], pad), self.device)
            with autocast(self.device, self.precision)():
                total += sequence_nll(
                    teacher, batch["tokens"], batch["labels"], batch["positions"]
                ).item()
        return total / int((self.validation.labels[:, 1:] != IGNORE).sum())

    # The objective

    def learner(self, model: nn.Module, optimisation: Optimization) -> Distilling:
        stage = self.tuner
        teacher = stage.teacher.load(self.device)
        self.teacher_loss = self.measure_teacher(teacher)
        self.introduce(model)
        student = plain_model(model)
        ours, theirs = self.shared_tokens()
        projectors = head_projectors(student, teacher, ours, theirs)
        classes = (self.checkpoint.spec.vocab_size, stage.teacher.source.describe().vocab_size)
        settings = (
            teacher,
            projectors,
            stage.divergence(),
            stage.temperature,
            stage.hard_weight,
            classes,
        )
        if self.same:
            goal = DualSpace(*settings)
        elif stage.align == "exact":
            pairs = aligned_windows(
                self.training, self.read, self.tokenizer, self.teacher_tokenizer
            )
            self.aligned = sum(found.shape[1] for found in pairs) / int(
                self.training.loss_tokens.sum()
            )
            if not self.aligned:
                raise SlimError(
                    "Nowhere in the data do both tokenizers begin a token at the same place. Use teacher.align=attention."
                )
            goal = ExactAlignment(
                *settings, read=self.read, pairs=pairs, pad=end_token(self.teacher_tokenizer)
            )
        else:
            projectors["query"] = query_projector(student, teacher, ours, theirs)
            # the values of the attention are normalised, the head's inputs are not
            with torch.no_grad():
                projectors["to_student"].weight.mul_(self.spread(teacher))
            goal = CrossModelAttention(
                *settings, read=self.read, pad=end_token(self.teacher_tokenizer)
            )
        return Distilling(model, optimisation, goal, self.projector_rate)

    def shared_tokens(self) -> tuple[Tensor, Tensor]:
        """Return the ids of the tokens that both vocabularies have, in both. Raises ``SlimError``
        if there are none."""
        sizes = (self.checkpoint.spec.vocab_size, self.tuner.teacher.source.describe().vocab_size)
        ours, theirs = (
            full_vocabulary(one.folder) for one in (self.checkpoint, self.tuner.teacher.checkpoint)
        )
        shared = sorted(
            token
            for token in ours.keys() & theirs.keys()
            if ours[token] < sizes[0] and theirs[token] < sizes[1]
        )
        if not shared:
            raise SlimError(
                "The tokenizers of teacher and student share no token, so DSKD has nothing to begin with."
            )
        return torch.tensor([ours[token] for token in shared]), torch.tensor(
            [theirs[token] for token in shared]
        )

    def spread(self, teacher: nn.Module) -> float:
        """Return the mean standard deviation of the teacher's last hidden states on a piece of the
        data."""
        batch = to_device(
            teacher_batch(self.read[:1], end_token(self.teacher_tokenizer)), self.device
        )
        with torch.no_grad():
            return (
                last_hidden(teacher, batch["tokens"], batch["positions"])
                .float()
                .std(-1)
                .mean()
                .item()
            )

    def distillation_facts(self) -> dict:
        found = {**super().distillation_facts(), "same_vocabulary": self.same}
        return found if self.aligned is None else {**found, "aligned_share": self.aligned}

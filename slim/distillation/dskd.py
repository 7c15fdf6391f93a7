"""DSKD as a task: data in both tokenizers where they differ, projectors that begin where the heads
say, the objective."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from slim.checkpoints.checkpoint import Checkpoint
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
from slim.distillation.plan import DistillationPlan
from slim.distillation.tasks import DistillationTask, to_device
from slim.distillation.teacher import full_vocabulary, same_vocabulary
from slim.training.fit import autocast
from slim.training.forward import last_hidden, plain_model, sequence_nll
from slim.training.module import Optimization


class DualSpaceTask(DistillationTask):
    """Learning in both models' spaces; with different tokenizers, tokens are aligned first.

    Attributes:
        same: Whether both models have the same vocabulary.
        read: For every training window what the teacher reads.
        read_held_out: The same for every validation window.
        aligned: Share of the student's tokens that ``align="exact"`` compares.
    """

    def __init__(self, plan: DistillationPlan, checkpoint: Checkpoint, device: str, precision: str):
        folder = plan.teacher.checkpoint.folder
        self.same = same_vocabulary(checkpoint.folder, folder)
        self.teacher_tokenizer = load_tokenizer(folder)
        self.read: Rows = []
        self.read_held_out: Rows = []
        self.aligned: float | None = None
        super().__init__(plan, checkpoint, device, precision)

    # Data in both tokenizers

    def paired(self, part: str, tokens: int | None) -> tuple[Windows, Rows]:
        """Return the student's windows and what the teacher reads for each.

        Args:
            part: ``TRAIN`` or ``VALIDATION``.
            tokens: About how many are enough; None for all.
        """
        return paired_windows(
            self.plan.data,
            part,
            self.tokenizer,
            self.teacher_tokenizer,
            self.plan.window,
            tokens,
            self.teacher_spec.context_length,
        )

    def read_training(self) -> Windows:
        if self.same:
            return super().read_training()
        windows, self.read = self.paired(TRAIN, self.plan.training_tokens)
        return windows

    def read_validation(self) -> Windows:
        if self.same:
            return super().read_validation()
        windows, self.read_held_out = self.paired(VALIDATION, self.plan.validation_tokens)
        return windows

    @torch.no_grad()
    def measure_teacher(self, teacher: nn.Module) -> float:
        """Return the teacher's validation loss, in nats per token of the student's, so that both
        can be compared.

        Args:
            teacher: The teacher's model.
        """
        if self.same:
            return self.measure(teacher)
        total = 0.0
        for row in self.read_held_out:
            batch = self.teacher_batch([row])
            with autocast(self.device, self.precision)():
                nll = sequence_nll(teacher, batch["tokens"], batch["labels"], batch["positions"])
            total += nll.item()
        return total / int((self.validation.labels[:, 1:] != IGNORE).sum())

    def teacher_batch(self, rows: Rows) -> dict[str, Tensor]:
        """Return what the teacher reads for some windows, on the device.

        Args:
            rows: The examples of each window.
        """
        return to_device(teacher_batch(rows, end_token(self.teacher_tokenizer)), self.device)

    # The objective

    def learner(self, model: nn.Module, optimisation: Optimization) -> Distilling:
        plan = self.plan
        teacher = plan.teacher.load(self.device)
        self.teacher_loss = self.measure_teacher(teacher)
        self.introduce(model)
        objective = self.objective(plain_model(model), teacher)
        return Distilling(model, optimisation, objective, plan.projector_rate)

    def objective(self, student: nn.Module, teacher: nn.Module) -> DualSpace:
        """Return what is minimised, with projectors that begin where the heads say.

        Args:
            student: Plain.
            teacher: Frozen.
        """
        plan = self.plan
        student_ids, teacher_ids = self.shared_tokens()
        projectors = head_projectors(student, teacher, student_ids, teacher_ids)
        classes = (self.checkpoint.spec.vocab_size, self.teacher_spec.vocab_size)
        settings = (plan.divergence, plan.temperature, plan.hard_weight, classes)
        if self.same:
            return DualSpace(teacher, projectors, *settings)
        pad = end_token(self.teacher_tokenizer)
        if plan.align == "exact":
            pairs = self.aligned_pairs()
            return ExactAlignment(
                teacher, projectors, *settings, read=self.read, pairs=pairs, pad=pad
            )
        projectors["query"] = query_projector(student, teacher, student_ids, teacher_ids)
        # The values of the attention are normalised, the head's inputs are not.
        with torch.no_grad():
            projectors["to_student"].weight.mul_(self.spread(teacher))
        return CrossModelAttention(teacher, projectors, *settings, read=self.read, pad=pad)

    def aligned_pairs(self) -> list[Tensor]:
        """Return for every training window the pairs of tokens to compare, int64 [2, pairs].

        Raises:
            SlimError: There are none.
        """
        pairs = aligned_windows(self.training, self.read, self.tokenizer, self.teacher_tokenizer)
        count = sum(pairs_of_window.shape[1] for pairs_of_window in pairs)
        self.aligned = count / int(self.training.loss_tokens.sum())
        if not count:
            raise SlimError(
                "Nowhere in the data do both tokenizers begin a token at the same place. "
                "Use teacher.align=attention."
            )
        return pairs

    def shared_tokens(self) -> tuple[Tensor, Tensor]:
        """Return the ids of the tokens that both vocabularies have, in the student's and in the
        teacher's, int64 [shared] each.

        Raises:
            SlimError: There are none.
        """
        student_tokens = self._embedded_tokens(self.checkpoint)
        teacher_tokens = self._embedded_tokens(self.plan.teacher.checkpoint)
        shared = sorted(student_tokens.keys() & teacher_tokens.keys())
        if not shared:
            raise SlimError(
                "The tokenizers of teacher and student share no token, "
                "so DSKD has nothing to begin with. Use a teacher whose tokens are of the same "
                "kind of text."
            )
        student_ids = torch.tensor([student_tokens[token] for token in shared])
        return student_ids, torch.tensor([teacher_tokens[token] for token in shared])

    @staticmethod
    def _embedded_tokens(checkpoint: Checkpoint) -> dict[str, int]:
        """Return token -> id for the tokens that the model has an embedding for."""
        size = checkpoint.spec.vocab_size
        tokens = full_vocabulary(checkpoint.folder)
        return {token: number for token, number in tokens.items() if number < size}

    @torch.no_grad()
    def spread(self, teacher: nn.Module) -> float:
        """Return the mean standard deviation of the teacher's last hidden states on a piece of the
        data.

        Args:
            teacher: The teacher's model.
        """
        batch = self.teacher_batch(self.read[:1])
        hidden = last_hidden(teacher, batch["tokens"], batch["positions"])
        return hidden.float().std(-1).mean().item()

    def teacher_metadata(self) -> dict:
        metadata = {**super().teacher_metadata(), "same_vocabulary": self.same}
        if self.aligned is not None:
            metadata["aligned_share"] = self.aligned
        return metadata

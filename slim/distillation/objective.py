"""What a student minimises: a divergence from the teacher's distributions, beside the hard labels.

For every token with a label, with the teacher's p and the student's q softened by the temperature
T:

    L = (1 - w) T^2 D(p, q) + w (-log q_1(label))          q_1: the student at T = 1; w: weight of the hard labels

and, where asked for, the losses of ``matching.py`` on hidden states and attention maps.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutput

from slim.distillation.cache import TeacherCache, student_classes, teacher_classes
from slim.distillation.chunks import chunk_rows, chunked_sum
from slim.distillation.losses import Divergence, softened
from slim.distillation.matching import LayerMatching
from slim.models.logits import head_logits
from slim.training.forward import body_outputs, counted, plain_model


def head_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Return the trained parameters of the head, adapters on it included."""
    return [
        parameter
        for parameter in model.get_output_embeddings().parameters()
        if parameter.requires_grad
    ]


class LiveTeacher(nn.Module):
    """A teacher that is asked for every batch.

    model: a causal language model. classes: how many logits count, where models pad one vocabulary
    to different sizes."""

    def __init__(self, model: nn.Module, temperature: float, classes: int):
        super().__init__()
        self.model, self.temperature, self.classes = model, temperature, classes

    @torch.no_grad()
    def rows(self, batch: dict, **wanted: bool) -> tuple[tuple[Tensor, ...], BaseModelOutput]:
        """Return what is known of every token with a label before the chunks, its hidden state, and
        all outputs."""
        outputs = body_outputs(self.model, batch["tokens"], batch.get("positions"), **wanted)
        return (counted(outputs[0], batch["labels"])[0],), outputs

    def compare(self, logits: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Return the log-probabilities of teacher and student, given the student's logits."""
        with torch.no_grad():
            log_p = softened(head_logits(self.model, hidden)[:, : self.classes], self.temperature)
        return log_p, softened(logits[:, : self.classes], self.temperature)


class CachedTeacher(nn.Module):
    """A teacher whose most likely tokens are on disk; both distributions have a class for all other
    tokens."""

    def __init__(self, cache: TeacherCache, temperature: float, classes: int):
        super().__init__()
        self.cache, self.temperature, self.classes = cache, temperature, classes

    def rows(self, batch: dict) -> tuple[tuple[Tensor, ...], None]:
        """Return ids and log-probabilities of the likely tokens, for every token with a label;
        there are no outputs."""
        kept = self.cache.rows(batch["windows"].cpu())
        device = batch["tokens"].device
        return (
            kept["indices"].to(device),
            teacher_classes(kept["log_probs"], kept["others"]).to(device),
        ), None

    def compare(self, logits: Tensor, indices: Tensor, log_p: Tensor) -> tuple[Tensor, Tensor]:
        return log_p, student_classes(logits[:, : self.classes], indices, self.temperature)


class TokenDistillation(nn.Module):
    """Token by token against a teacher with the same vocabulary.

    divergence: of log-probabilities, see ``losses``. hard_weight: of the labels, 0 to 1.
    matching: further losses on what happens inside, or None; only with a live teacher.
    """

    def __init__(
        self,
        teacher: LiveTeacher | CachedTeacher,
        divergence: Divergence,
        hard_weight: float,
        matching: LayerMatching | None = None,
    ):
        super().__init__()
        self.teacher, self.divergence, self.hard_weight = teacher, divergence, hard_weight
        self.matching = matching

    def forward(self, student: nn.Module, batch: dict) -> Tensor:
        """Return the loss summed over the tokens with labels."""
        wanted = {} if self.matching is None else self.matching.outputs
        known, taught = self.teacher.rows(batch, **wanted)
        outputs = body_outputs(student, batch["tokens"], batch.get("positions"), **wanted)
        hidden, target = counted(outputs[0], batch["labels"])
        total = self.summed(plain_model(student), hidden, target, known)
        return (
            total
            if self.matching is None
            else total + self.matching(outputs, taught, batch["labels"])
        )

    def summed(
        self, student: nn.Module, hidden: Tensor, target: Tensor, known: tuple[Tensor, ...]
    ) -> Tensor:
        """Return the loss given the student's hidden states and what is known of the teacher's
        distributions."""

        def of_chunk(hidden: Tensor, target: Tensor, *known: Tensor) -> Tensor:
            logits = head_logits(student, hidden).float()
            soft = self.divergence(*self.teacher.compare(logits, *known)).sum()
            total = (1 - self.hard_weight) * self.teacher.temperature**2 * soft
            if self.hard_weight:
                total = total + self.hard_weight * F.cross_entropy(logits, target, reduction="sum")
            return total

        chunk = chunk_rows(self.teacher.classes)
        return chunked_sum(of_chunk, (hidden, target, *known), head_parameters(student), chunk)

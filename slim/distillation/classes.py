"""Distilling a classifier: the student learns the teacher's probabilities of the classes and, where
asked for, its hidden states (as DistilBERT does, arXiv:1910.01108, with the relative squared error
of ``matching.py`` instead of a cosine).

For a text with the teacher's p and the student's q, softened by the temperature T:

    L = (1 - w) T^2 D(p, q) + w c (-log q_1(label)) + what is matched, mean over the text's tokens

with c the weight of its class.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slim.core.errors import SlimError
from slim.distillation.losses import Divergence, softened
from slim.distillation.matching import LayerMatching
from slim.distillation.module import Distilling
from slim.distillation.tasks import DistillationTask
from slim.training.forward import class_outputs, plain_model
from slim.training.module import Optimization
from slim.training.task import ClassificationTask


class ClassDistillation(nn.Module):
    """Text by text against a teacher with the same classes."""

    def __init__(
        self,
        teacher: nn.Module,
        order: list[int],
        divergence: Divergence,
        temperature: float,
        hard_weight: float,
        matching: LayerMatching | None = None,
    ):
        """Put the parts together.

        Args:
            teacher: A classifier, frozen.
            order: For each class of the student its number in the teacher.
            divergence: D, of log-probabilities.
            temperature: T.
            hard_weight: w, 0 to 1.
            matching: Further losses on what happens inside.
        """
        super().__init__()
        self.teacher = teacher
        self.order = order
        self.divergence = divergence
        self.temperature = temperature
        self.hard_weight = hard_weight
        self.matching = matching

    def forward(self, student: nn.Module, batch: dict) -> Tensor:
        """Return the loss summed over the texts.

        Args:
            student: Plain or wrapped by PEFT.
            batch: What :meth:`slim.data.labelled.LabelledWindows.batch` gives.
        """
        wanted = {} if self.matching is None else self.matching.outputs
        with torch.no_grad():
            taught = class_outputs(self.teacher, batch, **wanted)
            log_p = softened(taught.logits.float()[:, self.order], self.temperature)
        outputs = class_outputs(student, batch, **wanted)
        logits = outputs.logits.float()
        soft = self.divergence(log_p, softened(logits, self.temperature)).sum()
        total = (1 - self.hard_weight) * self.temperature**2 * soft
        if self.hard_weight:
            hard = F.cross_entropy(logits, batch["labels"][:, 1], reduction="none")
            if "weights" in batch:
                hard = hard * batch["weights"]
            total = total + self.hard_weight * hard.sum()
        if self.matching is not None:
            per_token = self.matching.over(outputs, taught, batch["mask"])
            total = total + per_token * len(logits) / batch["mask"].sum()
        return total


class ClassDistillationTask(ClassificationTask, DistillationTask):
    """Learning a teacher's classes."""

    def learner(self, model: nn.Module, optimisation: Optimization) -> Distilling:
        self.require_same_vocabulary()
        plan = self.plan
        teacher = self.open_teacher()
        self.introduce(model)
        matching = None
        if plan.match.wanted:
            matching = self.matching(plain_model(model), teacher)
        theirs = self.teacher_spec.labels
        order = [theirs.index(name) for name in self.checkpoint.spec.labels]
        goal = ClassDistillation(
            teacher, order, plan.divergence, plan.temperature, plan.hard_weight, matching
        )
        return Distilling(model, optimisation, goal, plan.projector_rate)

    def require_same_vocabulary(self) -> None:
        super().require_same_vocabulary()
        unknown = set(self.checkpoint.spec.labels) ^ set(self.teacher_spec.labels)
        if unknown:
            raise SlimError(
                f"The teacher {self.plan.teacher.source.label} and {self.checkpoint.spec.name} "
                f"know different classes ('{min(unknown)}'). Use a teacher of the same classes."
            )

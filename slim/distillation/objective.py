"""What a student minimises: a divergence from the teacher's distributions, next to the hard labels.

For every token with a label, with the teacher's p and the student's q softened by the temperature
T:

    L = (1 - w) T^2 D(p, q) + w (-log q_1(label))

with the student q_1 at T = 1 and the weight w of the hard labels, and, where asked for, the losses
of ``matching.py`` on hidden states and attention maps.
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
    """Return the trained parameters of the head, adapters on it included.

    Args:
        model: A causal language model.
    """
    parameters = model.get_output_embeddings().parameters()
    return [parameter for parameter in parameters if parameter.requires_grad]


class LiveTeacher(nn.Module):
    """A teacher that is asked for every batch."""

    def __init__(self, model: nn.Module, temperature: float, classes: int):
        """Take the model.

        Args:
            model: A causal language model, frozen.
            temperature: Its distributions are softened by it.
            classes: How many logits count, where models pad one vocabulary to different sizes.
        """
        super().__init__()
        self.model = model
        self.temperature = temperature
        self.classes = classes

    @torch.no_grad()
    def rows(self, batch: dict, **wanted: bool) -> tuple[tuple[Tensor, ...], BaseModelOutput]:
        """Return what is known of every token with a label before the chunks.

        Args:
            batch: ``tokens``, ``labels`` and perhaps ``positions``, int64 [rows, length].
            **wanted: Further outputs of the model.

        Returns:
            The hidden states [tokens, hidden size], alone in a tuple, and all outputs.
        """
        outputs = body_outputs(self.model, batch["tokens"], batch.get("positions"), **wanted)
        return (counted(outputs[0], batch["labels"])[0],), outputs

    def compare(self, logits: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Return the log-probabilities of teacher and student, float32 [tokens, classes].

        Args:
            logits: [tokens, vocabulary], the student's.
            hidden: [tokens, hidden size], the teacher's.
        """
        with torch.no_grad():
            log_p = softened(head_logits(self.model, hidden)[:, : self.classes], self.temperature)
        return log_p, softened(logits[:, : self.classes], self.temperature)


class CachedTeacher(nn.Module):
    """A teacher whose most likely tokens are on disk; both distributions have a class for all other
    tokens."""

    def __init__(self, cache: TeacherCache, temperature: float, classes: int):
        """Take the cache.

        Args:
            cache: Made at this temperature.
            temperature: The student's distributions are softened by it.
            classes: How many logits count.
        """
        super().__init__()
        self.cache = cache
        self.temperature = temperature
        self.classes = classes

    def rows(self, batch: dict) -> tuple[tuple[Tensor, ...], None]:
        """Return what is known of every token with a label before the chunks.

        Args:
            batch: With the numbers of its ``windows``.

        Returns:
            Ids of the likely tokens, int32 [tokens, k], and log-probabilities of these and of all
            others, float32 [tokens, k + 1]; there are no outputs.
        """
        kept = self.cache.rows(batch["windows"].cpu())
        device = batch["tokens"].device
        log_p = teacher_classes(kept["log_probs"], kept["others"])
        return (kept["indices"].to(device), log_p.to(device)), None

    def compare(self, logits: Tensor, indices: Tensor, log_p: Tensor) -> tuple[Tensor, Tensor]:
        """Return the log-probabilities of teacher and student, float32 [tokens, k + 1].

        Args:
            logits: [tokens, vocabulary], the student's.
            indices: int32 [tokens, k].
            log_p: float32 [tokens, k + 1], the teacher's.
        """
        return log_p, student_classes(logits[:, : self.classes], indices, self.temperature)


class TokenDistillation(nn.Module):
    """Token by token against a teacher with the same vocabulary."""

    def __init__(
        self,
        teacher: LiveTeacher | CachedTeacher,
        divergence: Divergence,
        hard_weight: float,
        matching: LayerMatching | None = None,
    ):
        """Put the parts together.

        Args:
            teacher: Live or cached.
            divergence: D, of log-probabilities, see ``losses.py``.
            hard_weight: w, 0 to 1.
            matching: Further losses on what happens inside; only with a live teacher.
        """
        super().__init__()
        self.teacher = teacher
        self.divergence = divergence
        self.hard_weight = hard_weight
        self.matching = matching

    def forward(self, student: nn.Module, batch: dict) -> Tensor:
        """Return the loss summed over the tokens with labels.

        Args:
            student: Plain or wrapped by PEFT.
            batch: ``tokens``, ``labels`` and perhaps ``positions``, int64 [rows, length].
        """
        wanted = {} if self.matching is None else self.matching.outputs
        known, taught = self.teacher.rows(batch, **wanted)
        outputs = body_outputs(student, batch["tokens"], batch.get("positions"), **wanted)
        hidden, target = counted(outputs[0], batch["labels"])
        total = self.summed(plain_model(student), hidden, target, known)
        if self.matching is None:
            return total
        return total + self.matching(outputs, taught, batch["labels"])

    def summed(
        self, student: nn.Module, hidden: Tensor, target: Tensor, known: tuple[Tensor, ...]
    ) -> Tensor:
        """Return the loss on the predictions.

        Args:
            student: Plain.
            hidden: [tokens, hidden size], the student's.
            target: int64 [tokens], the labels.
            known: What the teacher's ``rows`` gave.
        """

        def of_chunk(hidden: Tensor, target: Tensor, *known: Tensor) -> Tensor:
            logits = head_logits(student, hidden).float()
            soft = self.divergence(*self.teacher.compare(logits, *known)).sum()
            total = (1 - self.hard_weight) * self.teacher.temperature**2 * soft
            if self.hard_weight:
                total = total + self.hard_weight * F.cross_entropy(logits, target, reduction="sum")
            return total

        chunk = chunk_rows(self.teacher.classes)
        return chunked_sum(of_chunk, (hidden, target, *known), head_parameters(student), chunk)

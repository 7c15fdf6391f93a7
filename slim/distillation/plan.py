"""What the tasks of distillation need to know of their stage."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from slim.distillation.layer_map import Matching
from slim.distillation.questions import Generation
from slim.distillation.teacher import Teacher
from slim.training.task import TaskPlan

if TYPE_CHECKING:
    from slim.distillation.losses import Divergence


@dataclass(frozen=True)
class DistillationPlan(TaskPlan):
    """What the tasks of distillation need to know of their stage.

    Attributes:
        teacher: Who teaches.
        loss: Name of the divergence, for messages.
        divergence: Of the student's distributions from the teacher's.
        temperature: Both distributions are softened by it.
        hard_weight: Weight of the hard labels; the teacher has the rest.
        projector_rate: Highest learning rate of projectors between both models.
        match: Further losses on what happens inside.
        cache: Whether the teacher's distributions are kept, or the folder to keep them in.
        cache_folder: Where caches without a folder of their own are kept.
        top_k: Tokens kept per position.
        align: How DSKD aligns different tokenizers.
        answers: Whose answers are learned.
        generation: How answers are made.
    """

    teacher: Teacher
    loss: str
    divergence: Divergence
    temperature: float
    hard_weight: float
    projector_rate: float
    match: Matching
    cache: bool | str
    cache_folder: str
    top_k: int
    align: str
    answers: str
    generation: Generation

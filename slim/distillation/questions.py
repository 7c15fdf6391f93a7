"""Settings of distillation on answers that a model makes itself, where the data has none. Needs no
torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from slim.core.errors import SlimError
from slim.core.settings import require_number

ANSWERS = ("data", "teacher", "student", "both")


@dataclass
class Generation:
    """How questions are answered.

    Attributes:
        questions: Answered for every optimiser step, a multiple of the tuner's ``accumulation``.
        new_tokens: Longest answer.
        temperature: Answers are drawn from the distribution softened by it, 0 to 100; 0 takes the
            most likely token each time.
        student_share: With ``answers="both"``, the share of steps whose answers are the student's
            (lambda of Agarwal et al., arXiv:2306.13649), the others the teacher's.
    """

    cache_name: ClassVar[str] = "Generation"

    questions: int = 32
    new_tokens: int = 64
    temperature: float = 1.0
    student_share: float = 0.5

    def __post_init__(self) -> None:
        require_number("teacher.generation.questions", self.questions, 1, integer=True)
        require_number("teacher.generation.new_tokens", self.new_tokens, 1, integer=True)
        require_number("teacher.generation.temperature", self.temperature, 0, 100)
        require_number("teacher.generation.student_share", self.student_share, 0, 1)

    def check(self, window: int, accumulation: int) -> None:
        """Check that the settings fit those of the training.

        Args:
            window: Tokens per sequence.
            accumulation: Micro-batches per optimiser step.

        Raises:
            SlimError: They do not.
        """
        if self.questions % accumulation:
            fitting = -(-self.questions // accumulation) * accumulation
            raise SlimError(
                f"teacher.generation.questions={self.questions} is no multiple of "
                f"teacher.accumulation={accumulation}. "
                f"Use for example teacher.generation.questions={fitting}."
            )
        if self.new_tokens >= window:
            raise SlimError(
                f"teacher.generation.new_tokens={self.new_tokens} leaves no room for a question in "
                f"teacher.window={window}. Use fewer, or a longer window."
            )

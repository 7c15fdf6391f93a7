"""Which of the teacher's blocks each of the student's stands for; settings of what is matched
there. Needs no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from slim.core.errors import SlimError
from slim.core.settings import require_number

if TYPE_CHECKING:
    from slim.models.spec import ModelSpec


@dataclass
class Matching:
    """Losses on what happens inside, next to the one on the predictions.

    Attributes:
        hidden: Weight of the relative squared error of the hidden states, 0 for none.
        attention: Weight of the divergence of the attention maps, 0 for none.
        layers: The teacher's block that each block of the student stands for, ascending, such as
            [0,1,4,7]. None: found by comparing the weights where the shapes are alike (a pruned
            student), else evenly spaced.
    """

    cache_name: ClassVar[str] = "Matching"

    hidden: float = 0.0
    attention: float = 0.0
    layers: list[int] | None = None

    def __post_init__(self) -> None:
        require_number("teacher.match.hidden", self.hidden, 0)
        require_number("teacher.match.attention", self.attention, 0)
        if self.layers is None:
            return
        self.layers = list(self.layers)
        for block in self.layers:
            require_number("teacher.match.layers with block", block, 0, integer=True)
        if self.layers != sorted(set(self.layers)):
            raise SlimError(
                f"teacher.match.layers={self.layers} is not ascending. "
                "A later block stands for a later block."
            )

    @property
    def wanted(self) -> bool:
        """Whether anything is matched."""
        return bool(self.hidden or self.attention)

    def check(self, student: ModelSpec, teacher: ModelSpec) -> None:
        """Check that the map fits the two models.

        Args:
            student: The student.
            teacher: The teacher.

        Raises:
            SlimError: It does not.
        """
        if not self.wanted:
            return
        if self.layers is None and teacher.blocks < student.blocks:
            raise SlimError(
                f"{teacher.name} has {teacher.blocks} blocks, fewer than the {student.blocks} of "
                f"{student.name}, so its blocks cannot be matched.\n"
                "Use a deeper teacher, or teacher.match.hidden=0 teacher.match.attention=0."
            )
        if self.layers is not None and len(self.layers) != student.blocks:
            raise SlimError(
                f"teacher.match.layers names {len(self.layers)} blocks, "
                f"one for each of {student.name} is needed: {student.blocks}."
            )
        if self.layers and self.layers[-1] >= teacher.blocks:
            raise SlimError(
                f"teacher.match.layers names block {self.layers[-1]}: "
                f"{teacher.name} has blocks 0 to {teacher.blocks - 1}."
            )


def nearest_blocks(distances: list[list[float]]) -> list[int]:
    """Return an ascending choice of teacher blocks with the smallest sum of distances.

    Args:
        distances: One row per block of the student, one column per block of the teacher, at least
            as many.
    """
    students, teachers = len(distances), len(distances[0])
    # best[i][j]: the smallest sum where i of the teacher's blocks 0 to j - 1 stand for the
    # student's blocks 0 to i - 1
    best = [[0.0] * (teachers + 1)]
    best += [[float("inf")] * (teachers + 1) for _ in range(students)]
    for i in range(1, students + 1):
        for j in range(i, teachers + 1):
            best[i][j] = min(best[i][j - 1], best[i - 1][j - 1] + distances[i - 1][j - 1])
    # Backwards: the earliest of equally good blocks.
    chosen: list[int] = []
    j = teachers
    for i in range(students, 0, -1):
        while best[i][j - 1] <= best[i][j] and j - 1 >= i:
            j -= 1
        j -= 1
        chosen.append(j)
    return chosen[::-1]


def hidden_targets(layers: list[int], teacher_blocks: int) -> list[int]:
    """Return the teacher's block whose output each block of the student should give.

    That is the one before the block that the student's next block stands for: between the two lies
    what was removed, and the student's block has to do its work too.

    Args:
        layers: The teacher's block that each of the student's stands for.
        teacher_blocks: How many there are.
    """
    return [block - 1 for block in layers[1:]] + [teacher_blocks - 1]

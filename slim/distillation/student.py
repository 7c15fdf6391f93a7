"""A student from a teacher's own blocks: evenly spaced ones, every n-th, or a list; what it has to
learn is little.

Of n blocks, k evenly spaced ones with the first and the last among them are round(i (n - 1) / (k -
1)), i = 0 ... k - 1: 11 of 32 are 0, 3, 6, 9, 12, 16, 19, 22, 25, 28, 31. (Sanh et al., DistilBERT,
arXiv:1910.01108, take every second.)"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from slim.checkpoints.checkpoint import open_checkpoint
from slim.checkpoints.stage import Context, Stage
from slim.checkpoints.writer import write_blocks
from slim.core.errors import SlimError
from slim.core.settings import require_number
from slim.models.spec import ModelSpec
from slim.pruning.calibrated import LIBRARY_BYTES, shard_bytes
from slim.pruning.rules import block_list


def evenly_spaced(blocks: int, kept: int) -> list[int]:
    """Return evenly spaced block numbers, the first and the last among them; one alone is the
    first.

    Args:
        blocks: How many there are.
        kept: How many to return.
    """
    if kept == 1:
        return [0]
    return [int(index * (blocks - 1) / (kept - 1) + 0.5) for index in range(kept)]


@dataclass
class Layers(Stage):
    """Keeps some blocks of the model the chain begins with, unchanged, and drops the others.

    With neither setting half of them are kept, evenly spaced.

    Attributes:
        keep: How many, evenly spaced; below 1 the share of all blocks; or a list of block numbers.
        every: 2 keeps blocks 0, 2, 4, ...
    """

    cache_name: ClassVar[str] = "Layers"

    keep: int | float | list[int] | None = None
    every: int | None = None

    kind: ClassVar[str] = "initialise"

    def __post_init__(self) -> None:
        if self.keep is not None and self.every is not None:
            raise SlimError(
                "student_init.keep and student_init.every both choose the blocks. Give one of them."
            )
        if self.every is not None:
            require_number("student_init.every", self.every, 2, integer=True)
        if isinstance(self.keep, float) and 0 < self.keep < 1:
            return
        if isinstance(self.keep, (int, float, bool)):
            require_number("student_init.keep", self.keep, 1, integer=True)
        elif self.keep is not None:
            self.keep = block_list("student_init.keep", self.keep)
            if not self.keep:
                raise SlimError("student_init.keep=[] keeps nothing. Name at least one block.")

    def kept(self, blocks: int) -> list[int]:
        """Return the blocks that are kept, ascending.

        Args:
            blocks: How many there are.
        """
        if self.every is not None:
            return list(range(0, blocks, self.every))
        if isinstance(self.keep, list):
            return self.keep
        if isinstance(self.keep, float):
            return evenly_spaced(blocks, max(1, round(self.keep * blocks)))
        return evenly_spaced(blocks, self.keep or (blocks + 1) // 2)

    def check(self, spec: ModelSpec) -> None:
        spec.family  # noqa: B018 - refuses families whose parts are unknown
        spec.require_plain("Build the student from plain weights and quantize the result.")
        outside = [block for block in self._named() if block >= spec.blocks]
        if outside:
            raise SlimError(
                f"student_init.keep names block {outside[0]}: "
                f"{spec.name} has blocks 0 to {spec.blocks - 1}."
            )
        most = self.keep if isinstance(self.keep, int) else len(self.kept(spec.blocks))
        if most >= spec.blocks:
            raise SlimError(
                f"student_init.keep={most} drops nothing: {spec.name} has {spec.blocks} blocks. "
                "Keep fewer."
            )

    def _named(self) -> list[int]:
        """Return the blocks that ``keep`` names one by one."""
        return self.keep if isinstance(self.keep, list) else []

    def output_spec(self, spec: ModelSpec) -> ModelSpec:
        return spec.with_blocks(self.kept(spec.blocks))

    def peak_bytes(self, spec: ModelSpec, device: str) -> int:
        return LIBRARY_BYTES + shard_bytes(spec)

    def run(self, source: Path, target: Path, context: Context) -> dict:
        checkpoint = open_checkpoint(source)
        self.check(checkpoint.spec)
        kept = self.kept(checkpoint.spec.blocks)
        write_blocks(checkpoint, target, kept)
        removed = [block for block in range(checkpoint.spec.blocks) if block not in kept]
        return {"kept_blocks": kept, "removed_blocks": removed}

"""How a layer's weights are quantised: bits, group, symmetry. Needs no torch."""

from __future__ import annotations

from dataclasses import dataclass

BITS = (2, 3, 4, 8)
GROUP_SIZES = (32, 64, 128, 256)
WHOLE_ROW = -1


@dataclass(frozen=True)
class Scheme:
    """The grid of a layer's weights.

    Attributes:
        bits: per code.
        group_size: weights along a row that share a scale; -1: the whole row.
        symmetric: whether the grid is symmetric around 0.
    """

    bits: int
    group_size: int
    symmetric: bool

    @property
    def levels(self) -> int:
        """The number of codes."""
        return 2**self.bits

    @property
    def middle(self) -> int:
        """The code that stands for 0 on a symmetric grid."""
        return 2 ** (self.bits - 1)

    def group(self, in_features: int) -> int:
        """Return the number of weights in a group of a row of ``in_features``."""
        return in_features if self.group_size == WHOLE_ROW else self.group_size

    def groups(self, in_features: int) -> int:
        """Return the number of groups of a row."""
        return -(-in_features // self.group(in_features))

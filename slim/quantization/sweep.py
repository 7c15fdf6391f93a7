"""Going through the columns of a weight matrix one after another, each one's change passed on to those behind it.

GPTQ and coordinate descent both do: choose the codes of column j for all rows at once, then correct what later columns
aim at. Passing changes on one column at a time is slow, so columns are halved again and again: the changes of a left
half reach the right half by one matrix product. What is computed is the same, at the speed of matrix products.

Matrices here are transposed, [in, out]: a column of the layer is then a contiguous row.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

LEAF = 8  # columns that are passed on one by one


@dataclass(frozen=True)
class Sweep:
    """A way through columns 0 to ``columns``, in order.

    group: columns in a group. column: ``column(j, stop)`` settles column j and corrects columns j + 1 to ``stop``.
    push: ``push(done, later)`` lets the changes of the columns ``done`` reach the columns ``later``. enter_group: called
    before the first column of each group, when its columns have been corrected for everything before them.
    """

    columns: int
    group: int
    column: Callable[[int, int], None]
    push: Callable[[slice, slice], None]
    enter_group: Callable[[slice], None] = lambda columns: None

    def run(self) -> None:
        self._visit(0, self.columns)

    def _visit(self, start: int, stop: int) -> None:
        width = stop - start
        if start % self.group == 0 and width <= self.group and stop in (start + self.group, self.columns):
            self.enter_group(slice(start, stop))
        if width <= LEAF:
            for j in range(start, stop):
                self.column(j, stop)
            return
        unit = self.group if width > self.group else LEAF
        middle = start + -(-width // (2 * unit)) * unit
        self._visit(start, middle)
        self.push(slice(start, middle), slice(middle, stop))
        self._visit(middle, stop)

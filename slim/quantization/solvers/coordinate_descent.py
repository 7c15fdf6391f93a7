"""Going through the columns of a weight matrix one after another, each one's change passed on to
those behind it.

GPTQ and coordinate descent both do: choose the codes of column j for all rows at once, then correct
what later columns aim at. Passing changes on one column at a time is slow, so columns are halved
again and again: the changes of a left half reach the right half by one matrix product. What is
computed is the same, at the speed of matrix products.

Matrices here are transposed, [in, out]: a column of the layer is then a contiguous row.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

LEAF = 8  # columns that are passed on one by one


@dataclass(frozen=True)
class Sweep:
    """A way through columns 0 to ``columns``, in order.

    group: columns in a group. column: ``column(j, start, stop)`` settles column j of those from
    ``start`` to ``stop`` and corrects the others of them. push: ``push(done, later)`` lets the
    changes of the columns ``done`` reach the columns ``later``; back: the same for columns before
    them, once all of both are settled. enter_group: called before the first column of each group,
    when its columns have been corrected for everything before them; leave_group: after its last.
    """

    columns: int
    group: int
    column: Callable[[int, int, int], None]
    push: Callable[[slice, slice], None]
    enter_group: Callable[[slice], None] | None = None
    leave_group: Callable[[slice], None] | None = None
    back: Callable[[slice, slice], None] | None = None

    def run(self) -> None:
        self._visit(0, self.columns)

    def _visit(self, start: int, stop: int) -> None:
        whole = (
            start % self.group == 0
            and stop - start <= self.group
            and stop in (start + self.group, self.columns)
        )
        if whole and self.enter_group:
            self.enter_group(slice(start, stop))
        if stop - start <= LEAF:
            for j in range(start, stop):
                self.column(j, start, stop)
        else:
            self._halves(start, stop)
        if whole and self.leave_group:
            self.leave_group(slice(start, stop))

    def _halves(self, start: int, stop: int) -> None:
        unit = self.group if stop - start > self.group else LEAF
        middle = start + -(-(stop - start) // (2 * unit)) * unit
        left, right = slice(start, middle), slice(middle, stop)
        self._visit(start, middle)
        self.push(left, right)
        self._visit(middle, stop)
        if self.back:
            self.back(right, left)

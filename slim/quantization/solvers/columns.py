"""Going through the columns of a weight matrix in order, each change passed on to other columns.

GPTQ and coordinate descent both do so: choose the codes of column j for all rows at once, then
correct what the other columns aim at. Passing changes on one column at a time is slow, so columns
are halved again and again: the changes of a left half reach the right half by one matrix product.
What is computed is the same, at the speed of matrix products.

Matrices here are transposed, [in, out]: a column of the layer is then a contiguous row.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

LEAF = 8  # columns that are passed on one by one


@dataclass(frozen=True)
class ColumnSweep:
    """One pass over columns 0 to ``columns``, in order.

    Attributes:
        columns: number of columns.
        group: columns in a group of weights that share a scale.
        column: ``column(j, start, stop)`` chooses the codes of column j and corrects the other
            columns from ``start`` to ``stop``.
        push: ``push(done, later)`` lets the changes of the columns ``done`` reach the columns
            ``later`` to their right.
        enter_group: called before the first column of each group, when its columns have been
            corrected for everything before them.
        leave_group: called after the last column of each group.
        push_back: ``push_back(done, earlier)`` does the same for columns to their left, once both
            are done.
    """

    columns: int
    group: int
    column: Callable[[int, int, int], None]
    push: Callable[[slice, slice], None]
    enter_group: Callable[[slice], None] | None = None
    leave_group: Callable[[slice], None] | None = None
    push_back: Callable[[slice, slice], None] | None = None

    def run(self) -> None:
        """Go through all columns once."""
        self._range(0, self.columns)

    def _range(self, start: int, stop: int) -> None:
        # Halving goes along group borders (see _halves), so every group is some call's whole range.
        is_group = (
            start % self.group == 0
            and stop - start <= self.group
            and stop in (start + self.group, self.columns)
        )
        if is_group and self.enter_group:
            self.enter_group(slice(start, stop))
        if stop - start <= LEAF:
            for j in range(start, stop):
                self.column(j, start, stop)
        else:
            self._halves(start, stop)
        if is_group and self.leave_group:
            self.leave_group(slice(start, stop))

    def _halves(self, start: int, stop: int) -> None:
        unit = self.group if stop - start > self.group else LEAF
        middle = start + -(-(stop - start) // (2 * unit)) * unit  # rounded up to whole units
        self._range(start, middle)
        self.push(slice(start, middle), slice(middle, stop))
        self._range(middle, stop)
        if self.push_back:
            self.push_back(slice(middle, stop), slice(start, middle))

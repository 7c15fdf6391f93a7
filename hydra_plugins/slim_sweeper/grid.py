"""Every combination of the swept values. Points that cannot run, or are finished, do not keep the
others from running."""

from __future__ import annotations

from collections.abc import Sequence

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.utils import JobReturn


class GridSweeper(BasicSweeper):
    """Hydra's basic sweeper, but for three things: a point that cannot be composed is recorded as
    failed and the rest run, what is typed wins over ``hydra.sweeper.params``, and points that are
    finished are left out. See :mod:`slim.sweeps.grid`."""

    def sweep(self, arguments: list[str]) -> list[Sequence[JobReturn]]:
        from slim.sweeps.grid import run_grid

        return run_grid(self, arguments)

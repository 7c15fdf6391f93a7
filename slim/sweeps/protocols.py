"""What the parts of a sweep need of one another, so that none imports another for its type."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from hydra.core.plugins import Launcher
    from hydra.types import HydraContext
    from omegaconf import DictConfig

    from slim.sweeps.folder import SweepFolder
    from slim.sweeps.runs import SweepRun


class HydraSweeper(Protocol):
    """A sweeper of slim's in ``hydra_plugins``, once Hydra has set it up.

    Attributes:
        config: the configuration without what is swept.
        hydra_context: holds the loader that composes a point.
        launcher: runs points, here or in other processes.
        params: setting -> values that an experiment file sweeps (grid).
        max_batch_size: points that the launcher gets at once, None for all (grid).
        settings: those of the choice file (search).
    """

    config: DictConfig
    hydra_context: HydraContext
    launcher: Launcher
    params: dict[str, Any] | None
    max_batch_size: int | None
    settings: dict[str, Any]


class OpenSweep(Protocol):
    """A sweep that has begun (:class:`slim.sweeps.sweep.Sweep`).

    Attributes:
        folder: where the processes that run its points meet.
        tracker: its run in MLflow.
        swept: setting -> its values, None where a search alone knows them.
        total: number of points, None if unknown.
        lost: whether the launcher lost a process and with it others that it waited for.
        elsewhere: whether the points run in other processes than this one.
        workers: how many points run at the same time.
    """

    folder: SweepFolder
    tracker: SweepRun
    swept: dict[str, list[str]] | None
    total: int | None
    lost: bool
    elsewhere: bool
    workers: int

    def header(self) -> dict:
        """Return what ``sweep.json`` says before the points are known."""

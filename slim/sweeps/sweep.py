"""A sweep in the process that was started: its run in MLflow, what is done already, and how it
ends."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from omegaconf import DictConfig, OmegaConf

from slim.checkpoints.store import require_folder
from slim.core import processes
from slim.core.console import warn
from slim.core.errors import SlimError
from slim.sweeps.finish import finish
from slim.sweeps.folder import SweepFolder
from slim.sweeps.names import sweep_id, typed
from slim.sweeps.watch import Watcher

if TYPE_CHECKING:
    from slim.sweeps.runs import SweepRun

OWN = "hydra_plugins.slim_"  # how the names of slim's own sweepers begin
_current: Sweep | None = None


class Sweep:
    """What the process that was started knows of its sweep.

    Args:
        config: the configuration without what is swept.
        command: ``compress``, ``train`` or ``evaluate``.
    """

    def __init__(self, config: DictConfig, command: str):
        self.config = config
        self.command = command
        self.overrides = typed(config.hydra)
        self.folder = SweepFolder(Path(config.hydra.sweep.dir).absolute())
        require_folder(config.store)
        self.root = Path(config.store).expanduser().absolute()
        # what the sweeper alone knows, once it has read what was typed
        self.swept: dict[str, list[str]] | None = None
        self.total: int | None = config.hydra.sweeper.get("n_trials")
        self.tracker: SweepRun | None = None
        # whether the launcher lost a process and with it the others that it waited for
        self.lost = False
        params = OmegaConf.to_container(
            config.hydra.sweeper.get("params") or OmegaConf.create({}), resolve=False
        )
        self.id = sweep_id(command, config.tracking.experiment, self.overrides, params)

    @property
    def own(self) -> bool:
        """Whether a sweeper of slim's runs it: it opens the sweep by itself, when nothing is wrong
        with what was typed."""
        return self.config.hydra.sweeper._target_.startswith(OWN)

    @property
    def workers(self) -> int:
        """How many points run at the same time, as far as the launcher says."""
        count = self.config.hydra.launcher.get("n_jobs") or 1
        if count < 0:  # joblib's way to say all processors
            return os.cpu_count() or 1
        return count

    @property
    def elsewhere(self) -> bool:
        """Whether the points run in other processes than this one."""
        return not self.config.hydra.launcher._target_.endswith(".BasicLauncher")

    def open(self) -> None:
        """Begin, or continue, the sweep's run.

        Raises:
            SlimError: when the tracking store does not answer, or the sweep is running already.
        """
        # local: MLflow's classes take a second, and a mistake is answered before
        from slim.sweeps.runs import SweepRun

        if self.config.plan:
            raise SlimError(
                "plan=true shows a run or a grid, and a search chooses each point by the ones "
                "before it.\nTo see one point's plan, leave hparams_search= out."
            )
        self.tracker = SweepRun(self.root, self.config, self.id, " ".join(self.overrides))
        # after the run's lock is held: only one of two equal commands may clear the folder
        self.folder.claim()
        self.folder.write_header(self.header())
        self.watcher = Watcher(self)
        self.watcher.start()

    def header(self) -> dict:
        """Return what ``sweep.json`` says before the points are known."""
        tracking = self.config.tracking
        return {
            "sweep": self.id,
            "run_id": self.tracker.run_id,
            "command": self.command,
            "experiment": tracking.experiment,
            "store": str(self.root),
            "uri": tracking.uri,
            "pid": os.getpid(),
            "overrides": self.overrides,
            "swept": self.swept,
        }

    def close(self, error: BaseException | None = None) -> int:
        """End the sweep: table, ``sweep.json``, report. Returns the exit code."""
        if self.tracker is None:  # a mistake ended it before it was opened
            return 0
        self.watcher.stop()  # first, so that its lines stand above the table
        return finish(self, error)


def prepare(config: DictConfig, command: str) -> Sweep:
    """Make the sweep of this process known.

    Args:
        config: the configuration without what is swept.
        command: ``compress``, ``train`` or ``evaluate``.

    Raises:
        SlimError: when torchrun started this process.
    """
    global _current
    if processes.launched():
        raise SlimError(
            "torchrun starts the processes of one run, not of a sweep. Start the points one by "
            "one, or let a launcher start them: hydra/launcher=submitit_slurm."
        )
    _current = Sweep(config, command)
    return _current


def current() -> Sweep | None:
    """Return the sweep that this process was started for, if any."""
    return _current


def close_current(error: BaseException | None = None) -> int:
    """End the sweep of this process, if there is one that was opened. Returns the exit code, 0
    without one."""
    global _current
    sweep = _current
    _current = None
    if sweep is None:
        return 0
    try:
        return sweep.close(error)
    except Exception as second_error:
        if error is None:
            raise
        # the first one says more
        warn(str(second_error), head="The sweep's run could not be ended:")
        return 1

"""One point of a sweep, in whatever process runs it: which run it belongs to, and how it ended."""

from __future__ import annotations

import json
import os
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig

from slim.core.errors import SlimError
from slim.sweeps.folder import TRACEBACK, SweepFolder
from slim.sweeps.names import typed

if TYPE_CHECKING:
    from slim.checkpoints.result import Result
    from slim.tracking.tracker import Tracker

NAME_LIMIT = 200  # the longest name of a run
_active: Point | None = None


@dataclass
class Point:
    """A point while it runs.

    Attributes:
        folder: the sweep's.
        number: of the point in its sweep.
        overrides: what was set for it, as typed.
        header: the sweep's (see :class:`SweepFolder`).
        run_id: its run in MLflow, once it has one.
        final: the record of its last checkpoint in ``results.json``, once it has one.
        started: seconds since 1970.
    """

    folder: SweepFolder
    number: int
    overrides: list[str]
    header: dict
    run_id: str | None = None
    final: dict | None = None
    started: float = field(default_factory=time.time)

    @property
    def settings(self) -> dict[str, str]:
        """The settings that tell this point from the others: key -> value as typed."""
        return swept_settings(self.overrides, self.header.get("swept"))

    @property
    def name(self) -> str:
        """Its name on screen and in MLflow."""
        pairs = []
        for key, value in self.settings.items():
            pairs.append(f"{key}={value}")
        # a point that differs in nothing swept is named by all that was typed
        return " ".join(pairs or self.overrides)[:NAME_LIMIT] or "(defaults)"

    def tracker(self, config: DictConfig, name: str) -> Tracker:
        """Return the tracker of this point, below the sweep's run.

        Args:
            config: the point's configuration.
            name: what tells it from other points (:func:`slim.sweeps.names.point_name`).
        """
        from slim.tracking.tracker import Tracker, published_tag

        tags = {"slim.point": name, "slim.sweep": self.header["sweep"], **published_tag(config)}
        tracking = config.tracking
        tracker = Tracker(
            config.store,
            tracking.experiment,
            self.name,
            tracking.uri,
            tags,
            self.header["run_id"],
            patient=True,  # a server that is down for a while ends no sweep
        )
        self.run_id = tracker.run_id
        return tracker

    def keep(self, result: Result) -> str:
        """Keep the metrics of the last checkpoint, with their protocols, for the table of the
        sweep; return them as JSON."""
        self.final = {
            "label": result.label,
            "folder": str(result.checkpoint.folder),
            "hash": result.digest,
            "metrics": result.metrics,
            "quality": _protocol_and_metrics(result.quality),
            "speed": _protocol_and_metrics(result.speed),
        }
        return json.dumps(self.final, indent=1) + "\n"

    def end(self, status: str, error: str | None = None, **more: Any) -> None:
        """Record how the point ended for the sweep's own process.

        Args:
            status: ``FINISHED`` or ``FAILED``.
            error: why it failed, in a line or two.
            more: further entries of the record.
        """
        record = {
            "overrides": self.settings,
            "name": self.name,
            "run_id": self.run_id,
            "status": status,
            "error": error,
            "seconds": round(time.time() - self.started, 3),
            "final": self.final,
        }
        self.folder.write_point(self.number, {**record, **more})


def _protocol_and_metrics(measured: dict) -> dict:
    """Return what a table reads of a part of an evaluation; its samples would fill the folder."""
    return {"protocol": measured.get("protocol", {}), "metrics": measured.get("metrics", {})}


def swept_settings(overrides: list[str], swept: dict | None) -> dict[str, str]:
    """Return key -> value of the overrides that are swept.

    Args:
        overrides: as typed.
        swept: key -> values; None where that is not known, and all overrides count.
    """
    settings = {}
    for override in overrides:
        key, _, value = override.lstrip("+").partition("=")
        if swept is None or key in swept:
            settings[key] = value
    return settings


def active() -> Point | None:
    """Return the point that this process is running, None outside a sweep."""
    return _active


def run_point(
    task: Callable[[DictConfig], Any],
    config: DictConfig,
    explain: Callable[[BaseException], str | None],
) -> Any:
    """Run one point of a sweep, record how it ended, and return what ``task`` returns.

    Args:
        task: what is run.
        config: of the point.
        explain: returns one or two lines for a mistake of the user, None for an error of slim's
            own.

    Raises:
        SlimError: when the point failed; every launcher can hand it to another process.
    """
    global _active
    _active = point = _begin()
    try:
        value = task(config)
        point.end("FINISHED")
        return value
    except Exception as error:
        skipped = getattr(error, "skipped", False)  # a search's budget rules the point out
        message, own = describe(error, explain, point.folder.point(point.number))
        record_failure(point, config, message, skipped)
        point.end("FAILED", message, skipped=skipped, own=own)
        raise SlimError(message) from None
    finally:
        _active = None


def _begin() -> Point:
    """Find out from Hydra which point this is."""
    from hydra.core.hydra_config import HydraConfig

    from slim.core.console import be_quiet

    hydra = HydraConfig.get()
    folder = SweepFolder(Path(hydra.sweep.dir).absolute())
    # slim's own sweeper numbers the points here, since it leaves some out
    number = str(hydra.sweep.subdir)
    header = folder.header()
    if os.getpid() != header["pid"]:
        be_quiet()  # the process that was started speaks for all
    if not number.isdigit():
        number = hydra.job.num
    return Point(folder, int(number), typed(hydra), header)


def describe(error: Exception, explain: Callable, folder: Path) -> tuple[str, bool]:
    """Return a few words for an error and whether it is slim's own.

    Args:
        error: that ended a point.
        explain: see :func:`run_point`.
        folder: of the point; the traceback of an error of slim's own is written there.
    """
    message = explain(error)
    if message is not None:
        return message, False
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / TRACEBACK
    path.write_text("".join(traceback.format_exception(error)), encoding="utf-8")
    lines = str(error).strip().splitlines()
    first_line = lines[0] if lines else ""
    return f"{type(error).__name__}: {first_line} (traceback in {path})", True


def record_failure(point: Point, config: DictConfig, message: str, skipped: bool = False) -> None:
    """Let MLflow know why a point failed before it had a run; the run of one that failed later says
    so itself.

    Args:
        point: that failed.
        config: says where runs are recorded.
        message: why it failed.
        skipped: whether nothing was tried.
    """
    if point.run_id is not None:
        return
    from slim.checkpoints.store import digest

    tracker = point.tracker(config, digest(["unplanned", sorted(point.overrides)]))
    tracker.log_settings({}, "", point.overrides)
    tags = {"error": message}
    if skipped:
        tags["slim.skipped"] = "true"
    tracker.end("FAILED", tags)

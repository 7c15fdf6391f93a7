"""The sweep's own run in MLflow: found again by its name, with the points that are finished
already."""

from __future__ import annotations

import json
from pathlib import Path

from omegaconf import DictConfig

from slim.core.errors import SlimError
from slim.tracking.connection import browse_lines, children, tracking_uri
from slim.tracking.liveness import PROCESS, process_tag
from slim.tracking.offline_queue import TrackingClient, is_gone, now, open_experiment
from slim.tracking.tracker import VALUE_LIMIT, published_tag

FINAL = "final.json"  # artifact of a run: the figures of its last checkpoint, with their protocols
ENDED = ("FINISHED", "FAILED", "KILLED")


class SweepRun:
    """The run that the points of a sweep are below.

    Args:
        root: the store.
        config: the configuration without what is swept.
        sweep: what the sweep is found again by (:func:`slim.sweeps.names.sweep_id`).
        overrides: what was typed.

    Attributes:
        finished: (what determines a point's results, its settings) -> id of its finished run, its
            final folder still there.

    Raises:
        SlimError: when the tracking store does not answer, or another process is running the same
            sweep.
    """

    def __init__(self, root: Path, config: DictConfig, sweep: str, overrides: str):
        self.root = root
        self.sweep = sweep
        self.uri = tracking_uri(root, config.tracking.uri)
        self._tracking = TrackingClient(root, self.uri)
        self.client = self._tracking.client
        self._lock = self._hold()
        self._tracking.close_dead_runs()
        # a deleted experiment is a mistake that is said before anything is searched
        self.experiment = open_experiment(
            self.client, config.tracking.experiment, self._tracking.place
        )
        earlier = self._find()
        self.finished: dict[tuple[str, str], str] = {}
        if earlier is None:
            tags = {
                "slim.kind": "sweep",
                "slim.sweep": sweep,
                "overrides": overrides[:VALUE_LIMIT],
                **published_tag(config),
            }
            name = config.tracking.run_name or f"sweep {overrides}"[:200].strip()
            self.run_id = self._tracking.create_run(
                config.tracking.experiment, name, {**tags, "mlflow.source.name": "slim"}
            )
        else:
            self.run_id = earlier.info.run_id
            self.client.update_run(self.run_id, status="RUNNING")
            self.client.set_tag(self.run_id, PROCESS, process_tag())
            self._clear_up()

    def _hold(self):
        """Keep other processes from running the same sweep at the same time."""
        from filelock import FileLock, Timeout

        path = self.root / "sweeps" / f".{self.sweep}.lock"
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise SlimError(
                "Another process is running this very sweep. Wait for it, or end it first."
            ) from None
        return lock

    def _find(self):
        """Return the sweep's run of an earlier start, None if there is none."""
        wanted = f"tags.`slim.sweep` = '{self.sweep}' and tags.`slim.kind` = 'sweep'"
        runs = self.client.search_runs([self.experiment], wanted, max_results=1)
        return runs[0] if runs else None

    def children(self, run_id: str | None = None) -> list:
        """Return the runs below the sweep's run, or below another one."""
        return children(self.client, self.experiment, run_id or self.run_id)

    def _clear_up(self) -> None:
        """Note which points are finished, and end the runs that a killed process left open."""
        for child in reversed(self.children()):  # of several finished ones the newest counts
            # we hold the lock, so no living process can be at work on it
            if child.info.status not in ENDED:
                self._kill(child)
            # without its folder (slim.cache prune) a point is run again
            folder = child.data.tags.get("slim.folder")
            if child.info.status == "FINISHED" and folder and Path(folder).is_dir():
                self.finished.setdefault(identity(child), child.info.run_id)

    def _kill(self, run) -> None:
        for stage in self.children(run.info.run_id):
            if stage.info.status not in ENDED:
                self.client.set_terminated(stage.info.run_id, "KILLED")
        self.client.set_tag(run.info.run_id, "error", "The process ended before the run did.")
        self.client.set_terminated(run.info.run_id, "KILLED")

    def final_record(self, run_id: str) -> dict | None:
        """Return the record of a finished run's last checkpoint, with its metrics; None where it
        cannot be read."""
        from mlflow.exceptions import MlflowException

        try:
            return json.loads(
                Path(self.client.download_artifacts(run_id, FINAL)).read_text(encoding="utf-8")
            )
        except (MlflowException, OSError, ValueError):
            return None

    def browse_lines(self) -> dict[str, str]:
        """Return what to type and to open to see the runs of the experiment."""
        return browse_lines(self.uri, self.experiment)

    def log_text(self, text: str, name: str) -> None:
        """Put ``text`` next to the sweep's run as the file ``name``."""
        self._tracking.text(self.run_id, text, name)

    def close(self, status: str, counts: dict[str, int], kept: set[str] | None) -> None:
        """End the sweep's run.

        Args:
            status: ``FINISHED``, ``FAILED`` or ``KILLED``.
            counts: how many points there were, failed and were skipped.
            kept: runs of its points that stay, with finished ones that no kept one repeats; None
                for all.
        """
        metrics = []
        for name, count in counts.items():
            metrics.append([name, float(count), now(), 0])
        self._tracking.log(self.run_id, {}, metrics, {})
        self._tracking.end(self.run_id, status)
        self._tracking.close()
        try:
            if kept is not None:
                self._drop_repeated(kept)
        except Exception as error:
            # a server that went away loses nothing here: the next start drops them
            if not is_gone(error):
                raise
        self._lock.release()

    def _drop_repeated(self, kept: set[str]) -> None:
        """Delete (MLflow can restore them) earlier attempts at the points whose runs are
        ``kept``."""
        children = self.children()
        names = {identity(child) for child in children if child.info.run_id in kept}
        for child in children:
            repeated = child.info.status != "FINISHED" or identity(child) in names
            if child.info.run_id not in kept and repeated:
                self.client.delete_run(child.info.run_id)


def identity(run) -> tuple[str, str]:
    """Return what tells the run of a point from those of others: what determines its results, and
    its settings."""
    return run.data.tags.get("slim.point", ""), run.info.run_name

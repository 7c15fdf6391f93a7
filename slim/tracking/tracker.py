"""MLflow: one run for the experiment, a nested run per stage, with settings, figures, curves, plots
and answers.

The default store is a SQLite file with an artifact folder next to it; any tracking server serves by
its address."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING

from slim.checkpoints.checkpoint import REPORT
from slim.core.errors import SlimError
from slim.core.hardware import git_commit, versions
from slim.tracking.connection import PARENT, browse_lines, tracking_uri
from slim.tracking.offline_queue import TrackingClient, now

if TYPE_CHECKING:
    from slim.checkpoints.result import Result
    from slim.checkpoints.source import Source
    from slim.checkpoints.stage import Stage

UNTRACKED = re.compile(r"[^\w\-. :/]")  # characters that MLflow refuses in names
VALUE_LIMIT = 6000  # the longest parameter value MLflow takes
DESCRIPTION = "mlflow.note.content"  # a tag that MLflow shows at the top of a run's page
# What a run is judged by: name in MLflow, figure, and the unit that it is shown in.
HEADLINE = (
    ("1 perplexity", "perplexity", 1),
    ("2 accuracy", "tasks/acc", 1),
    ("3 size MB", "bytes_on_disk", 1e6),
    ("4 decode tok/s", "decode_tokens_per_second", 1),
)


class Tracker:
    """Records one run of the pipeline. Use it as a context manager: it ends the run with the right
    status.

    Args:
        root: the store.
        experiment: name of the MLflow experiment.
        run_name: name of the run, or None for one that MLflow makes up.
        uri: address of a tracking server, or None for the SQLite file below ``root``.
        tags: further tags of the run.
        parent: id of the run that it belongs to.
        patient: whether to begin even if the server is down, and to keep everything for later
            (:mod:`slim.tracking.offline_queue`).

    Raises:
        SlimError: when the store does not answer, or the experiment was deleted.
    """

    def __init__(
        self,
        root: Path | str,
        experiment: str,
        run_name: str | None = None,
        uri: str | None = None,
        tags: dict[str, str] | None = None,
        parent: str | None = None,
        patient: bool = False,
    ):
        self.root = Path(root).expanduser().absolute()
        self.uri = tracking_uri(self.root, uri)
        self._experiment = experiment
        self._tracking = TrackingClient(self.root, self.uri, patient)
        all_tags = {"slim.kind": "run", **(tags or {})}
        if parent is None:
            self._tracking.close_dead_runs()
        else:
            all_tags[PARENT] = parent
        self.run_id = self._create_run(run_name, all_tags)

    def __enter__(self) -> Tracker:
        return self

    def __exit__(self, kind, error, traceback) -> None:
        if error is None:
            self.end("FINISHED", {})
        else:
            self.end(ending(error), {"error": summary(error)})

    def end(self, status: str, tags: dict[str, str]) -> None:
        """End the run.

        Args:
            status: ``FINISHED``, ``FAILED`` or ``KILLED``.
            tags: further tags, such as the ``error``.
        """
        self._log(self.run_id, {}, {}, tags)
        self._tracking.end(self.run_id, status)
        self._tracking.close()

    def browse_lines(self) -> dict[str, str]:
        """Return what to type and to open to see the runs of the experiment."""
        return browse_lines(self.uri, self._tracking.experiment_id(self.run_id))

    def log_settings(self, config: dict, text: str, overrides: list[str]) -> None:
        """Record the resolved settings.

        Args:
            config: the settings, for the run's parameters.
            text: the same as YAML, for ``config.yaml``.
            overrides: what was typed.
        """
        self._log(
            self.run_id, flatten(config), {}, {"overrides": " ".join(overrides) or "(defaults)"}
        )
        self._tracking.text(self.run_id, text, "config.yaml")

    def log_result(self, result: Result, stage: Source | Stage, curves: list) -> None:
        """Record a checkpoint of the chain as a nested run.

        Args:
            result: the checkpoint with its figures.
            stage: what made it.
            curves: (name, value, step) that the stage recorded, such as the training loss.
        """
        run_id = self._create_run(result.label, {PARENT: self.run_id, "slim.kind": "stage"})
        manifest = result.checkpoint.manifest
        settings = manifest.get("settings") or {"source": result.label}
        numbers = {}
        for name, value in result.metadata.items():
            if isinstance(value, (int, float)):
                numbers[name] = value
        lineage = [f"{step['label']} ({step['hash']})" for step in manifest.get("lineage", [])]
        tags = {
            "hash": result.digest,
            "cached": str(result.cached).lower(),
            "folder": str(result.checkpoint.folder),
            "lineage": " -> ".join(lineage),
        }
        measured = {**headline(result.metrics), **numbers, **result.metrics}
        self._log(run_id, flatten(settings), {**measured, "seconds": result.seconds}, tags)
        points = [[name, float(value), now(), int(step or 0)] for name, value, step in curves]
        self._tracking.log(run_id, {}, points, {})
        report = result.checkpoint.folder / REPORT
        if report.is_dir():
            self._tracking.files(run_id, report)
        samples = result.quality.get("samples")
        if samples:
            self._tracking.text(run_id, json.dumps({"samples": samples}, indent=2), "samples.json")
        for name, rows in record_files(result.quality.get("records", {})).items():
            self._tracking.text(run_id, rows, f"records/{name}.jsonl")
        self._tracking.end(run_id, "FINISHED")

    def log_summary(
        self, metrics: dict[str, float], files: dict[str, str], tags: dict[str, str] | None = None
    ) -> None:
        """Record how the run ended.

        Args:
            metrics: figures of the final checkpoint and of comparisons.
            files: file name -> content. ``results.md`` is also the run's description.
            tags: further tags of the run.
        """
        tags = dict(tags or {})
        table = files.get("results.md", "")
        if 0 < len(table) <= VALUE_LIMIT:
            tags[DESCRIPTION] = table
        self._log(self.run_id, {}, {**headline(metrics), **metrics}, tags)
        for name, text in files.items():
            self._tracking.text(self.run_id, text, name)

    def log_files(self, folder: Path) -> None:
        """Record the files of a folder with the whole run."""
        self._tracking.files(self.run_id, folder)

    def _create_run(self, name: str | None, tags: dict[str, str]) -> str:
        tags = {**tags, "git_commit": git_commit() or "unknown", "mlflow.source.name": "slim"}
        for package, number in versions().items():
            tags[f"version.{package}"] = number
        return self._tracking.create_run(self._experiment, name, tags)

    def _log(
        self, run_id: str, params: dict[str, str], metrics: dict[str, float], tags: dict[str, str]
    ) -> None:
        measured = []
        for name, value in metrics.items():
            if value is not None:
                measured.append([name, float(value), now(), 0])
        self._tracking.log(run_id, shortened(params), measured, shortened(tags))


def shortened(texts: dict[str, str]) -> dict[str, str]:
    """Return the texts, cut to what MLflow takes as a value."""
    return {name: text[:VALUE_LIMIT] for name, text in texts.items()}


def headline(metrics: dict[str, float]) -> dict[str, float]:
    """Return the few figures that a run is judged by, under short names that stand first in
    MLflow's alphabetical lists.

    Args:
        metrics: figures of a checkpoint.
    """
    shown = {}
    for name, metric, unit in HEADLINE:
        if metrics.get(metric) is not None:
            shown[name] = metrics[metric] / unit
    return shown


def ending(error: BaseException) -> str:
    """Return the status of MLflow for a run that ends in ``error``."""
    return "KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED"


def summary(error: BaseException) -> str:
    """Return an error in one or two lines, with its type where it is not meant for people."""
    named = str(error) if isinstance(error, SlimError) else f"{type(error).__name__}: {error}"
    return "\n".join(named.strip().splitlines()[:2])


def published_tag(config) -> dict[str, str]:
    """Return the tag that names the studies' tables to be set next to these figures, as a JSON
    list."""
    tables = config.tracking.get("published")
    if not tables:
        return {}
    return {"slim.published": json.dumps([str(table) for table in tables])}


def record_files(records: dict) -> dict[str, str]:
    """Return file name -> JSON Lines of what an evaluation measured question by question, window by
    window.

    Args:
        records: part of an evaluation -> rows, or columns; ``tasks`` holds one such part per task.
    """
    parts = {name: rows for name, rows in records.items() if name != "tasks"}
    parts.update(records.get("tasks", {}))
    files = {}
    for name, rows in parts.items():
        lines = [json.dumps(row) + "\n" for row in _as_rows(rows)]
        files[UNTRACKED.sub("_", name).replace("/", "_")] = "".join(lines)
    return files


def _as_rows(table: list[dict] | dict[str, list]) -> list[dict]:
    """Return rows, of what may be columns."""
    if not isinstance(table, dict):
        return table
    columns = zip(*table.values(), strict=True)
    return [dict(zip(table, values, strict=True)) for values in columns]


def flatten(settings, prefix: str = "") -> dict[str, str]:
    """Flatten nested settings to ``{"a.b": "value"}``; what is keyed by patterns, such as
    ``*.q_proj``, stays one value.

    Args:
        settings: plain values, nested.
        prefix: the name of what they belong to.
    """
    if not isinstance(settings, dict) or any(UNTRACKED.search(str(key)) for key in settings):
        return {prefix: str(settings)}
    flat = {}
    for key, value in settings.items():
        flat.update(flatten(value, f"{prefix}.{key}" if prefix else str(key)))
    return flat

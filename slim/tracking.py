"""MLflow: one run for the experiment, a nested run per stage, with settings, figures, curves, plots and answers.

The default store is a SQLite file with an artifact folder beside it; any tracking server serves by its address.
"""

from __future__ import annotations

import json
import logging
import os
import re
import sqlite3
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from slim.checkpoint import REPORT
from slim.errors import SlimError
from slim.machine import git_commit, versions

if TYPE_CHECKING:
    from slim.pipeline import Result
    from slim.source import Source
    from slim.stage import Stage

BATCH = 1000  # the most metrics MLflow takes in one call
UNTRACKED = re.compile(r"[^\w\-. :/]")  # characters that MLflow refuses in names
VALUE_LIMIT = 6000  # the longest parameter value MLflow takes


class Tracker:
    """Records one run of the pipeline. Use it as a context manager: it ends the run with the right status.

    uri: address of a tracking server, or None for the SQLite file below ``root``.
    experiment: name of the MLflow experiment. run_name: name of the run, or None for one that MLflow makes up.
    """

    def __init__(self, root: Path, experiment: str, run_name: str | None = None, uri: str | None = None):
        self.root = Path(root)
        self.uri = uri or f"sqlite:///{self.root / 'mlflow.db'}"
        self._client = _connect(self.uri)
        self._experiment = self._open_experiment(experiment)
        self.run_id = self._create_run(run_name, {})

    def __enter__(self) -> Tracker:
        return self

    def __exit__(self, kind, error, traceback) -> None:
        status = "FINISHED" if kind is None else "KILLED" if issubclass(kind, KeyboardInterrupt) else "FAILED"
        if error is not None:
            self._client.set_tag(self.run_id, "error", f"{kind.__name__}: {error}"[:VALUE_LIMIT])
        self._client.set_terminated(self.run_id, status)

    @property
    def ui_command(self) -> str:
        """The one command that opens the browser's view of the runs."""
        return self.uri if self.remote else f"{sys.executable} -m mlflow ui --backend-store-uri {self.uri}"

    @property
    def remote(self) -> bool:
        return self.uri.startswith("http")

    def log_settings(self, config: dict, text: str, overrides: list[str]) -> None:
        """Record the resolved settings as parameters and as ``config.yaml``."""
        self._log(self.run_id, flatten(config), {}, {"overrides": " ".join(overrides) or "(defaults)"})
        self._client.log_text(self.run_id, text, "config.yaml")

    def log_result(self, result: Result, stage: Source | Stage, curves: list) -> None:
        """Record a checkpoint of the chain as a nested run."""
        run_id = self._create_run(result.label, {"mlflow.parentRunId": self.run_id})
        manifest = result.checkpoint.manifest
        settings = manifest.get("settings") or {"source": result.label}
        facts = {name: value for name, value in result.facts.items() if isinstance(value, (int, float))}
        tags = {
            "hash": result.digest,
            "cached": str(result.cached).lower(),
            "folder": str(result.checkpoint.folder),
            "lineage": " -> ".join(f"{step['label']} ({step['hash']})" for step in manifest.get("lineage", [])),
        }
        self._log(run_id, flatten(settings), {**facts, **result.metrics, "seconds": result.seconds}, tags)
        self._log_curves(run_id, curves)
        report = result.checkpoint.folder / REPORT
        if report.is_dir():
            self._client.log_artifacts(run_id, str(report))
        samples = result.quality.get("samples")
        if samples:
            self._client.log_dict(run_id, {"samples": samples}, "samples.json")
        for name, rows in record_files(result.quality.get("records", {})).items():
            self._client.log_text(run_id, rows, f"records/{name}.jsonl")
        self._client.set_terminated(run_id, "FINISHED")

    def log_summary(self, metrics: dict[str, float], files: dict[str, str]) -> None:
        """Record the final figures and texts (file name -> content) of the whole run."""
        self._log(self.run_id, {}, metrics, {})
        for name, text in files.items():
            self._client.log_text(self.run_id, text, name)

    def _open_experiment(self, name: str) -> str:
        found = self._client.get_experiment_by_name(name)
        if found is not None:
            return found.experiment_id
        place = None if self.remote else (self.root / "artifacts").as_uri()
        from mlflow.exceptions import MlflowException

        try:
            return self._client.create_experiment(name, artifact_location=place)
        except MlflowException:  # another process was faster
            return self._client.get_experiment_by_name(name).experiment_id

    def _create_run(self, name: str | None, tags: dict[str, str]) -> str:
        described = {f"version.{package}": number for package, number in versions().items()}
        tags = {**tags, **described, "git_commit": git_commit() or "unknown", "mlflow.source.name": "slim"}
        return self._client.create_run(self._experiment, run_name=name, tags=tags).info.run_id

    def _log(self, run_id: str, params: dict[str, str], metrics: dict[str, float], tags: dict[str, str]) -> None:
        from mlflow.entities import Metric, Param, RunTag

        now = int(time.time() * 1000)
        numbers = {name: value for name, value in metrics.items() if value is not None}
        for start in range(0, max(len(params), 1), 100):
            part = list(params.items())[start : start + 100]
            self._client.log_batch(run_id, params=[Param(name, value[:VALUE_LIMIT]) for name, value in part])
        self._client.log_batch(
            run_id,
            metrics=[Metric(name, float(value), now, 0) for name, value in numbers.items()],
            tags=[RunTag(name, value[:VALUE_LIMIT]) for name, value in tags.items()],
        )

    def _log_curves(self, run_id: str, curves: list) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        points = [Metric(name, float(value), now, int(step or 0)) for name, value, step in curves]
        for start in range(0, len(points), BATCH):
            self._client.log_batch(run_id, metrics=points[start : start + BATCH])


def record_files(records: dict) -> dict[str, str]:
    """Return file name -> JSON Lines of what an evaluation measured question by question, window by window."""
    parts = {**{name: rows for name, rows in records.items() if name != "tasks"}, **records.get("tasks", {})}
    files = {}
    for name, rows in parts.items():
        if isinstance(rows, dict):  # columns
            rows = [dict(zip(rows, values, strict=True)) for values in zip(*rows.values(), strict=True)]
        files[UNTRACKED.sub("_", name).replace("/", "_")] = "".join(json.dumps(row) + "\n" for row in rows)
    return files


def _connect(uri: str):
    """Return a client whose store exists and answers. Raises ``SlimError`` if it does not."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
    from filelock import FileLock
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    for noisy in ("alembic", "mlflow.store.db.utils"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    path = Path(uri.removeprefix("sqlite:///")) if uri.startswith("sqlite:///") else None
    try:
        if path is None:
            client = MlflowClient(uri)
            client.search_experiments(max_results=1)
            return client
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{path}.lock"):  # two processes creating the tables at once kill one another
            _use_write_ahead_log(path)
            client = MlflowClient(uri)
            client.search_experiments(max_results=1)
            return client
    except (MlflowException, OSError, sqlite3.Error) as error:
        reason = str(error).splitlines()[0]
        raise SlimError(
            f"The tracking store {uri} cannot be used: {reason}\n"
            "Start the server, or leave tracking.uri out to track into a local file."
        ) from error


def _use_write_ahead_log(path: Path) -> None:
    """Let several processes read while one writes."""
    connection = sqlite3.connect(path, timeout=30)
    try:
        connection.execute("PRAGMA journal_mode=WAL")
    finally:
        connection.close()


def flatten(settings, prefix: str = "") -> dict[str, str]:
    """Flatten nested settings to ``{"a.b": "value"}``; what is keyed by patterns, such as ``*.q_proj``, stays one value."""
    if not isinstance(settings, dict) or any(UNTRACKED.search(str(key)) for key in settings):
        return {prefix: str(settings)}
    flat = {}
    for key, value in settings.items():
        flat.update(flatten(value, f"{prefix}.{key}" if prefix else str(key)))
    return flat

"""MLflow: one run for the experiment, a nested run per stage, with settings, figures, curves, plots
and answers.

The default store is a SQLite file with an artifact folder beside it; any tracking server serves by
its address."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING

from slim.checkpoints.checkpoint import REPORT
from slim.core.errors import SlimError
from slim.core.hardware import git_commit, versions
from slim.tracking.connection import PARENT, tracking_uri, ui_command
from slim.tracking.offline_queue import TrackingClient, now

if TYPE_CHECKING:
    from slim.checkpoints.result import Result
    from slim.checkpoints.source import Source
    from slim.checkpoints.stage import Stage

UNTRACKED = re.compile(r"[^\w\-. :/]")  # characters that MLflow refuses in names
VALUE_LIMIT = 6000  # the longest parameter value MLflow takes


class Tracker:
    """Records one run of the pipeline. Use it as a context manager: it ends the run with the right
    status.

    uri: address of a tracking server, or None for the SQLite file below ``root``.
    experiment: name of the MLflow experiment. run_name: name of the run, or None for one that
        MLflow makes up.
    tags: further tags of the run. parent: run that it belongs to. kind: what ``slim.kind`` calls
        it.
    patient: begin even if the server is down, and keep everything for later
    (:mod:`slim.tracking.offline_queue`)."""

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
        below = {PARENT: parent} if parent else {}
        self.run_id = self._create_run(run_name, {"slim.kind": "run", **below, **(tags or {})})

    def __enter__(self) -> Tracker:
        return self

    def __exit__(self, kind, error, traceback) -> None:
        status = (
            "FINISHED"
            if kind is None
            else "KILLED"
            if issubclass(kind, KeyboardInterrupt)
            else "FAILED"
        )
        self.end(status, {} if error is None else {"error": summary(error)})

    def end(self, status: str, tags: dict[str, str]) -> None:
        """End the run with a status of MLflow and further tags, such as the ``error``."""
        self._log(self.run_id, {}, {}, tags)
        self._tracking.end(self.run_id, status)
        self._tracking.close()

    @property
    def ui_command(self) -> str:
        """The one command that opens the browser's view of the runs."""
        return ui_command(self.uri)

    def log_settings(self, config: dict, text: str, overrides: list[str]) -> None:
        """Record the resolved settings as parameters and as ``config.yaml``."""
        self._log(
            self.run_id, flatten(config), {}, {"overrides": " ".join(overrides) or "(defaults)"}
        )
        self._tracking.text(self.run_id, text, "config.yaml")

    def log_result(self, result: Result, stage: Source | Stage, curves: list) -> None:
        """Record a checkpoint of the chain as a nested run."""
        run_id = self._create_run(result.label, {PARENT: self.run_id, "slim.kind": "stage"})
        manifest = result.checkpoint.manifest
        settings = manifest.get("settings") or {"source": result.label}
        facts = {
            name: value for name, value in result.facts.items() if isinstance(value, (int, float))
        }
        tags = {
            "hash": result.digest,
            "cached": str(result.cached).lower(),
            "folder": str(result.checkpoint.folder),
            "lineage": " -> ".join(
                f"{step['label']} ({step['hash']})" for step in manifest.get("lineage", [])
            ),
        }
        self._log(
            run_id, flatten(settings), {**facts, **result.metrics, "seconds": result.seconds}, tags
        )
        self._tracking.log(
            run_id,
            {},
            [[name, float(value), now(), int(step or 0)] for name, value, step in curves],
            {},
        )
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
        """Record the final figures and texts (file name -> content) of the whole run."""
        self._log(self.run_id, {}, metrics, tags or {})
        for name, text in files.items():
            self._tracking.text(self.run_id, text, name)

    def log_files(self, folder: Path) -> None:
        """Record the files of a folder with the whole run."""
        self._tracking.files(self.run_id, folder)

    def _create_run(self, name: str | None, tags: dict[str, str]) -> str:
        described = {f"version.{package}": number for package, number in versions().items()}
        tags = {
            **tags,
            **described,
            "git_commit": git_commit() or "unknown",
            "mlflow.source.name": "slim",
        }
        return self._tracking.create_run(self._experiment, name, tags)

    def _log(
        self, run_id: str, params: dict[str, str], metrics: dict[str, float], tags: dict[str, str]
    ) -> None:
        self._tracking.log(
            run_id,
            {name: value[:VALUE_LIMIT] for name, value in params.items()},
            [
                [name, float(value), now(), 0]
                for name, value in metrics.items()
                if value is not None
            ],
            {name: value[:VALUE_LIMIT] for name, value in tags.items()},
        )


def summary(error: BaseException) -> str:
    """Return an error in one or two lines, with its type where it is not meant for people."""
    named = str(error) if isinstance(error, SlimError) else f"{type(error).__name__}: {error}"
    return "\n".join(named.strip().splitlines()[:2])


def published_tag(config) -> dict[str, str]:
    """Return the tag that names the studies' tables whose figures belong beside these, as a JSON
    list."""
    tables = config.tracking.get("published")
    return {"slim.published": json.dumps([str(table) for table in tables])} if tables else {}


def record_files(records: dict) -> dict[str, str]:
    """Return file name -> JSON Lines of what an evaluation measured question by question, window by
    window."""
    parts = {
        **{name: rows for name, rows in records.items() if name != "tasks"},
        **records.get("tasks", {}),
    }
    files = {}
    for name, rows in parts.items():
        if isinstance(rows, dict):  # columns
            rows = [
                dict(zip(rows, values, strict=True)) for values in zip(*rows.values(), strict=True)
            ]
        files[UNTRACKED.sub("_", name).replace("/", "_")] = "".join(
            json.dumps(row) + "\n" for row in rows
        )
    return files


def flatten(settings, prefix: str = "") -> dict[str, str]:
    """Flatten nested settings to ``{"a.b": "value"}``; what is keyed by patterns, such as
    ``*.q_proj``, stays one value."""
    if not isinstance(settings, dict) or any(UNTRACKED.search(str(key)) for key in settings):
        return {prefix: str(settings)}
    flat = {}
    for key, value in settings.items():
        flat.update(flatten(value, f"{prefix}.{key}" if prefix else str(key)))
    return flat

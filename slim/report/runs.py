"""The runs a report is about, read through an MLflow client: what they measured, which of them
failed and why."""

from __future__ import annotations

import base64
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from slim.checkpoints.store import digest
from slim.core.text import counted
from slim.tracking.connection import children

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

KIND, POINT, SKIPPED, PUBLISHED = "slim.kind", "slim.point", "slim.skipped", "slim.published"
SOURCES = ("source", "import")  # kinds of checkpoints that were trained elsewhere
FIRST_KINDS = (*SOURCES, "initialise")  # kinds that begin a chain
CLASSES = "classes.png"  # a run's picture of what a classifier confuses
# settings that do not change a result
PLACES = re.compile(r"^[+~]*(store|output|tracking|hydra|plan|ignore_limits)\b")
CREDENTIALS = re.compile(r"://[^/@\s]+@")
NO_REASON = "no reason recorded"


@dataclass(frozen=True)
class Row:
    """A checkpoint as ``results.json`` records it, with all that ``slim.report.table`` asks of a
    result.

    Attributes:
        label: name of the step, such as ``quantize gptq``; a source's is the model's.
        digest: hash that names the checkpoint.
        kind: of the step (``quantize``, ``prune``...), ``source`` for a source.
        method: class that made it; None for a source.
        settings: of the method.
        metrics: name -> figure, those of both parts and standard errors.
        metadata: what the checkpoint's files say of themselves.
        quality: ``metrics`` (name -> figure) and ``protocol`` of the quality.
        speed: the same of the speed.
        curves: [label, value, step] of a training.
        samples: ``prompt`` and ``answer`` of each.
    """

    label: str
    digest: str
    kind: str
    method: str | None
    settings: dict
    metrics: dict[str, float]
    metadata: dict
    quality: dict
    speed: dict
    curves: list
    samples: list[dict]

    @classmethod
    def from_record(cls, record: dict) -> Row:
        """Read one record of ``results.json``.

        Args:
            record: as :func:`slim.report.table.record` makes it.

        Returns:
            The row.

        Raises:
            KeyError: when an older version wrote it, which says less.
        """
        return cls(
            label=record["checkpoint"],
            digest=record["hash"],
            kind=record["kind"],
            method=record["method"],
            settings=record["settings"],
            metrics=record["metrics"],
            metadata=record["facts"],
            quality=cls._part(record, "quality"),
            speed=cls._part(record, "speed"),
            curves=record["curves"],
            samples=record["samples"],
        )

    @staticmethod
    def _part(record: dict, name: str) -> dict:
        """Return the figures and the protocol of the quality or the speed."""
        metrics = {metric: record["metrics"][metric] for metric in record["measured"][name]}
        return {"metrics": metrics, "protocol": record["protocol"][name] or {}}

    @property
    def protocol_digest(self) -> str:
        """Name for how the checkpoint was measured."""
        return digest([self.quality["protocol"], self.speed["protocol"]])


@dataclass(frozen=True)
class Chain:
    """A finished run.

    Attributes:
        run_id: of MLflow.
        name: of the run, or of a sweep's point.
        typed: the overrides, as on the command line.
        rows: the checkpoints from the source to the smallest.
        config: text of ``config.yaml``.
        classes: picture of what a classifier confuses and of its confidence, PNG in base64; empty
            where there is none.
    """

    run_id: str
    name: str
    typed: str
    rows: tuple[Row, ...]
    config: str = ""
    classes: str = ""

    @property
    def source(self) -> Row:
        return self.rows[0]

    @property
    def final(self) -> Row:
        return self.rows[-1]


@dataclass(frozen=True)
class Failure:
    """A run without results.

    Attributes:
        name: of the run, or of a sweep's point.
        typed: the overrides, as on the command line.
        status: as MLflow names it.
        reason: why, in words.
        skipped: whether the plan ruled it out before any work.
    """

    name: str
    typed: str
    status: str
    reason: str
    skipped: bool = False


@dataclass
class Collection:
    """All that a report shows.

    Attributes:
        title: of the page; empty: a default.
        chains: the runs with results.
        failures: the runs without.
        notes: sentences on what was left out.
        published: names of the studies' tables to set next to it.
    """

    title: str
    chains: list[Chain] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    published: list[str] = field(default_factory=list)


def collect(client: MlflowClient, run_ids: list[str], title: str | None = None) -> Collection:
    """Read runs; the same chain measured twice counts once.

    Args:
        client: of the store or server that holds the runs.
        run_ids: of runs and sweeps; a sweep's run stands for its points.
        title: of the report; None: what the first run says.
    """
    collection = Collection(title or "")
    repeated = running = 0
    seen: set[tuple[str, str]] = set()
    for run in _expand(client, run_ids, collection):
        _add_tables(collection, run)
        if run.info.status in ("RUNNING", "SCHEDULED"):
            running += 1
            continue
        if run.info.status != "FINISHED":
            collection.failures.append(_failure(run))
            continue
        for chain in _chains(client, run, collection):
            # the same checkpoint measured in another way is another result
            key = (chain.final.digest, chain.final.protocol_digest)
            if key in seen:
                repeated += 1
                continue
            seen.add(key)
            collection.chains.append(chain)
    # what failed and ran through later is no failure
    done = {chain.typed for chain in collection.chains}
    failures = []
    for failure in collection.failures:
        if failure.typed not in done:
            failures.append(failure)
    collection.failures = failures
    if repeated:
        collection.notes.append(
            f"{counted(repeated, 'run')} repeated a chain with the same protocol; such a chain is "
            "shown once."
        )
    if running:
        collection.notes.append(
            f"{counted(running, 'run')} had not ended when this report was made."
        )
    return collection


def _add_tables(collection: Collection, run: Run) -> None:
    """Add the published tables that a run asks for and no run before it did."""
    collection.published += [table for table in _tables(run) if table not in collection.published]


def without_places(typed: list[str]) -> list[str]:
    """Return the overrides that change a result, without those that say where things lie."""
    return [word for word in typed if not PLACES.match(word)]


def without_secrets(text: str) -> str:
    """Return ``text`` without user names and passwords in addresses: a page is handed on more
    easily than a store."""
    return CREDENTIALS.sub("://", text)


def _expand(client: MlflowClient, run_ids: list[str], collection: Collection) -> list[Run]:
    """Return the runs themselves, in the order they were started; titles and points without a run
    go to ``collection``."""
    runs: dict[str, Run] = {}
    for run_id in run_ids:
        # by id: a run asked for twice, and as a point of its sweep, counts once
        run = client.get_run(run_id)
        if run.data.tags.get(KIND) != "sweep":
            collection.title = collection.title or run.info.run_name
            # a point of a sweep may be asked for by its own id as well
            runs.setdefault(run_id, run)
            continue
        typed = " ".join(without_places(run.data.tags.get("overrides", "").split()))
        collection.title = collection.title or typed or run.info.run_name
        _add_tables(collection, run)
        for point in sweep_points(client, run):
            runs[point.info.run_id] = point
        collection.failures += _unstarted(client, run)
    return sorted(runs.values(), key=lambda run: (run.info.start_time, run.info.run_id))


def sweep_points(client: MlflowClient, sweep: Run) -> list[Run]:
    """Return one run per point of a sweep: the newest that finished, else the newest.

    Args:
        client: of the store or server that holds the sweep.
        sweep: its run, the parent of those of the points.
    """
    best: dict[str, Run] = {}
    for run in children(client, sweep.info.experiment_id, sweep.info.run_id):
        # a point that was run again keeps its number, not its run
        name = run.data.tags.get(POINT, run.info.run_id)
        if name not in best or _rank(run) >= _rank(best[name]):
            best[name] = run
    return list(best.values())


def _rank(run: Run) -> tuple[bool, int]:
    return run.info.status == "FINISHED", run.info.start_time


def _unstarted(client: MlflowClient, sweep: Run) -> list[Failure]:
    """Return the points of ``sweep.json`` that failed before they had a run."""
    # a sweep that was cut off has none
    summary = json.loads(artifact(client, sweep.info.run_id, "sweep.json") or "{}")
    failures = []
    for point in summary.get("points", []):
        if point.get("run_id") or point.get("status") in (None, "FINISHED", "RUNNING"):
            continue
        typed = " ".join(f"{key}={value}" for key, value in point["overrides"].items())
        name = f"point {point['number']}"
        failures.append(Failure(name, typed, point["status"], point.get("error") or NO_REASON))
    return failures


def _failure(run: Run) -> Failure:
    tags = run.data.tags
    reason = tags.get("error")
    if not reason:
        reason = "interrupted" if run.info.status == "KILLED" else NO_REASON
    name = tags.get(POINT) or run.info.run_name
    return Failure(
        name=name,
        typed=without_secrets(tags.get("overrides", name)),
        status=run.info.status,
        reason=without_secrets(reason),
        skipped=tags.get(SKIPPED) == "true",
    )


def _chains(client: MlflowClient, run: Run, collection: Collection) -> list[Chain]:
    """Return the chains of a finished run: one, or one per checkpoint where several were compared;
    why a run has none goes to the notes of ``collection``."""
    text = artifact(client, run.info.run_id, "results.json")
    if text is None:
        collection.notes.append(f"Left out: {run.info.run_name}, which has no results.json.")
        return []
    try:
        rows = [Row.from_record(record) for record in json.loads(text)]
    except (KeyError, TypeError, ValueError):
        collection.notes.append(
            f"Left out: {run.info.run_name}, whose results.json this version cannot read. Run the "
            "command again."
        )
        return []
    name = run.data.tags.get(POINT) or run.info.run_name
    typed = without_secrets(run.data.tags.get("overrides", ""))
    config = without_secrets(artifact(client, run.info.run_id, "config.yaml") or "")
    classes = ""
    if any("accuracy" in row.metrics for row in rows):
        classes = base64.b64encode(artifact_bytes(client, run.info.run_id, CLASSES) or b"").decode()
    chains = []
    for part in _parts(rows):
        chains.append(Chain(run.info.run_id, name, typed, tuple(part), config, classes))
        classes = ""  # one picture shows all checkpoints of the run
    return chains


def _parts(rows: list[Row]) -> list[list[Row]]:
    """Split the rows where another chain begins."""
    parts: list[list[Row]] = []
    for row in rows:
        if not parts or row.kind in FIRST_KINDS:
            parts.append([])
        parts[-1].append(row)
    return parts


def artifact(client: MlflowClient, run_id: str, name: str) -> str | None:
    """Return the text of a run's artifact.

    Args:
        client: of the store or server that holds the run.
        run_id: of the run.
        name: path of the artifact within the run.

    Returns:
        None if the run has none of that name, or it cannot be read.
    """
    content = artifact_bytes(client, run_id, name)
    return None if content is None else content.decode("utf-8")


def artifact_bytes(client: MlflowClient, run_id: str, name: str) -> bytes | None:
    """Return a run's artifact as it is; arguments and None as for :func:`artifact`."""
    from mlflow.exceptions import MlflowException

    with TemporaryDirectory() as folder:
        try:
            return Path(client.download_artifacts(run_id, name, folder)).read_bytes()
        except (MlflowException, OSError):
            return None


def _tables(run: Run) -> list[str]:
    """Return the published tables that a run asks for: a JSON list, or names with commas
    between."""
    text = run.data.tags.get(PUBLISHED, "")
    try:
        value: Any = json.loads(text)
    except ValueError:
        value = text.split(",")
    if not isinstance(value, list):
        value = [value]
    names = []
    for item in value:
        name = str(item).strip()
        # an option left empty arrives as "None"
        if name not in ("", "None"):
            names.append(name)
    return names

"""The runs a report is about, read through an MLflow client: what they measured, which of them
failed and why."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from slim.checkpoints.store import digest
from slim.tracking.connection import children

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

KIND, POINT, SKIPPED, PUBLISHED = "slim.kind", "slim.point", "slim.skipped", "slim.published"
SOURCES = ("source", "import")  # kinds of checkpoints that were trained elsewhere
FIRST_KINDS = (*SOURCES, "initialise")  # kinds that begin a chain
# settings that do not change a result
PLACES = re.compile(r"^[+~]*(store|output|tracking|hydra|plan|ignore_limits)\b")
CREDENTIALS = re.compile(r"://[^/@\s]+@")
NO_REASON = "no reason recorded"


@dataclass(frozen=True)
class Row:
    """A checkpoint as ``results.json`` records it, with all that ``slim.report.table`` asks of a
    result.

    quality, speed: ``metrics`` (name -> figure) and ``protocol`` of each; ``metrics`` has those of
    both and standard errors."""

    label: str
    digest: str
    kind: str
    method: str | None
    settings: dict
    metrics: dict[str, float]
    facts: dict
    quality: dict
    speed: dict
    curves: list
    samples: list[dict]

    @classmethod
    def from_record(cls, record: dict) -> Row:
        """Read one record of ``results.json``. Raises ``KeyError`` for one of an older version,
        which says less."""
        parts = {
            name: {
                "metrics": {
                    metric: record["metrics"][metric] for metric in record["measured"][name]
                },
                "protocol": record["protocol"][name] or {},
            }
            for name in ("quality", "speed")
        }
        names = ("kind", "method", "settings", "metrics", "facts", "curves", "samples")
        return cls(
            record["checkpoint"], record["hash"], **{name: record[name] for name in names}, **parts
        )

    @property
    def protocol_digest(self) -> str:
        """Name for how the checkpoint was measured."""
        return digest([self.quality["protocol"], self.speed["protocol"]])


@dataclass(frozen=True)
class Chain:
    """A finished run: the checkpoints from the source to the smallest, in order."""

    run_id: str
    name: str
    typed: str  # the overrides, as on the command line
    rows: tuple[Row, ...]
    config: str = ""  # config.yaml

    @property
    def source(self) -> Row:
        return self.rows[0]

    @property
    def final(self) -> Row:
        return self.rows[-1]


@dataclass(frozen=True)
class Failure:
    """A run without results. skipped: the plan ruled it out before any work."""

    name: str
    typed: str
    status: str
    reason: str
    skipped: bool = False


@dataclass
class Collection:
    """All that a report shows. notes: sentences on what was left out. published: tables of the
    studies to set next to it."""

    title: str
    chains: list[Chain] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    published: list[str] = field(default_factory=list)


def collect(client: MlflowClient, run_ids: list[str], title: str | None = None) -> Collection:
    """Read the runs ``run_ids``; a sweep's run stands for its points. The same chain measured twice
    counts once."""
    found = Collection(title or "")
    repeated, running = 0, 0
    seen: set[tuple[str, str]] = set()
    for run in _expand(client, run_ids, found):
        found.published += [table for table in _tables(run) if table not in found.published]
        if run.info.status in ("RUNNING", "SCHEDULED"):
            running += 1
            continue
        if run.info.status != "FINISHED":
            found.failures.append(_failure(run))
            continue
        for chain in _chains(client, run, found):
            key = (chain.final.digest, chain.final.protocol_digest)
            repeated += key in seen
            if key not in seen:
                seen.add(key)
                found.chains.append(chain)
    done = {chain.typed for chain in found.chains}
    # it ran through later
    found.failures = [failure for failure in found.failures if failure.typed not in done]
    if repeated:
        found.notes.append(
            f"{count(repeated, 'run')} repeated a chain with the same protocol; such a chain is "
            "shown once."
        )
    if running:
        found.notes.append(f"{count(running, 'run')} had not ended when this report was made.")
    return found


def without_places(typed: list[str]) -> list[str]:
    """Return the overrides that change a result, without those that say where things lie."""
    return [word for word in typed if not PLACES.match(word)]


def without_secrets(text: str) -> str:
    """Return ``text`` without user names and passwords in addresses: a page is handed on more
    easily than a store."""
    return CREDENTIALS.sub("://", text)


def count(number: int, noun: str) -> str:
    """Return ``1 run`` or ``2 runs``."""
    return f"{number} {noun}" + ("" if number == 1 else "s")


def _expand(client: MlflowClient, run_ids: list[str], found: Collection) -> list[Run]:
    """Return the runs themselves, in the order they were started; titles and points without a run
    go to ``found``."""
    runs: dict[str, Run] = {}
    for run_id in run_ids:
        run = client.get_run(run_id)
        if run.data.tags.get(KIND) != "sweep":
            found.title = found.title or run.info.run_name
            runs.setdefault(run_id, run)
            continue
        found.title = (
            found.title
            or " ".join(without_places(run.data.tags.get("overrides", "").split()))
            or run.info.run_name
        )
        found.published += [table for table in _tables(run) if table not in found.published]
        points = sweep_points(client, run)
        runs.update({point.info.run_id: point for point in points})
        found.failures += _unstarted(client, run)
    return sorted(runs.values(), key=lambda run: (run.info.start_time, run.info.run_id))


def sweep_points(client: MlflowClient, sweep: Run) -> list[Run]:
    """Return one run per point of a sweep: the newest that finished, else the newest."""
    best: dict[str, Run] = {}
    for run in children(client, sweep.info.experiment_id, sweep.info.run_id):
        name = run.data.tags.get(POINT, run.info.run_id)
        rank = lambda one: (one.info.status == "FINISHED", one.info.start_time)  # noqa: E731
        if name not in best or rank(run) >= rank(best[name]):
            best[name] = run
    return list(best.values())


def _unstarted(client: MlflowClient, sweep: Run) -> list[Failure]:
    """Return the points of ``sweep.json`` that failed before they had a run."""
    summary = json.loads(artifact(client, sweep.info.run_id, "sweep.json") or "{}")
    failures = []
    for point in summary.get("points", []):
        if point.get("run_id") or point.get("status") in (None, "FINISHED", "RUNNING"):
            continue
        typed = " ".join(f"{key}={value}" for key, value in point["overrides"].items())
        failures.append(
            Failure(
                f"point {point['number']}", typed, point["status"], point.get("error") or NO_REASON
            )
        )
    return failures


def _failure(run: Run) -> Failure:
    tags = run.data.tags
    reason = tags.get("error") or ("interrupted" if run.info.status == "KILLED" else NO_REASON)
    name = tags.get(POINT) or run.info.run_name
    typed = without_secrets(tags.get("overrides", name))
    return Failure(
        name, typed, run.info.status, without_secrets(reason), tags.get(SKIPPED) == "true"
    )


def _chains(client: MlflowClient, run: Run, found: Collection) -> list[Chain]:
    """Return the chains of a finished run: one, or one per checkpoint where several were
    compared."""
    text = artifact(client, run.info.run_id, "results.json")
    if text is None:
        found.notes.append(f"Left out: {run.info.run_name}, which has no results.json.")
        return []
    try:
        rows = [Row.from_record(record) for record in json.loads(text)]
    except (KeyError, TypeError, ValueError):
        found.notes.append(
            f"Left out: {run.info.run_name}, whose results.json this version cannot read. Run the "
            "command again."
        )
        return []
    starts = [index for index, row in enumerate(rows) if index == 0 or row.kind in FIRST_KINDS]
    parts = [rows[start:end] for start, end in zip(starts, [*starts[1:], len(rows)], strict=True)]
    name, typed = (
        run.data.tags.get(POINT) or run.info.run_name,
        without_secrets(run.data.tags.get("overrides", "")),
    )
    config = without_secrets(artifact(client, run.info.run_id, "config.yaml") or "")
    return [Chain(run.info.run_id, name, typed, tuple(part), config) for part in parts if part]


def artifact(client: MlflowClient, run_id: str, name: str) -> str | None:
    """Return the text of a run's artifact, or None if it has none of that name."""
    from mlflow.exceptions import MlflowException

    with TemporaryDirectory() as folder:
        try:
            return Path(client.download_artifacts(run_id, name, folder)).read_text(encoding="utf-8")
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
    names = value if isinstance(value, list) else [value]
    return [str(name).strip() for name in names if str(name).strip() not in ("", "None")]

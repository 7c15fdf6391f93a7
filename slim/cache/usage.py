"""Which runs use which results of the store, as MLflow has recorded it.

A run is a command, or a point of a sweep. The checkpoints of its chain are runs below it, tagged
``hash``, ``folder`` and ``lineage`` (``slim/tracking/tracker.py``). A run that is deleted in
MLflow, or stands below one that is, uses nothing."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from slim.tracking.connection import PARENT

HASH = re.compile(r"\(([0-9a-f]+)\)")
ENDED_BADLY = ("FAILED", "KILLED")


@dataclass(frozen=True)
class Checkpointed:
    """A checkpoint in a run's chain. lineage: hashes of the chain up to it, its own included."""

    hash: str
    folder: str
    lineage: frozenset[str]


@dataclass
class Run:
    """A command or a point of a sweep. started: seconds since 1970. chain: its checkpoints."""

    name: str
    experiment: str
    status: str
    started: float
    chain: list[Checkpointed] = field(default_factory=list)

    def finals(self) -> list[Checkpointed]:
        """Return the checkpoints from which no other of the run was made."""
        return [
            one
            for one in self.chain
            if not any(one.hash in other.lineage for other in self.chain if other.hash != one.hash)
        ]


def read_runs(uris: Iterable[str]) -> list[Run]:
    """Return all runs of the tracking stores ``uris`` that are not deleted. ``SlimError`` if a
    store does not answer."""
    return [run for uri in uris for run in _runs(uri)]


def _runs(uri: str) -> list[Run]:
    records, names = _records(uri)
    found = {
        run_id: Run(
            record.info.run_name,
            names[record.info.experiment_id],
            record.info.status,
            record.info.start_time / 1000,
        )
        for run_id, record in records.items()
    }
    for record in records.values():
        tags = record.data.tags
        if "hash" in tags and _stands(record, records):
            hashes = frozenset(HASH.findall(tags.get("lineage", ""))) | {tags["hash"]}
            found[tags[PARENT]].chain.append(
                Checkpointed(tags["hash"], tags.get("folder", ""), hashes)
            )
    return [run for run_id, run in found.items() if "hash" not in records[run_id].data.tags]


def _stands(record, records: dict) -> bool:
    """Whether everything above a checkpoint's record is still there."""
    parent = record.data.tags.get(PARENT)
    if parent is None:
        return "hash" not in record.data.tags
    return parent in records and _stands(records[parent], records)


def _records(uri: str) -> tuple[dict, dict[str, str]]:
    """Return run id -> MLflow's record of every run that is not deleted, and experiment id ->
    name."""
    from mlflow.exceptions import MlflowException

    from slim.core.errors import SlimError
    from slim.tracking.connection import connect, search_runs

    try:
        client = connect(uri)
        names = {found.experiment_id: found.name for found in client.search_experiments()}
        records = {
            record.info.run_id: record for record in reversed(search_runs(client, list(names)))
        }
    except MlflowException as error:
        raise SlimError(
            f"The runs in {uri} cannot be read: {str(error).splitlines()[0]}"
        ) from error
    return records, names


def users(runs: Iterable[Run], folder: Path) -> list[Run]:
    """Return the runs that have the result in ``folder`` in their chain."""
    return [run for run in runs if any(_is(one, folder) for one in run.chain)]


def final_users(runs: Iterable[Run], folder: Path) -> list[Run]:
    """Return the runs whose chain ends in the result in ``folder``."""
    return [run for run in runs if any(_is(one, folder) for one in run.finals())]


def _is(one: Checkpointed, folder: Path) -> bool:
    """Whether a checkpoint is the result in ``folder``: by its hash, so that a store can be moved,
    or by its folder."""
    return folder.name.endswith(f"-{one.hash}") or one.folder == str(folder)

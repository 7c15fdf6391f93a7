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
    """A checkpoint in a run's chain.

    Attributes:
        hash: name of the result.
        folder: where it was when the run recorded it.
        lineage: hashes of the chain up to it, its own included.
    """

    hash: str
    folder: str
    lineage: frozenset[str]


@dataclass
class Run:
    """A command or a point of a sweep.

    Attributes:
        name: as MLflow shows it.
        experiment: name of its experiment.
        status: as MLflow has it.
        started: seconds since 1970.
        chain: its checkpoints.
    """

    name: str
    experiment: str
    status: str
    started: float
    chain: list[Checkpointed] = field(default_factory=list)

    def finals(self) -> list[Checkpointed]:
        """Return the checkpoints from which no other of the run was made."""
        used = set()
        for checkpoint in self.chain:
            used |= checkpoint.lineage - {checkpoint.hash}
        return [checkpoint for checkpoint in self.chain if checkpoint.hash not in used]


def read_runs(uris: Iterable[str]) -> list[Run]:
    """Return all runs of the tracking stores ``uris`` that are not deleted.

    Raises:
        SlimError: when a store does not answer.
    """
    runs = []
    for uri in uris:
        runs.extend(_runs(uri))
    return runs


def _runs(uri: str) -> list[Run]:
    records, names = _records(uri)
    runs = {}  # those of commands and points: a checkpoint's run has a hash
    for run_id, record in records.items():
        if "hash" not in record.data.tags:
            info = record.info
            experiment = names[info.experiment_id]
            runs[run_id] = Run(info.run_name, experiment, info.status, info.start_time / 1000)
    # in a second pass: a checkpoint's record may come before that of its run
    for record in records.values():
        tags = record.data.tags
        if "hash" in tags and _stands(record, records):
            hashes = frozenset(HASH.findall(tags.get("lineage", ""))) | {tags["hash"]}
            checkpoint = Checkpointed(tags["hash"], tags.get("folder", ""), hashes)
            runs[tags[PARENT]].chain.append(checkpoint)
    return list(runs.values())


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
        names = {}
        for experiment in client.search_experiments():
            names[experiment.experiment_id] = experiment.name
        records = {}
        # MLflow gives the newest first; the tables name the runs in the order they were made
        for record in reversed(search_runs(client, list(names))):
            records[record.info.run_id] = record
    except MlflowException as error:
        raise SlimError(
            f"The runs in {uri} cannot be read: {str(error).splitlines()[0]}"
        ) from error
    return records, names


def users(runs: Iterable[Run], folder: Path) -> list[Run]:
    """Return the runs that have a result in their chain.

    Args:
        runs: all runs.
        folder: of the result.
    """
    return [run for run in runs if _holds(run.chain, folder)]


def final_users(runs: Iterable[Run], folder: Path) -> list[Run]:
    """Return the runs whose chain ends in a result.

    Args:
        runs: all runs.
        folder: of the result.
    """
    return [run for run in runs if _holds(run.finals(), folder)]


def _holds(checkpoints: list[Checkpointed], folder: Path) -> bool:
    """Whether one of some checkpoints is the result in ``folder``: by its hash, so that a store can
    be moved, or by its folder."""
    for checkpoint in checkpoints:
        if folder.name.endswith(f"-{checkpoint.hash}") or checkpoint.folder == str(folder):
            return True
    return False

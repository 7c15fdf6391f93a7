"""What the word after ``python -m slim.report`` stands for: an experiment, a sweep, a run, or a
folder of a sweep."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from slim.core.errors import SlimError, did_you_mean
from slim.core.io import read_json
from slim.report.runs import KIND
from slim.tracking.connection import PARENT, search_runs, tracking_uri
from slim.tracking.connection import connect as client_of

if TYPE_CHECKING:
    from mlflow import MlflowClient

SUMMARY = "sweep.json"
STORE = "runs"  # where results are kept unless store= says otherwise


def connect(what: str, store: str | None, uri: str | None) -> MlflowClient:
    """Return a client for the server ``uri`` or the SQLite file of ``store``.

    Without both it is that of the sweep in the folder ``what``, or of the default store.
    Raises ``SlimError`` if nothing has been tracked there, or the server does not answer.
    """
    header = summary(what) if store is None and uri is None else {}
    root, uri = (
        Path(store or header.get("store") or STORE).expanduser().absolute(),
        uri or header.get("uri"),
    )
    if uri is None and not (root / "mlflow.db").is_file():
        raise SlimError(
            f"There are no tracked runs in {root}. Give --store FOLDER as in store=FOLDER, or "
            "--uri of a server."
        )
    return client_of(tracking_uri(root, uri))


def find(client: MlflowClient, what: str) -> tuple[list[str], str | None]:
    """Return the ids of the runs that ``what`` means, and a title (None: let the runs say it).

    what: name of an experiment, id or name of a sweep's or run's run, a multirun folder. Raises
    ``SlimError`` for nothing."""
    run_id = summary(what).get("run_id") or _run_by_id(client, what)
    if run_id is not None:
        return [run_id], None
    experiments = client.search_experiments()
    for experiment in experiments:
        if experiment.name == what:
            return _tops(client, [experiment.experiment_id], what), f"Experiment {what}"
    named = _by_name(client, [experiment.experiment_id for experiment in experiments], what)
    if named is not None:
        return [named], None
    if Path(what).is_dir():
        raise SlimError(
            f"The folder {what} has no {SUMMARY}: it is none of a sweep. Give the sweep's id or "
            "its experiment."
        )
    names = [experiment.name for experiment in experiments if experiment.name != "Default"]
    raise SlimError(
        f"Nothing is called '{what}'. Give an experiment "
        f"({', '.join(names) or 'there is none yet'}), the id or name of a "
        f"run or sweep, or a multirun folder.{did_you_mean(what, names)}"
    )


def summary(folder: str) -> dict:
    """Return ``sweep.json`` of a multirun folder, or an empty dict: experiments may be named as
    folders are.

    Raises ``SlimError`` if it cannot be read or names no run.
    """
    path = Path(folder) / SUMMARY
    if not path.is_file():
        return {}
    found = read_json(path)
    if not found.get("run_id"):
        raise SlimError(f"{path} names no run. Give the sweep's id or its experiment.")
    return found


def _run_by_id(client: MlflowClient, what: str) -> str | None:
    from mlflow.exceptions import MlflowException

    try:
        return client.get_run(what).info.run_id
    except MlflowException:
        return None


def _tops(client: MlflowClient, experiments: list[str], what: str) -> list[str]:
    """Return the runs of an experiment that are nobody's child."""
    runs = [
        run.info.run_id for run in search_runs(client, experiments) if PARENT not in run.data.tags
    ]
    if not runs:
        raise SlimError(f"The experiment {what} has no runs yet.")
    return runs


def _by_name(client: MlflowClient, experiments: list[str], what: str) -> str | None:
    """Return the newest run called ``what`` that is no stage; a sweep is also found by
    ``slim.sweep``."""
    found = [
        run
        for run in search_runs(client, experiments)
        if run.data.tags.get(KIND, "stage" if PARENT in run.data.tags else "run") != "stage"
        and what in (run.info.run_name, run.data.tags.get("slim.sweep"))
    ]
    return found[-1].info.run_id if found else None

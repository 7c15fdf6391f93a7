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
    from mlflow.entities import Run

SUMMARY = "sweep.json"
STORE = "runs"  # where results are kept unless store= says otherwise


def connect(what: str, store: str | None, uri: str | None) -> MlflowClient:
    """Return a client for the server ``uri`` or the SQLite file of ``store``.

    Args:
        what: what the report is about; where it is a sweep's folder, its ``sweep.json`` stands for
            arguments that are None.
        store: folder of the results; None: that of the sweep, or the default.
        uri: address of a tracking server; None: that of the sweep, or the file in the store.

    Returns:
        MLflow's client.

    Raises:
        SlimError: when nothing has been tracked there, or the server does not answer.
    """
    header = summary(what) if store is None and uri is None else {}
    root = Path(store or header.get("store") or STORE).expanduser().absolute()
    address = uri or header.get("uri")
    # MLflow would create an empty database where there is none
    if address is None and not (root / "mlflow.db").is_file():
        raise SlimError(
            f"There are no tracked runs in {root}. Give --store FOLDER as in store=FOLDER, or "
            "--uri of a server."
        )
    return client_of(tracking_uri(root, address))


def find(client: MlflowClient, what: str) -> tuple[list[str], str | None]:
    """Return the runs that a word on the command line means.

    Args:
        client: of the store or server (:func:`connect`).
        what: name of an experiment, id or name of a sweep's or run's run, a multirun folder.

    Returns:
        The ids of the runs, and a title (None: let the runs say it).

    Raises:
        SlimError: when nothing has that name.
    """
    # a folder first, then an id: both are more certain than a name
    run_id = summary(what).get("run_id") or _run_by_id(client, what)
    if run_id is not None:
        return [run_id], None
    experiments = client.search_experiments()
    for experiment in experiments:
        if experiment.name == what:
            return _tops(client, [experiment.experiment_id], what), f"Experiment {what}"
    ids = [experiment.experiment_id for experiment in experiments]
    run_id = _by_name(client, ids, what)
    if run_id is not None:
        return [run_id], None
    if Path(what).is_dir():
        raise SlimError(
            f"The folder {what} has no {SUMMARY}: it is not a sweep's folder. Give the sweep's id "
            "or its experiment."
        )
    # MLflow makes an experiment of that name in every store
    names = [experiment.name for experiment in experiments if experiment.name != "Default"]
    raise SlimError(
        f"Nothing is called '{what}'. Give an experiment "
        f"({', '.join(names) or 'there is none yet'}), the id or name of a "
        f"run or sweep, or a multirun folder.{did_you_mean(what, names)}"
    )


def summary(folder: str) -> dict:
    """Return ``sweep.json`` of a multirun folder, or an empty dict: experiments may be named as
    folders are.

    Raises:
        SlimError: when it cannot be read or names no run.
    """
    path = Path(folder) / SUMMARY
    if not path.is_file():
        return {}
    sweep = read_json(path)
    if not sweep.get("run_id"):
        raise SlimError(f"{path} names no run. Give the sweep's id or its experiment.")
    return sweep


def _run_by_id(client: MlflowClient, what: str) -> str | None:
    from mlflow.exceptions import MlflowException

    try:
        return client.get_run(what).info.run_id
    except MlflowException:
        return None


def _tops(client: MlflowClient, experiments: list[str], what: str) -> list[str]:
    """Return the runs of an experiment that are nobody's child."""
    runs = []
    for run in search_runs(client, experiments):
        if PARENT not in run.data.tags:
            runs.append(run.info.run_id)
    if not runs:
        raise SlimError(f"The experiment {what} has no runs yet.")
    return runs


def _by_name(client: MlflowClient, experiments: list[str], what: str) -> str | None:
    """Return the newest run called ``what`` that is no stage; a sweep is also found by
    ``slim.sweep``."""
    newest = None
    # the search answers oldest first
    for run in search_runs(client, experiments):
        if _is_stage(run):
            continue
        if what in (run.info.run_name, run.data.tags.get("slim.sweep")):
            newest = run.info.run_id
    return newest


def _is_stage(run: Run) -> bool:
    """Whether a run is a stage of another; without a tag its having a parent says so."""
    if KIND in run.data.tags:
        return run.data.tags[KIND] == "stage"
    return PARENT in run.data.tags

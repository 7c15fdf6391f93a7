"""Where runs are recorded: the address of the tracking store, a client for it, and what it holds.

The default store is a SQLite file with an artifact folder beside it; any tracking server serves by
its address."""

from __future__ import annotations

import logging
import os
import sqlite3
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from slim.core.errors import SlimError

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

PARENT = "mlflow.parentRunId"
PAGE = 1000  # runs asked for at a time
# by address: connecting checks the tables' schema, once per process is enough
_clients: dict[str, MlflowClient] = {}


def connect(uri: str) -> MlflowClient:
    """Return a client whose store exists and answers. Raises ``SlimError`` if it does not."""
    path = Path(uri.removeprefix("sqlite:///")) if uri.startswith("sqlite:///") else None
    if uri in _clients and path is not None and path.exists():
        return _clients[uri]
    _clients[uri] = _connect(uri, path)
    return _clients[uri]


def _connect(uri: str, path: Path | None) -> MlflowClient:
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
    from filelock import FileLock
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    for noisy in ("alembic", "mlflow.store.db.utils"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
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


def search_runs(client: MlflowClient, experiments: list[str], query: str = "") -> list[Run]:
    """Return all runs of some experiments that ``query`` finds, the oldest first, however many
    pages they fill."""
    runs, token = [], None
    while experiments:
        page = client.search_runs(
            experiments,
            query,
            max_results=PAGE,
            order_by=["attributes.start_time"],
            page_token=token,
        )
        runs, token = [*runs, *page], page.token
        if not token:
            break
    return runs


def children(client: MlflowClient, experiment: str, run_id: str) -> list[Run]:
    """Return the runs of an experiment whose parent is the run ``run_id``, the oldest first."""
    return search_runs(client, [experiment], f"tags.`{PARENT}` = '{run_id}'")


def tracking_uri(root: Path, uri: str | None) -> str:
    """Return where to track: ``uri``, or the SQLite file of the store."""
    return uri or f"sqlite:///{root / 'mlflow.db'}"


def ui_command(uri: str) -> str:
    """Return the one command that opens the browser's view of the runs."""
    return (
        uri
        if uri.startswith("http")
        else f"{sys.executable} -m mlflow ui --backend-store-uri {uri}"
    )

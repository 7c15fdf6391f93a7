"""Where runs are recorded: the address of the tracking store, a client for it, and what it holds.

The default store is a SQLite file with an artifact folder next to it; any tracking server serves by
its address.
"""

from __future__ import annotations

import logging
import os
import shlex
import socket
import sqlite3
import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote, unquote, urlsplit
from urllib.request import getproxies

from slim.core.errors import SlimError

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

SQLITE = "sqlite:///"
NEW = ".new"  # end of the name of a database while its tables are made
SPECIAL = "?#%"  # characters that mean something in an address
LOCAL_SERVER = "http://127.0.0.1:5000"  # what "mlflow ui" starts
MENU = "workflowType=machine_learning"  # else the page has MLflow's menu for prompts and agents
PARENT = "mlflow.parentRunId"
ANSWER_SECONDS = 5.0  # how long a server may take to be there
REASON_LIMIT = 200  # characters of MLflow's own reason, which may hold a whole page
START_IT = "Start the server, or leave tracking.uri out to track into a local file."
BEGIN_ANEW = "Move the file elsewhere to begin another: results are kept apart from it."
PAGE = 1000  # runs asked for at a time
# by address: connecting checks the tables' schema, once per process is enough
_clients: dict[str, MlflowClient] = {}


def tracking_uri(root: Path, uri: str | None) -> str:
    """Return where to track.

    Args:
        root: the store.
        uri: address of a tracking server or database; None for the SQLite file of the store.
    """
    return uri or database_uri(root / "mlflow.db")


def database_uri(path: Path) -> str:
    """Return the address of a SQLite file, with the characters escaped that mean something in an
    address."""
    text = str(path)
    if any(character in text for character in SPECIAL):
        # everything else is left as it is, so that an address stays the same between versions
        text = "".join(quote(letter) if letter in SPECIAL else letter for letter in text)
    return SQLITE + text


def database_path(uri: str) -> Path | None:
    """Return the file of a SQLite address, None for any other address."""
    if not uri.startswith(SQLITE):
        return None
    return Path(unquote(uri.removeprefix(SQLITE)))


def browse_lines(uri: str, experiment_id: str | None = None) -> dict[str, str]:
    """Return what to type and to open to see the runs, by what is said of it.

    Args:
        uri: where they are tracked.
        experiment_id: the experiment whose runs are to be seen; None where no server has given it
            one yet.
    """
    page = f"/#/experiments/{experiment_id}/runs?{MENU}" if experiment_id else ""
    if uri.startswith("http"):
        return {"browse the runs": f"{uri.rstrip('/')}{page}"}
    command = [sys.executable, "-m", "mlflow", "ui", "--backend-store-uri", uri]
    return {"browse the runs": shlex.join(command), "then open": f"{LOCAL_SERVER}{page}"}


def server_problem(uri: str | None) -> str | None:
    """Say that a tracking server does not answer, with what to do; None where it does, and for a
    file. Takes at most a few seconds and loads nothing.

    Args:
        uri: address of a server or database; None for the store's own file.
    """
    address = urlsplit(uri or "")
    # through a proxy nothing can be said without asking it
    if address.scheme not in ("http", "https") or not address.hostname or getproxies():
        return None
    port = address.port or {"http": 80, "https": 443}[address.scheme]
    try:
        socket.create_connection((address.hostname, port), timeout=ANSWER_SECONDS).close()
    except OSError as error:
        reason = error.strerror or str(error)
        return f"The tracking server {uri} does not answer ({reason}).\n{START_IT}"
    return None


def connect(uri: str) -> MlflowClient:
    """Return a client whose store exists and answers.

    Raises:
        SlimError: when it does not.
    """
    path = database_path(uri)
    if uri in _clients and path is not None and path.exists():
        return _clients[uri]
    _clients[uri] = _connect(uri, path)
    return _clients[uri]


def _connect(uri: str, path: Path | None) -> MlflowClient:
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    problem = server_problem(uri)
    if problem is not None:
        raise SlimError(problem)
    for noisy in ("alembic", "mlflow.store.db.utils"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    try:
        return _answering_client(uri) if path is None else _database_client(uri, path)
    except (MlflowException, OSError, sqlite3.Error, SQLAlchemyError) as error:
        reason = str(error).splitlines()[0]
        raise SlimError(
            f"The tracking store {uri} cannot be used: {reason[:REASON_LIMIT]}\n"
            f"{START_IT if path is None else BEGIN_ANEW}"
        ) from error


def _answering_client(uri: str) -> MlflowClient:
    from mlflow import MlflowClient

    client = MlflowClient(uri)
    client.search_experiments(max_results=1)
    return client


def _database_client(uri: str, path: Path) -> MlflowClient:
    from filelock import FileLock

    _require_unescaping(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{path}.lock"):  # two processes creating the tables at once kill one another
        # MLflow makes the folders of the address as it is written, also where it has escapes
        written = Path(uri.removeprefix(SQLITE))
        new = [folder for folder in written.parents if not folder.exists()]
        if not path.exists():
            _create_database(uri, path)
        _use_write_ahead_log(path)
        client = _answering_client(uri)
        for folder in new:
            with suppress(OSError):  # something is in it
                folder.rmdir()
        return client


def _create_database(uri: str, path: Path) -> None:
    """Make the tables in another file, which then gets its name: a process that is killed between
    two of the dozens of steps would leave a database that MLflow cannot open again."""
    new = path.with_name(path.name + NEW)
    for ending in ("", "-journal", "-wal", "-shm"):
        new.with_name(new.name + ending).unlink(missing_ok=True)
    client = _answering_client(uri + NEW)
    client._tracking_client.store.engine.dispose()  # closes the file
    new.replace(path)


def _require_unescaping(path: Path) -> None:
    """Raise ``SlimError`` where the database library takes escapes in an address literally (below
    SQLAlchemy 2.1), and the path needs some."""
    if not any(character in str(path) for character in SPECIAL):
        return
    from sqlalchemy.engine import make_url

    if make_url(f"{SQLITE}%25").database != "%":
        raise SlimError(
            f"MLflow cannot keep its database in {path.parent}: a path with {' '.join(SPECIAL)} "
            "needs SQLAlchemy 2.1.\nUse store=FOLDER without these characters."
        )


def _use_write_ahead_log(path: Path) -> None:
    """Let several processes read while one writes."""
    connection = sqlite3.connect(path, timeout=30)
    try:
        connection.execute("PRAGMA journal_mode=WAL")
    finally:
        connection.close()


def search_runs(client: MlflowClient, experiments: list[str], query: str = "") -> list[Run]:
    """Return all runs of some experiments, the oldest first, however many pages they fill.

    Args:
        client: of the tracking store.
        experiments: ids of the experiments.
        query: which runs, in MLflow's own words; all by default.
    """
    runs = []
    token = None
    while experiments:
        page = client.search_runs(
            experiments,
            query,
            max_results=PAGE,
            order_by=["attributes.start_time"],
            page_token=token,
        )
        runs.extend(page)
        token = page.token
        if not token:
            break
    return runs


def children(client: MlflowClient, experiment: str, run_id: str) -> list[Run]:
    """Return the runs below another one, the oldest first.

    Args:
        client: of the tracking store.
        experiment: id of the experiment.
        run_id: the run whose children are wanted.
    """
    return search_runs(client, [experiment], f"tags.`{PARENT}` = '{run_id}'")

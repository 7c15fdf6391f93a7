"""What goes to MLflow, call by call; what a server does not take is kept in the store and sent by
the next run.

``outbox/<name>/`` in the store holds ``calls.jsonl`` (a call per line, in order), ``state.json``
(how many were sent, and which run of the server stands for which run that began without one) and
copies of files. Its writer holds a lock on it until its run ends; whoever tracks next into the same
place sends it."""

from __future__ import annotations

import json
import shlex
import shutil
import sys
import time
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slim.core.console import say, warn
from slim.core.errors import SlimError
from slim.core.io import write_json
from slim.tracking import connection
from slim.tracking.connection import PARENT
from slim.tracking.liveness import PROCESS, close_dead_runs, process_tag

if TYPE_CHECKING:
    from mlflow import MlflowClient

BATCH = 1000  # the most metrics MLflow takes in one call
PARAMS = 100  # the most parameters
# What MLflow's page of an experiment shows first: runs, or the traces of an agent.
EXPERIMENT_KIND = "mlflow.experimentKind"
MODEL_DEVELOPMENT = "custom_model_development"


def apply(client: MlflowClient, call: str, arguments: dict, ids: dict[str, str]) -> str | None:
    """Make one call to MLflow; of ``create_run`` return the run's id.

    Args:
        client: of the tracking store.
        call: ``create_run`` or a key of ``CALLS``.
        arguments: plain JSON values, ``run`` among them.
        ids: run that began without a server -> the server's run.
    """
    arguments = {**arguments, "run": ids.get(arguments["run"], arguments["run"])}
    if call == "create_run":
        tags = dict(arguments["tags"])
        if PARENT in tags:
            tags[PARENT] = ids.get(tags[PARENT], tags[PARENT])
        experiment = open_experiment(client, arguments["experiment"], arguments["place"])
        return client.create_run(experiment, arguments["time"], tags, arguments["name"]).info.run_id
    CALLS[call](client, **arguments)
    return None


def open_experiment(client: MlflowClient, name: str, place: str | None = None) -> str:
    """Return the id of an experiment, made if it is not there.

    Args:
        client: of the tracking store.
        name: the experiment's name.
        place: address for the artifacts of a new experiment; None for the server's own choice.

    Raises:
        SlimError: when an experiment of that name was deleted: MLflow keeps the name.
    """
    from mlflow.exceptions import MlflowException

    experiment = client.get_experiment_by_name(name)
    if experiment is None:
        try:
            return client.create_experiment(name, place, {EXPERIMENT_KIND: MODEL_DEVELOPMENT})
        except MlflowException:  # another process was faster, or the server refuses
            experiment = client.get_experiment_by_name(name)
            if experiment is None:
                raise
    number = experiment.experiment_id
    if experiment.lifecycle_stage == "deleted":
        restore = [sys.executable, "-m", "mlflow", "experiments", "restore", "-x", number]
        address = f"MLFLOW_TRACKING_URI={shlex.quote(client.tracking_uri)}"
        raise SlimError(
            f"The MLflow experiment '{name}' was deleted. Use another: tracking.experiment=NAME\n"
            f"or restore it: {address} {shlex.join(restore)}"
        )
    if EXPERIMENT_KIND not in experiment.tags:  # without it MLflow's page opens on traces
        client.set_experiment_tag(number, EXPERIMENT_KIND, MODEL_DEVELOPMENT)
    return number


def _log(client: MlflowClient, run: str, params: dict, metrics: list, tags: dict) -> None:
    """Log in portions that MLflow takes. metrics: (name, value, time in ms, step)."""
    from mlflow.entities import Metric, Param, RunTag

    named = list(params.items())
    for start in range(0, len(named), PARAMS):
        client.log_batch(
            run, params=[Param(name, value) for name, value in named[start : start + PARAMS]]
        )
    points = [Metric(name, float(value), at, step) for name, value, at, step in metrics]
    for start in range(0, len(points), BATCH):
        client.log_batch(run, metrics=points[start : start + BATCH])
    if tags:
        client.log_batch(run, tags=[RunTag(name, value) for name, value in tags.items()])


def _text(client: MlflowClient, run: str, text: str, name: str) -> None:
    client.log_text(run, text, name)


def _files(client: MlflowClient, run: str, folder: str) -> None:
    client.log_artifacts(run, folder)


def _end(client: MlflowClient, run: str, status: str, time: int) -> None:
    client.set_terminated(run, status, time)


CALLS = {"log": _log, "text": _text, "files": _files, "end": _end}


class OfflineQueue:
    """Calls kept for later, in a folder of their own.

    Args:
        root: the store.
        uri: the server that they are for.
    """

    def __init__(self, root: Path, uri: str):
        from filelock import FileLock

        self.folder = root / "outbox" / uuid.uuid4().hex[:12]
        self.folder.mkdir(parents=True)
        self._lock = FileLock(self.folder / ".lock")
        self._lock.acquire()
        self._count = 0
        write_json(self.folder / "state.json", {"uri": uri, "sent": 0, "ids": {}})

    def add(self, call: str, arguments: dict) -> None:
        """Keep a call, with a copy of the files it names.

        Args:
            call: ``create_run`` or a key of ``CALLS``.
            arguments: plain JSON values.
        """
        self._count += 1
        if call == "files":
            copy = self.folder / f"files-{self._count}"
            shutil.copytree(arguments["folder"], copy)
            arguments = {**arguments, "folder": str(copy)}
        with (self.folder / "calls.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps([call, arguments]) + "\n")

    def close(self) -> None:
        """Leave it to whoever tracks next."""
        self._lock.release()


def send(root: Path, uri: str, client: MlflowClient) -> None:
    """Send what earlier runs had to keep, in the order in which they kept it, and say so.

    Args:
        root: the store, where it was kept.
        uri: the server; what was kept for another one stays.
        client: of that server.
    """
    from filelock import FileLock, Timeout

    boxes = sorted((root / "outbox").glob("*/state.json"), key=lambda path: path.stat().st_mtime)
    sent = 0
    for state in boxes:
        try:
            with FileLock(state.parent / ".lock", timeout=0):
                sent += _send_one(state, uri, client)
        except Timeout:  # its writer is still at it, or another process is sending it
            continue
    if sent:
        say(f"Sent to {uri} what was kept while it did not answer: {sent} run(s).")


def _send_one(path: Path, uri: str, client: MlflowClient) -> int:
    """Send the calls of one outbox, remove it, and return how many runs they began."""
    state = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    if state.get("uri") != uri:
        return 0
    calls = path.parent / "calls.jsonl"
    text = calls.read_text(encoding="utf-8") if calls.exists() else ""
    # a process that was killed may have left half a line
    lines = text[: text.rfind("\n") + 1].splitlines()
    for line in lines[state["sent"] :]:
        call, arguments = json.loads(line)
        run = apply(client, call, arguments, state["ids"])
        if run is not None:
            state["ids"][arguments["run"]] = run
        state["sent"] += 1
        write_json(path, state)
    shutil.rmtree(path.parent)
    return len(state["ids"])


class TrackingClient:
    """Everything that is told to MLflow goes through here.

    Args:
        root: the store.
        uri: database or server.
        patient: whether the work may begin while the server is down.

    Raises:
        SlimError: when the store or server does not answer.
    """

    def __init__(self, root: Path, uri: str, patient: bool = False):
        self.root, self.uri = root, uri
        self._box: OfflineQueue | None = None
        try:
            self.client = connection.connect(uri)
            send(root, uri, self.client)
        except SlimError as error:
            if not (patient and self.remote):
                raise
            self._keep(str(error).splitlines()[0])
        except Exception as error:
            self._keep_or_raise(error)

    @property
    def remote(self) -> bool:
        return self.uri.startswith("http")

    @property
    def place(self) -> str | None:
        """Address for the artifacts of a new experiment; None where a server knows."""
        return None if self.remote else (self.root / "artifacts").as_uri()

    def create_run(self, experiment: str, name: str | None, tags: dict[str, str]) -> str:
        """Begin a run of this process and return its id.

        Args:
            experiment: name of the experiment, made if it is not there.
            name: the run's name, None for one that MLflow makes up.
            tags: tags of the run.
        """
        return self._call(
            "create_run",
            run=f"kept-{uuid.uuid4().hex[:12]}",
            experiment=experiment,
            place=self.place,
            name=name,
            tags={PROCESS: process_tag(), **tags},
            time=now(),
        )

    def experiment_id(self, run: str) -> str | None:
        """Return the id of a run's experiment, None where no server has given it one yet."""
        if self._box is not None:
            return None
        try:
            return self.client.get_run(run).info.experiment_id
        except Exception as error:
            self._keep_or_raise(error)
            return None

    def close_dead_runs(self) -> None:
        """Close the runs here whose process is gone as killed, and say how many they were."""
        if self._box is not None:
            return
        try:
            closed = close_dead_runs(self.client)
        except Exception as error:
            self._keep_or_raise(error)
            return
        if closed:
            say(f"MLflow: {closed} run(s) whose process is gone are now marked as killed.")

    def log(self, run: str, params: dict[str, str], metrics: list, tags: dict[str, str]) -> None:
        """Record what is known of a run.

        Args:
            run: its id.
            params: name -> value.
            metrics: (name, value, time in ms, step).
            tags: name -> value.
        """
        self._call("log", run=run, params=params, metrics=metrics, tags=tags)

    def text(self, run: str, text: str, name: str) -> None:
        """Put ``text`` next to a run as the file ``name``."""
        self._call("text", run=run, text=text, name=name)

    def files(self, run: str, folder: Path) -> None:
        """Put the files of ``folder`` next to a run."""
        self._call("files", run=run, folder=str(folder))

    def end(self, run: str, status: str) -> None:
        """End a run with a ``status`` of MLflow: ``FINISHED``, ``FAILED`` or ``KILLED``."""
        self._call("end", run=run, status=status, time=now())

    def close(self) -> None:
        """Nothing more will be told."""
        if self._box is not None:
            self._box.close()

    def _call(self, call: str, **arguments: Any) -> str | None:
        if self._box is None:
            try:
                return apply(self.client, call, arguments, {})
            except Exception as error:
                self._keep_or_raise(error)
        self._box.add(call, arguments)
        return arguments["run"]

    def _keep_or_raise(self, error: Exception) -> None:
        if not (self.remote and is_gone(error)):
            raise error
        self._keep(str(error).strip().splitlines()[0])

    def _keep(self, reason: str) -> None:
        self._box = OfflineQueue(self.root, self.uri)
        warn(
            f"{reason[:200]}\nThe work goes on. Its results are kept in {self._box.folder} "
            f"and sent by the next run that tracks to {self.uri}.",
            head="The tracking server does not answer:",
        )


def is_gone(error: BaseException | None) -> bool:
    """Whether an error means that the server does not answer, rather than that it refuses what it
    was told."""
    from mlflow.exceptions import MlflowException
    from requests.exceptions import ConnectionError, Timeout

    while error is not None:
        if isinstance(error, (ConnectionError, Timeout, ConnectionRefusedError)):
            return True
        if isinstance(error, MlflowException) and (
            "API request to" in str(error) or error.get_http_status_code() in (502, 503, 504)
        ):
            return True
        error = error.__cause__ or error.__context__
    return False


def now() -> int:
    """Return the time in milliseconds, as MLflow counts it."""
    return int(time.time() * 1000)

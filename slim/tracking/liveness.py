"""Runs whose process is gone: killed outright, out of memory, the machine switched off.

Every run says in a tag which process records it. The next command that tracks into the same place
closes those as killed whose process is no more.
"""

from __future__ import annotations

import json
import os
import platform
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from slim.tracking.connection import search_runs

if TYPE_CHECKING:
    from mlflow import MlflowClient

PROCESS = "slim.process"
STARTED_FIELD = 19  # of /proc/PID/stat after the name: start time in ticks since the machine's


def process_tag() -> str:
    """Return what tells this process from all others, as JSON: ``host``, ``boot`` (which start of
    the machine), ``space`` (of process ids: containers have their own), ``pid``, ``started``."""
    return json.dumps({**_place(), "pid": os.getpid(), "started": _started(os.getpid())})


def is_gone(tag: str) -> bool:
    """Whether the process of a run has ended; False where that cannot be told from here.

    Args:
        tag: what :func:`process_tag` returned in that process.
    """
    try:
        record = json.loads(tag)
        pid = int(record["pid"])
    except (ValueError, KeyError, TypeError):
        return False
    here = _place()
    if record.get("host") != here["host"]:
        return False
    if record.get("boot") != here["boot"]:
        return True
    if record.get("space") != here["space"]:
        return False
    # a process id is used again after a while: the start time tells
    return _started(pid) != record.get("started")


def close_dead_runs(client: MlflowClient) -> int:
    """Close the runs whose process is gone as ``KILLED`` and return how many they were."""
    experiments = [entry.experiment_id for entry in client.search_experiments()]
    closed = 0
    for run in search_runs(client, experiments, "attributes.status = 'RUNNING'"):
        if is_gone(run.data.tags.get(PROCESS, "")):
            client.set_tag(run.info.run_id, "error", "The process ended before the run did.")
            client.set_terminated(run.info.run_id, "KILLED")
            closed += 1
    return closed


def _place() -> dict[str, str]:
    """Return what gives a process id its meaning; empty where the system does not say."""
    boot = space = ""
    with suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    with suppress(OSError):
        space = os.readlink("/proc/self/ns/pid")
    return {"host": platform.node(), "boot": boot, "space": space}


def _started(pid: int) -> str:
    """Return when a process started, ``running`` where the system does not say, and an empty string
    for one that is no more."""
    if not Path("/proc/self/stat").exists():
        return "running" if _exists(pid) else ""
    try:
        # the name, in parentheses, may hold anything
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    # a zombie has ended, though its parent has not noticed
    return "" if fields[0] == "Z" else fields[STARTED_FIELD]


def _exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True

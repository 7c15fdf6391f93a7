"""What can go, and letting it go while other processes are at work in the same store."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

from slim.cache.inventory import OUTBOX, UNFINISHED, Entry, entries, size_of, unfinished_folders
from slim.cache.usage import ENDED_BADLY, Run, final_users
from slim.checkpoints.store import Store
from slim.core.errors import SlimError

WRITING_SECONDS = 3600  # how long writing a file of figures takes at the very most


def unneeded_results(
    store: Store, runs: list[Run], intermediate: bool = False, failed: bool = False
) -> tuple[list[Entry], list[Entry], list[Run]]:
    """Return all results, those that can go, and the running runs for whose sake others stay, the
    first to begin first.

    Args:
        store: whose results they are.
        runs: all runs.
        intermediate: whether what is not the end of a run's chain can go too.
        failed: whether runs that ended badly need nothing.
    """
    needing = []
    running = []
    for run in runs:
        if not (failed and run.status in ENDED_BADLY):
            needing.append(run)
        if run.status == "RUNNING":
            running.append(run)
    running.sort(key=lambda run: run.started)
    results = entries(store, needing)
    unneeded = []
    kept = False
    for entry in results:
        needed_by = entry.users
        if intermediate:
            needed_by = final_users(needing, entry.folder)
        if needed_by:
            continue
        # A run records a result only once it is measured: what was used since it began may be what
        # it is at work on.
        if running and entry.used >= running[0].started:
            kept = True
        else:
            unneeded.append(entry)
    return results, unneeded, running if kept else []


def require_uploaded(store: Store) -> None:
    """Raise ``SlimError`` where runs wait for their server: nobody knows yet what they use."""
    for path in (store.root / OUTBOX).rglob("*"):
        if path.is_file() and not path.name.endswith(".lock"):
            raise SlimError(
                f"{store.root / OUTBOX} holds runs that have not reached their tracking server, "
                "so what they use is unknown.\n"
                "Run any command with that tracking.uri first: it uploads them."
            )


def leftovers(store: Store) -> list[Path]:
    """Return what killed processes left: unfinished folders that nobody holds the lock of, and
    half-written figures."""
    left = []
    for path in unfinished_folders(store):
        # the lock is named after the result, which does not exist yet
        with store.lock_if_free(path.with_suffix("")) as free:
            if free:
                left.append(path)
    # these have no lock: only their age tells that nobody is writing them
    old = time.time() - WRITING_SECONDS
    for path in (store.root / "evaluations").glob("*.partial"):
        if path.stat().st_mtime < old:
            left.append(path)
    return left


def remove(store: Store, paths: list[Path]) -> tuple[int, list[str]]:
    """Remove results, leftovers and files of figures.

    A result is renamed first, so that it is there whole or not at all even if this process is
    killed.

    Args:
        store: that they are in.
        paths: what is to go.

    Returns:
        The bytes freed, and the names of what others hold the lock of.
    """
    freed = 0
    busy = []
    for path in paths:
        result = path.with_suffix("") if path.suffix in UNFINISHED else path
        with store.lock_if_free(result) as free:
            if not free:
                busy.append(path.name)
            elif path.exists():  # another prune may have been faster
                freed += size_of(path)
                _delete(path)
    return freed, busy


def _delete(path: Path) -> None:
    if path.is_file():
        path.unlink()
        return
    # a folder cannot vanish at once: under this name nobody takes half of it for a result
    if path.suffix not in UNFINISHED:
        path = path.rename(path.with_name(path.name + ".partial"))
    shutil.rmtree(path)

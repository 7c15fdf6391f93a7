"""Results on disk: stage folders and evaluations, named by hash, whole or absent, under locks.

Layout below the root: ``stages/<kind>-<hash>/`` are checkpoint folders, ``evaluations/<hash>.json``
figures. Work in progress has the ending ``.partial``; whoever holds the lock may remove what a
killed process left there. In a folder ending in ``.work`` a stage keeps what lets it go on after a
crash; it goes when the stage is done."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from slim.checkpoints.checkpoint import MANIFEST, Checkpoint, checksums, open_checkpoint
from slim.core.console import say, warn
from slim.core.errors import SlimError
from slim.core.io import atomic_path, read_json, write_json

DIGEST_LENGTH = 16


def digest(value: Any) -> str:
    """Return 16 hex digits for a plain JSON value, independent of the order of keys.

    Args:
        value: The value.
    """
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:DIGEST_LENGTH]


def require_folder(store: object) -> None:
    """Require the setting ``store`` to name a folder, which need not exist yet.

    Raises:
        SlimError: when it is empty, or a file stands there or above it.
    """
    if not isinstance(store, (str, Path)) or not str(store).strip():
        raise SlimError(
            f"store={'null' if store is None else store}: must be a folder. "
            "Give store=FOLDER, or leave it out for runs/."
        )
    path = Path(store).expanduser().absolute()
    for folder in (path, *path.parents):
        if folder.exists() and not folder.is_dir():
            raise SlimError(f"store={store}: {folder} is a file. Give store=FOLDER.")


class Store:
    """The folder in which results are kept and found again. It may be shared by processes running
    at the same time."""

    def __init__(self, root: Path | str):
        self.root = Path(root).expanduser().absolute()

    def stage_folder(self, kind: str, digest: str) -> Path:
        """Return where the result of a stage is kept.

        Args:
            kind: The stage's kind, such as ``"prune"``.
            digest: The result's name.
        """
        return self.root / "stages" / f"{kind}-{digest}"

    def evaluation_file(self, digest: str) -> Path:
        """Return where an evaluation is kept.

        Args:
            digest: The evaluation's name.
        """
        return self.root / "evaluations" / f"{digest}.json"

    @contextmanager
    def lock(self, path: Path) -> Iterator[None]:
        """Hold the lock for ``path``; says so when another process has it and we wait."""
        from filelock import FileLock, Timeout

        path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path.parent / f".{path.name}.lock")
        try:
            # long enough for a look at a finished result, about which nothing need be said
            lock.acquire(timeout=0.2)
        except Timeout:
            say(f"Waiting for another process that is making {path.name} ...")
            lock.acquire()
        try:
            yield
        finally:
            lock.release()

    @contextmanager
    def lock_if_free(self, path: Path) -> Iterator[bool]:
        """Yield whether the lock for ``path`` is ours; False where another process has it."""
        from filelock import FileLock, Timeout

        lock = FileLock(path.parent / f".{path.name}.lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            yield False
            return
        try:
            yield True
        finally:
            lock.release()

    def work_folder(self, folder: Path) -> Path:
        """Return where the stage that makes ``folder`` keeps what it needs to resume after a
        crash."""
        return folder.with_name(folder.name + ".work")

    @contextmanager
    def writing(self, folder: Path) -> Iterator[Path]:
        """Yield an empty folder that becomes ``folder`` if the body succeeds and vanishes if it
        does not.

        The caller holds the lock. A full disk is reported as ``SlimError``.
        """
        try:
            with atomic_path(folder) as partial:
                partial.mkdir()
                yield partial
                _sync(partial)
            # last: until the result has its name, a crash must leave something to resume from
            shutil.rmtree(self.work_folder(folder), ignore_errors=True)
        except BaseException as error:
            reraise_full_disk(error, folder)
            raise

    def find(self, folder: Path) -> Checkpoint | None:
        """Return a finished stage's checkpoint, or None if it is not there.

        A folder whose files differ from the checksums recorded when it was made is removed, and
        said to be."""
        if not folder.is_dir():
            return None
        try:
            checkpoint = open_checkpoint(folder)
            if checkpoint.manifest.get("checksums") == checksums(folder):
                _mark_used(folder)
                return checkpoint
            reason = "differs from its recorded checksums"
        except SlimError as error:
            reason = str(error)
        warn(f"{folder.name} ({reason})", head="Damaged result discarded and made again:")
        shutil.rmtree(folder)
        return None

    def find_evaluation(self, path: Path) -> dict | None:
        """Return what was measured, or None where that is not recorded or the record is
        damaged."""
        if not path.is_file():
            return None
        try:
            record = read_json(path)
        except SlimError:
            return None
        metrics = record.get("figures")
        # altered by a failing disk or by hand: it is measured again
        if record.get("digest") != digest(metrics):
            return None
        return metrics

    def write_evaluation(self, path: Path, metrics: dict) -> None:
        """Record an evaluation, complete or not at all.

        Args:
            path: The file, from :meth:`evaluation_file`.
            metrics: What was measured, plain JSON values.

        Raises:
            SlimError: The disk is full.
        """
        try:
            write_json(path, {"digest": digest(metrics), "figures": metrics})
        except OSError as error:
            reraise_full_disk(error, path)
            raise


def reraise_full_disk(error: BaseException, path: Path) -> None:
    """Turn an error that means a full disk into one that says so.

    Args:
        error: What was raised.
        path: What was being written.

    Raises:
        SlimError: The disk is full.
    """
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    # libraries in Rust keep the number (28 is ENOSPC) in their message only
    if full or (isinstance(error, OSError) and "os error 28" in str(error)):
        raise SlimError(
            f"The disk is full: {path.name} could not be written to {path.parent}. Nothing "
            "half-written is left; finished stages are kept.\n"
            "Free some space or choose another folder with store=FOLDER, then run the same command."
        ) from error


def _mark_used(folder: Path) -> None:
    """Let the folder's time say when it was last used, for whoever clears up (``slim.cache``)."""
    with suppress(OSError):  # a store that may only be read
        os.utime(folder)


def _sync(folder: Path) -> None:
    """Flush files to the disk before the folder gets its final name, so that a power cut leaves no
    hollow result.

    Also gives them the usual permissions: safetensors writes files that only their owner can read.
    """
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(path.stat().st_mode | folder.stat().st_mode & 0o444)
            with path.open("rb") as file:
                os.fsync(file.fileno())


def write_manifest(folder: Path, manifest: dict) -> dict:
    """Complete a manifest with counts and checksums, and write it as ``slim.json``.

    Args:
        folder: The checkpoint.
        manifest: What the pipeline knows of it.

    Returns:
        The manifest as written, with ``parameters``, ``bytes`` and ``checksums``.
    """
    checkpoint = open_checkpoint(folder)
    manifest = {
        **manifest,
        "parameters": checkpoint.spec.parameters(),
        "bytes": checkpoint.bytes_on_disk,
        "checksums": checksums(folder),
    }
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    return manifest

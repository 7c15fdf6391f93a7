"""What lies in a store: results with the runs that use them, work in progress, figures, tracking;
and what is damaged."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from slim.cache.usage import Run, read_runs, users
from slim.checkpoints.checkpoint import MANIFEST, checksums, open_checkpoint
from slim.checkpoints.store import Store
from slim.core.errors import SlimError
from slim.core.io import read_json
from slim.tracking.connection import database_uri

DATABASE = "mlflow.db"
OUTBOX = "outbox"
UNFINISHED = (".partial", ".work")


@dataclass
class Entry:
    """A stage's result.

    Attributes:
        folder: where it is.
        manifest: its ``slim.json``, empty where that cannot be read.
        size: bytes on disk.
        made: seconds since 1970.
        used: when it was last used, seconds since 1970.
        users: runs that have it in their chain.
    """

    folder: Path
    manifest: dict
    size: int
    made: float
    used: float
    users: list[Run] = field(default_factory=list)

    @property
    def kind(self) -> str:
        return self.folder.name.rpartition("-")[0]

    @property
    def parent(self) -> str:
        """Name and hash of what it was made from."""
        lineage = self.manifest.get("lineage", [])
        if len(lineage) < 2:
            return "-"
        parent = lineage[-2]
        return f"{parent.get('name') or parent['label']} ({parent['hash'][:6]})"


def existing_store(root: str) -> Store:
    """Return the store in ``root``.

    Raises:
        SlimError: when there is none.
    """
    store = Store(root)
    if not store.root.is_dir():
        raise SlimError(
            f"There is no store {root}. "
            "Give --store FOLDER, the one of store=FOLDER in the runs' commands."
        )
    parts = ("stages", "evaluations", DATABASE)
    # an empty folder is a store that nothing was run in yet
    if any(store.root.iterdir()) and not any((store.root / part).exists() for part in parts):
        raise SlimError(
            f"{root} is no store of slim: it has none of {', '.join(parts)}. Give --store FOLDER."
        )
    return store


def entries(store: Store, runs: Iterable[Run] = ()) -> list[Entry]:
    """Return all finished results, the oldest first.

    Args:
        store: whose results they are.
        runs: runs that may use them.
    """
    runs = list(runs)
    results = []
    for folder in sorted((store.root / "stages").glob("*")):
        if folder.suffix in UNFINISHED or not folder.is_dir():
            continue
        try:
            manifest = read_json(folder / MANIFEST)
            made = (folder / MANIFEST).stat().st_mtime
        except (SlimError, OSError):  # damaged; it takes room all the same
            manifest = {}
            made = folder.stat().st_mtime
        size = folder_bytes(folder)
        last_used = folder.stat().st_mtime
        results.append(Entry(folder, manifest, size, made, last_used, users(runs, folder)))
    return sorted(results, key=lambda entry: entry.made)


def folder_bytes(folder: Path) -> int:
    """Return the bytes of all files below ``folder``; those that vanish meanwhile count nothing."""
    total = 0
    for path in folder.rglob("*"):
        try:
            if path.is_file():
                total += path.lstat().st_size
        except FileNotFoundError:
            continue
    return total


def size_of(path: Path) -> int:
    """Return the bytes of a file or of all files below a folder."""
    if path.is_dir():
        return folder_bytes(path)
    return path.stat().st_size


def size_rows(store: Store) -> list[tuple[str, int, int]]:
    """Return name, number and bytes of each part of the store, results by kind; together everything
    in its folder."""
    by_kind: dict[str, list[int]] = {}
    for entry in entries(store):
        by_kind.setdefault(entry.kind, []).append(entry.size)
    rows = []
    for kind, sizes in by_kind.items():
        rows.append((f"results of {kind}", len(sizes), sum(sizes)))
    artifacts = store.root / "artifacts"
    parts = {
        "work in progress or left behind": unfinished_folders(store),
        "evaluations": list((store.root / "evaluations").glob("*.json")),
        "hidden states of references": list((store.root / "evaluations").glob("*.safetensors")),
        "distributions of teachers": _folders(store.root / "teacher"),
        "tracking: database": list(store.root.glob(f"{DATABASE}*")),
    }
    for name, paths in parts.items():
        rows.append((name, len(paths), sum(map(size_of, paths))))
    # an experiment's folder counts as one, with whatever lies next to the runs in it
    rows.append(("tracking: files of runs", len(_folders(artifacts)), folder_bytes(artifacts)))
    # a remainder, so that the rows are together what the folder takes
    other = folder_bytes(store.root)
    for _, _, size in rows:
        other -= size
    if other:
        rows.append(("other", 0, other))
    return rows


def _folders(folder: Path) -> list[Path]:
    return [path for path in folder.glob("*") if path.is_dir()]


def unfinished_folders(store: Store) -> list[Path]:
    """Return the folders that stages write into or keep their progress in, whether at work or left
    by a killed process."""
    folders = []
    for suffix in UNFINISHED:
        folders.extend((store.root / "stages").glob(f"*{suffix}"))
    return sorted(folders)


def tracked_runs(store: Store, uris: list[str], needed: bool = False) -> list[Run]:
    """Return the runs of the store's own database and of other tracking stores.

    Args:
        store: whose database is read, if it has one.
        uris: addresses of further tracking stores.
        needed: whether there must be a place to read runs from, since everything would count as
            unused.

    Raises:
        SlimError: when there is none, or one does not answer.
    """
    places = list(uris)
    if (store.root / DATABASE).is_file():
        places.insert(0, database_uri(store.root / DATABASE))
    if needed and not places:
        raise SlimError(
            f"{store.root} has no {DATABASE}, so nothing tells which results are in use. "
            "Give --uri ADDRESS of the tracking server that the runs were recorded on."
        )
    return read_runs(places)


def damage(entry: Entry) -> str | None:
    """Return what is wrong with a result, or None."""
    try:
        recorded = open_checkpoint(entry.folder).manifest.get("checksums", {})
        now = checksums(entry.folder)
    except (SlimError, OSError) as error:
        return str(error).splitlines()[0]
    differing = []
    for name in sorted(set(recorded) | set(now)):
        # get: a file that is missing, or that was added, differs too
        if recorded.get(name) != now.get(name):
            differing.append(name)
    if not differing:
        return None
    return f"{', '.join(differing)} differs from the recorded checksum"

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
    """A stage's result. size: bytes on disk. made, used: seconds since 1970; users: runs that have
    it in their chain."""

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
        """Label and hash of what it was made from."""
        lineage = self.manifest.get("lineage", [])
        return f"{lineage[-2]['label']} ({lineage[-2]['hash'][:6]})" if len(lineage) > 1 else "-"


def existing_store(root: str) -> Store:
    """Return the store in ``root``. Raises ``SlimError`` if there is none."""
    store = Store(root)
    if not store.root.is_dir():
        raise SlimError(
            f"There is no store {root}. Give --store FOLDER, the one of store=FOLDER in the runs' commands."
        )
    parts = ("stages", "evaluations", DATABASE)
    if any(store.root.iterdir()) and not any((store.root / part).exists() for part in parts):
        raise SlimError(
            f"{root} is no store of slim: it has none of {', '.join(parts)}. Give --store FOLDER."
        )
    return store


def entries(store: Store, runs: Iterable[Run] = ()) -> list[Entry]:
    """Return all finished results, the oldest first, with the runs that use them."""
    runs, found = list(runs), []
    for folder in sorted(path for path in (store.root / "stages").glob("*") if path.is_dir()):
        if folder.suffix in UNFINISHED:
            continue
        try:
            manifest = read_json(folder / MANIFEST)
            made = (folder / MANIFEST).stat().st_mtime
        except (SlimError, OSError):
            manifest, made = {}, folder.stat().st_mtime
        found.append(
            Entry(
                folder,
                manifest,
                folder_bytes(folder),
                made,
                folder.stat().st_mtime,
                users(runs, folder),
            )
        )
    return sorted(found, key=lambda entry: entry.made)


def folder_bytes(folder: Path) -> int:
    """Return the bytes of all files below ``folder``; those that vanish meanwhile count nothing."""
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.lstat().st_size if path.is_file() else 0
        except FileNotFoundError:
            continue
    return total


def size_of(path: Path) -> int:
    """Return the bytes of a file or of all files below a folder."""
    return folder_bytes(path) if path.is_dir() else path.stat().st_size


def size_rows(store: Store) -> list[tuple[str, int, int]]:
    """Return name, number and bytes of each part of the store, results by kind; together everything
    in its folder."""
    found, unfinished = entries(store), unfinished_folders(store)
    rows = []
    for kind in dict.fromkeys(entry.kind for entry in found):
        sizes = [entry.size for entry in found if entry.kind == kind]
        rows.append((f"results of {kind}", len(sizes), sum(sizes)))
    rows.append(
        (
            "work in progress or left behind",
            len(unfinished),
            sum(size_of(path) for path in unfinished),
        )
    )
    figures = [path for path in (store.root / "evaluations").glob("*.json")]
    rows.append(("evaluations", len(figures), sum(size_of(path) for path in figures)))
    teachers = [path for path in (store.root / "teacher").glob("*") if path.is_dir()]
    rows.append(
        ("distributions of teachers", len(teachers), sum(size_of(path) for path in teachers))
    )
    runs = [path for path in (store.root / "artifacts").glob("*") if path.is_dir()]
    databases = list(store.root.glob(f"{DATABASE}*"))
    rows.append(("tracking: files of runs", len(runs), folder_bytes(store.root / "artifacts")))
    rows.append(("tracking: database", len(databases), sum(size_of(path) for path in databases)))
    other = folder_bytes(store.root) - sum(size for _, _, size in rows)
    return [*rows, ("other", 0, other)] if other else rows


def unfinished_folders(store: Store) -> list[Path]:
    """Return the folders that stages write into or keep their progress in, whether at work or left
    by a killed process."""
    return sorted(path for path in (store.root / "stages").glob("*") if path.suffix in UNFINISHED)


def tracked_runs(store: Store, uris: list[str], needed: bool = False) -> list[Run]:
    """Return the runs of the store's own database and of ``uris``.

    needed: raise ``SlimError`` where there is no place to read runs from, since everything would
    count as unused."""
    own = [database_uri(store.root / DATABASE)] if (store.root / DATABASE).is_file() else []
    if needed and not own and not uris:
        raise SlimError(
            f"{store.root} has no {DATABASE}, so nothing tells which results are in use. "
            "Give --uri ADDRESS of the tracking server that the runs were recorded on."
        )
    return read_runs([*own, *uris])


def damage(entry: Entry) -> str | None:
    """Return what is wrong with a result, or None."""
    try:
        recorded = open_checkpoint(entry.folder).manifest.get("checksums", {})
        now = checksums(entry.folder)
    except (SlimError, OSError) as error:
        return str(error).splitlines()[0]
    differing = sorted(name for name in {*recorded, *now} if recorded.get(name) != now.get(name))
    return f"{', '.join(differing)} differs from the recorded checksum" if differing else None

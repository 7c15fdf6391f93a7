"""A text: a file, an embedded text of the tiny world, or a column of a hub data set. One
description serves all uses."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from slim.core.errors import SlimError
from slim.core.io import sha256

ASSETS = Path(__file__).parent.parent / "assets"
EMBEDDED = {
    "tiny:heldout": ASSETS / "tiny_world" / "heldout.txt",
    "tiny:calibration": ASSETS / "tiny_world" / "calibration.txt",
}
FILE_ENDINGS = (".txt", ".jsonl", ".json", ".parquet")


@dataclass
class Text:
    """Where documents come from.

    text: a file (``.txt``: one text; ``.jsonl``, ``.parquet``: one document a line or row), an
        embedded text (``tiny:heldout``, ``tiny:calibration``), or a data set of the hub by its id
        or a local folder in the hub's layout.
    subset, split, column: configuration, split and text column of a data set; ``column`` also for
        files with rows.
    revision: branch, tag or commit of a hub data set.
    streaming: read a data set while it is fetched and a ``.txt`` file line by line, so that memory
        and disk need not hold all of it.
    """

    text: str
    subset: str | None = None
    split: str = "train"
    column: str = "text"
    revision: str | None = None
    streaming: bool = False

    def __post_init__(self) -> None:
        path = self.path
        if path is None and (
            str(self.text).endswith(FILE_ENDINGS) or str(self.text).startswith((".", "/", "~"))
        ):
            raise SlimError(
                f"There is no text {self.text}. Give a .txt or .jsonl file, {', '.join(EMBEDDED)}, or a hub data set."
            )
        if path is not None and path.is_file() and not path.name.endswith(FILE_ENDINGS):
            raise SlimError(
                f"{self.text} is not a text slim reads. Allowed endings: {', '.join(FILE_ENDINGS)}."
            )

    @property
    def path(self) -> Path | None:
        """The local file or folder, or None for a data set of the hub."""
        path = EMBEDDED.get(self.text) or Path(self.text).expanduser()
        return path if path.exists() else None

    def text_identity(self) -> dict:
        """What the text is: its checksum for a file, its name and split for a data set."""
        path = self.path
        if path is not None and path.is_file():
            return {
                "sha256": self._checksum,
                "column": self.column if path.suffix != ".txt" else None,
            }
        found = {
            "dataset": self.text,
            "subset": self.subset,
            "split": self.split,
            "column": self.column,
        }
        if path is not None:
            found["sha256"] = self._folder_checksum
        return found if self.revision is None else {**found, "revision": self.revision}

    @cached_property
    def _checksum(self) -> str:
        return sha256(self.path)

    @cached_property
    def _folder_checksum(self) -> str:
        """The SHA-256 over names and contents of all files of a local data set, hidden ones left
        out."""
        files = sorted(path for path in self.path.rglob("*") if path.is_file())
        names = [path.relative_to(self.path) for path in files]
        digest = hashlib.sha256()
        for name in names:
            if not any(part.startswith(".") for part in name.parts):
                digest.update(f"{name.as_posix()} {sha256(self.path / name)}\n".encode())
        return digest.hexdigest()

    def documents(self) -> Iterator[str]:
        """Yield the documents in their order; a streamed ``.txt`` line by line. ``SlimError`` if
        they cannot be read."""
        path = self.path
        if path is not None and path.suffix == ".txt":
            with path.open(encoding="utf-8") as lines:
                yield from lines if self.streaming else [lines.read()]
        else:
            yield from self._column()

    def joined(self) -> str:
        """Return all documents as one text, empty lines between them, as the GPTQ and AWQ papers
        do."""
        return "\n\n".join(self.documents())

    def rows(self) -> Iterator[dict]:
        """Yield the rows of the file or of the data set. Raises ``SlimError`` if they cannot be
        read."""
        path = self.path
        if path is None or path.is_dir():
            name = self.text if path is None else str(path)
            yield from load_dataset(name, self.subset, self.split, self.revision, self.streaming)
        elif path.suffix == ".parquet":
            yield from parquet_rows(path)
        else:
            yield from (row for _, row in json_lines(path))

    def _column(self) -> Iterator[str]:
        for number, row in enumerate(self.rows(), 1):
            if self.column not in row:
                raise SlimError(
                    f"{self.text}, row {number}: no column '{self.column}' (has: {', '.join(row)}). "
                    "Set column=... to one of them."
                )
            yield "" if row[self.column] is None else str(row[self.column])


def json_lines(path: Path) -> Iterator[tuple[int, dict]]:
    """Yield line number and object for every line of a JSONL file, empty ones left out.

    Raises ``SlimError`` naming the line that holds no JSON object.
    """
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise SlimError(f"{path}, line {number}: not JSON ({error}).") from error
            if not isinstance(row, dict):
                raise SlimError(
                    f"{path}, line {number}: {type(row).__name__} where an object with columns is needed."
                )
            yield number, row


def parquet_rows(path: Path) -> Iterator[dict]:
    """Yield the rows of a Parquet file, some thousand of them in memory at a time; ``SlimError`` if
    it is none."""
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    try:
        with ParquetFile(path) as table:
            for batch in table.iter_batches(4096):
                yield from batch.to_pylist()
    except ArrowException as error:
        raise SlimError(f"{path}: not a Parquet file that can be read ({error}).") from error


def load_dataset(
    name: str, subset: str | None, split: str, revision: str | None = None, streaming: bool = False
):
    """Load a data set of the hub, or of a local folder in its layout; ``SlimError`` if that fails.

    streaming: rows come while the files are read or fetched; nothing is kept on disk.
    """
    return _load(
        name,
        f"{subset or 'default'}, {split}",
        name=subset,
        split=split,
        revision=revision,
        streaming=streaming,
    )


def load_dataset_files(name: str, files: str, revision: str | None = None):
    """Load one data file of a hub data set by its path inside the set; ``SlimError`` if that
    fails."""
    return _load(name, files, data_files=files, revision=revision, split="train")


def _load(dataset: str, shown: str, **arguments):
    import datasets

    datasets.disable_progress_bars()
    try:
        return datasets.load_dataset(dataset, **arguments)
    except (
        Exception
    ) as error:  # the library raises some twenty kinds for what is one thing to the user
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise SlimError(
            f"The data set {dataset} ({shown}) cannot be loaded: {reason}\n"
            "Without a network, give a local file instead, for example text=FILE.txt."
        ) from error

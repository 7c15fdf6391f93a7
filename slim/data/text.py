"""A text: a file, an embedded text of the tiny world, or a column of a hub data set. One
description serves all uses."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import ClassVar

from slim.core.errors import SlimError
from slim.core.hub import hub_problem
from slim.core.io import sha256
from slim.data.cells import as_text
from slim.data.files import Row, csv_rows, json_rows, parquet_rows, read_text, text_lines

ASSETS = Path(__file__).parent.parent / "assets"
EMBEDDED = {
    "tiny:heldout": ASSETS / "tiny_world" / "heldout.txt",
    "tiny:calibration": ASSETS / "tiny_world" / "calibration.txt",
}
FILE_ENDINGS = (".txt", ".jsonl", ".json", ".csv", ".tsv", ".parquet")
TABLES = (".csv", ".tsv")


@dataclass
class Text:
    """Where documents come from.

    Attributes:
        text: a file (``.txt``: one text; ``.jsonl``, ``.json``, ``.csv``, ``.tsv``, ``.parquet``:
            one document a row),
            an embedded text (``tiny:heldout``, ``tiny:calibration``), or a data set of the hub by
            its id or a local folder in the hub's layout.
        subset: configuration of a data set; None: its default.
        split: split of a data set.
        column: text column of a data set or of a file with rows.
        revision: branch, tag or commit of a hub data set; None: its main branch.
        streaming: read a data set while it is fetched and a ``.txt`` file line by line, so that
            memory and disk need not hold all of it.
    """

    text: str
    subset: str | None = None
    split: str = "train"
    column: str = "text"
    revision: str | None = None
    streaming: bool = False

    # where the settings are typed, for messages: "calibration" for calibration.text
    group: ClassVar[str] = ""

    def __post_init__(self) -> None:
        if not isinstance(self.text, str) or not self.text:
            raise SlimError(f"text={self.text}: must be a file or the id of a hub data set.")
        path = self.path
        if path is None and (
            self.text.endswith(FILE_ENDINGS) or self.text.startswith((".", "/", "~"))
        ):
            raise SlimError(
                f"There is no text {self.text}. Give a .txt or .jsonl file, "
                f"{', '.join(EMBEDDED)}, or a hub data set."
            )
        if path is not None and path.is_file() and not path.name.endswith(FILE_ENDINGS):
            raise SlimError(
                f"{self.text} is not a text slim reads. Allowed endings: {', '.join(FILE_ENDINGS)}."
            )

    def setting(self, name: str) -> str:
        """Return a setting as it is typed, such as ``calibration.column``."""
        return f"{self.group}.{name}" if self.group else name

    @property
    def path(self) -> Path | None:
        """The local file or folder, or None for a data set of the hub."""
        try:
            path = EMBEDDED.get(self.text) or Path(self.text).expanduser()
            return path if path.exists() else None
        except (OSError, RuntimeError, ValueError):  # too long, no such home, a zero byte
            return None

    def text_identity(self) -> dict:
        """Return what determines the text: its checksum for a file, its name and split for a data
        set."""
        path = self.path
        if path is not None and path.is_file():
            column = None if path.suffix == ".txt" else self.column
            return {"sha256": self._checksum, "column": column}
        identity = {
            "dataset": self.text,
            "subset": self.subset,
            "split": self.split,
            "column": self.column,
        }
        if path is not None:
            identity["sha256"] = self._folder_checksum
        if self.revision is not None:
            identity["revision"] = self.revision
        return identity

    @cached_property
    def _checksum(self) -> str:
        try:
            return sha256(self.path)
        except OSError as error:
            raise SlimError(f"{self.path} cannot be read: {error.strerror or error}.") from error

    @cached_property
    def _folder_checksum(self) -> str:
        """The SHA-256 over names and contents of all files of a local data set, hidden ones left
        out."""
        digest = hashlib.sha256()
        for path in sorted(self.path.rglob("*")):
            name = path.relative_to(self.path)
            is_hidden = any(part.startswith(".") for part in name.parts)
            if path.is_file() and not is_hidden:
                digest.update(f"{name.as_posix()} {sha256(path)}\n".encode())
        return digest.hexdigest()

    def documents(self) -> Iterator[str]:
        """Yield the documents in their order; a streamed ``.txt`` line by line.

        Raises:
            SlimError: when they cannot be read.
        """
        path = self.path
        if path is None or path.suffix != ".txt" or path.is_dir():
            yield from self._column()
        elif self.streaming:
            yield from text_lines(path)
        else:
            yield read_text(path)

    def joined(self) -> str:
        """Return all documents as one text, empty lines between them, as the GPTQ and AWQ papers
        do."""
        return "\n\n".join(self.documents())

    def rows(self) -> Iterator[Row]:
        """Yield the rows of the file or of the data set.

        Raises:
            SlimError: when they cannot be read.
        """
        for _, row in self.located_rows():
            yield row

    def located_rows(self) -> Iterator[tuple[str, Row]]:
        """Yield where a row stands, such as ``FILE, line 3``, and the row.

        Raises:
            SlimError: when they cannot be read.
        """
        path = self.path
        if path is not None and path.is_file() and path.suffix != ".parquet":
            rows = csv_rows if path.suffix in TABLES else json_rows
            for place, row in rows(path):
                yield f"{self.text}, {place}", row
            return
        for number, row in enumerate(self._table_rows(), 1):
            yield f"{self.text}, row {number}", row

    def _table_rows(self) -> Iterator[Row]:
        """Yield the rows of a Parquet file or of a data set."""
        path = self.path
        if path is not None and path.is_file():
            yield from parquet_rows(path)
            return
        name = self.text if path is None else str(path)
        table = load_dataset(name, self.subset, self.split, self.revision, self.streaming)
        try:
            yield from table
        except Exception as error:  # a stream is fetched and parsed while it is read
            raise _not_loaded(name, self.split, error) from error

    def _column(self) -> Iterator[str]:
        """Yield the text column's cells."""
        for where, row in self.located_rows():
            yield self.cell(row, where)

    def cell(self, row: Row, where: str) -> str:
        """Return the text of a row.

        Args:
            row: of the file or data set.
            where: it stands, for messages.

        Raises:
            SlimError: when it has no such column, or something else than text in it.
        """
        if self.column not in row:
            raise SlimError(
                f"{where}: no column '{self.column}' (has: {', '.join(row)}). "
                f"Set {self.setting('column')}=... to one of them."
            )
        return as_text(row[self.column], f"{where}: column '{self.column}'")


def load_dataset(
    name: str, subset: str | None, split: str, revision: str | None = None, streaming: bool = False
):
    """Load a data set of the hub, or of a local folder in its layout.

    Args:
        name: id of the data set, or the folder.
        subset: configuration; None: the default.
        split: split.
        revision: branch, tag or commit; None: the main branch.
        streaming: rows come while the files are read or fetched; nothing is kept on disk.

    Raises:
        SlimError: when the data set cannot be loaded.
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
    """Load one data file of a hub data set.

    Args:
        name: id of the data set.
        files: path of the file inside the set.
        revision: branch, tag or commit; None: the main branch.

    Raises:
        SlimError: when the file cannot be loaded.
    """
    return _load(name, files, data_files=files, revision=revision, split="train")


def _load(dataset: str, part: str, **arguments):
    """Call the library. ``part`` names what is loaded, for messages."""
    if not Path(dataset).expanduser().is_dir():
        hub_problem()  # without a network, the library then looks into its cache at once
    import datasets

    datasets.disable_progress_bars()
    try:
        return datasets.load_dataset(dataset, **arguments)
    except Exception as error:  # the library raises some twenty kinds for one thing
        raise _not_loaded(dataset, part, error) from error


def _not_loaded(dataset: str, part: str, error: Exception) -> SlimError:
    """Return the error for a data set that the library cannot read, with the first line of why."""
    # of "an error occurred" the library's own reason is what raised that
    while type(error).__name__ == "DatasetGenerationError" and error.__cause__ is not None:
        error = error.__cause__
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    if Path(dataset).expanduser().is_dir():
        return SlimError(
            f"The folder {dataset} ({part}) cannot be loaded as a data set: {reason}\n"
            f"Give one file instead, whose name ends in {', '.join(FILE_ENDINGS)}."
        )
    return SlimError(
        f"The data set {dataset} ({part}) cannot be loaded: {hub_problem() or reason}.\n"
        "Without a network, give a local file instead, for example "
        "calibration.text=FILE.txt or eval.perplexity.text=FILE.txt."
    )

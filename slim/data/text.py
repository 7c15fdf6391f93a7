"""A text: a file, an embedded text of the tiny world, or a column of a hub data set. One description serves all uses."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from slim.checkpoint import sha256
from slim.errors import SlimError

ASSETS = Path(__file__).parent.parent / "assets"
EMBEDDED = {
    "tiny:heldout": ASSETS / "tiny_world" / "heldout.txt",
    "tiny:calibration": ASSETS / "tiny_world" / "calibration.txt",
}
FILE_ENDINGS = (".txt", ".jsonl", ".json")


@dataclass
class Text:
    """Where documents come from.

    text: a file (``.txt``: one text; ``.jsonl``: one document a line), an embedded text (``tiny:heldout``,
        ``tiny:calibration``), or a data set of the hub by its id or a local folder in the hub's layout.
    subset, split, column: configuration, split and text column of a data set; ``column`` also for JSONL.
    """

    text: str
    subset: str | None = None
    split: str = "train"
    column: str = "text"

    def __post_init__(self) -> None:
        path = self.path
        if path is None and (str(self.text).endswith(FILE_ENDINGS) or str(self.text).startswith((".", "/", "~"))):
            raise SlimError(
                f"There is no text {self.text}. Give a .txt or .jsonl file, {', '.join(EMBEDDED)}, or a hub data set."
            )
        if path is not None and path.is_file() and not path.name.endswith(FILE_ENDINGS):
            raise SlimError(f"{self.text} is not a text slim reads. Allowed endings: {', '.join(FILE_ENDINGS)}.")

    @property
    def path(self) -> Path | None:
        """The local file or folder, or None for a data set of the hub."""
        path = EMBEDDED.get(self.text) or Path(self.text).expanduser()
        return path if path.exists() else None

    def text_identity(self) -> dict:
        """What the text is: its checksum for a file, its name and split for a data set."""
        path = self.path
        if path is not None and path.is_file():
            return {"sha256": self._checksum, "column": self.column if path.suffix != ".txt" else None}
        return {"dataset": self.text, "subset": self.subset, "split": self.split, "column": self.column}

    @cached_property
    def _checksum(self) -> str:
        return sha256(self.path)

    def documents(self) -> Iterator[str]:
        """Yield the documents in their order. Raises ``SlimError`` if they cannot be read."""
        path = self.path
        if path is not None and path.suffix == ".txt":
            yield path.read_text(encoding="utf-8")
        else:
            yield from self._column()

    def joined(self) -> str:
        """Return all documents as one text, empty lines between them, as the GPTQ and AWQ papers do."""
        return "\n\n".join(self.documents())

    def rows(self) -> Iterator[dict]:
        """Yield the rows of the JSONL file or of the data set. Raises ``SlimError`` if they cannot be read."""
        path = self.path
        if path is None or path.is_dir():
            yield from load_dataset(self.text, self.subset, self.split)
        else:
            yield from (row for _, row in json_lines(path))

    def _column(self) -> Iterator[str]:
        for number, row in enumerate(self.rows(), 1):
            if self.column not in row:
                raise SlimError(
                    f"{self.text}, row {number}: no column '{self.column}' (has: {', '.join(row)}). "
                    "Set column=... to one of them."
                )
            yield str(row[self.column])


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
                raise SlimError(f"{path}, line {number}: {type(row).__name__} where an object with columns is needed.")
            yield number, row


def load_dataset(name: str, subset: str | None, split: str):
    """Load a data set of the hub, or of a local folder in its layout; ``SlimError`` if that fails."""
    import datasets

    datasets.disable_progress_bars()
    try:
        return datasets.load_dataset(name, subset, split=split)
    except Exception as error:  # the library raises some twenty kinds for what is one thing to the user
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise SlimError(
            f"The data set {name} ({subset or 'default'}, {split}) cannot be loaded: {reason}\n"
            "Without a network, give a local file instead, for example text=FILE.txt."
        ) from error

"""``data=documents``: a folder of documents as training text."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import ClassVar

from slim.checkpoints.store import Store, digest
from slim.core.console import say
from slim.core.errors import SlimError
from slim.core.io import atomic_path, sha256
from slim.core.settings import require_number
from slim.core.text import counted
from slim.data.base import PARTS, PlainText
from slim.data.text import Text
from slim.documents import embedded
from slim.documents.convert import Conversion
from slim.documents.reading import ENDINGS, VERSION, files_in
from slim.documents.settings import DocumentSettings

RECORDS = ".jsonl"  # ending of a file that slim.documents wrote


@dataclass
class Documents(DocumentSettings, PlainText):
    """A folder of documents (or one document), or the records that ``python -m slim.documents``
    made of one. All settings of :class:`slim.documents.settings.DocumentSettings` count.

    Attributes:
        text: the folder or file; ``tiny:documents``: the text of the embedded model's world.
        cache: folder for pages that were read, and for records.
    """

    cache_name: ClassVar[str] = "Documents"

    text: str = ""
    cache: str = field(default="runs/documents", metadata={"cache_key": False})

    prefix: ClassVar[str] = "data."

    def __post_init__(self) -> None:
        if not isinstance(self.text, str) or not self.text:
            raise SlimError("This data needs data.text=FOLDER with PDF, PPTX, DOCX, HTML, MD, TXT.")
        super().__post_init__()
        require_number("data.validation_fraction", self.validation_fraction, 0.001, 0.5)
        if self.text == embedded.NAME:
            return
        if not self.is_made and not any(f.path.suffix.lower() in ENDINGS for f in self._files):
            raise SlimError(
                f"data.text={self.text} holds none of {', '.join(ENDINGS)}. Give another folder."
            )

    @property
    def title(self) -> str:
        return f"The text of {self.text}"

    @property
    def folder(self) -> Path:
        return Path(self.text).expanduser()

    @property
    def is_made(self) -> bool:
        """Whether ``text`` is a file of records."""
        return self.folder.is_file() and self.folder.name.endswith(RECORDS)

    @cached_property
    def _files(self) -> list:
        return files_in(self.folder)

    def cache_key(self) -> dict:
        if self.is_made:
            return {"class": self.cache_name, "sha256": sha256(self.folder), "seed": self.seed}
        if self.text == embedded.NAME:
            key = {"class": self.cache_name, "version": VERSION, "files": embedded.IDENTITY}
            return {**key, **self.record_key()}
        sums = {}
        for file in self._files:
            if file.path.suffix.lower() in ENDINGS:
                sums[file.source] = sha256(file.path)
        key = {"class": self.cache_name, "version": VERSION, "files": digest(sums)}
        return {**key, **self.record_key()}

    def documents(self, part: str) -> Iterator[str]:
        texts = []
        for row in self._rows():
            if row.get("split") == part:
                texts.append(row["text"])
        random.Random(f"{self.seed}/order").shuffle(texts)
        yield from texts

    def _rows(self) -> Iterator[dict]:
        """Yield the records, which are made at the first call and kept."""
        path = self.folder
        if not self.is_made:
            path = self._made()
        rows = Text(str(path), column="text")
        for where, row in rows.located_rows():
            rows.cell(row, where)
            if row.get("split") not in PARTS:
                raise SlimError(
                    f"{where}: no split ({', '.join(PARTS)}). Make it with python -m "
                    "slim.documents, or use data=text for other rows."
                )
            yield row

    def _made(self) -> Path:
        """Return the file with the records, which another process may be making."""
        cache = Path(self.cache).expanduser().absolute()
        path = cache / "records" / f"{digest(self.cache_key())}{RECORDS}"
        if path.is_file():
            return path
        with Store(cache).lock(path):
            if not path.is_file():
                folder = self.folder
                if self.text == embedded.NAME:
                    folder = embedded.write_documents(cache / "tiny_documents")
                write_records(Conversion(folder, self, cache), path)
        return path


def write_records(conversion: Conversion, path: Path) -> None:
    """Write the records of a conversion, one JSON object a line, and its report next to them.

    Args:
        conversion: that makes them.
        path: of the file, which appears whole or not at all.
    """
    with atomic_path(path) as partial:
        with partial.open("w", encoding="utf-8") as file:
            for record in conversion.records():
                file.write(json.dumps(record, ensure_ascii=False) + "\n")
        report = conversion.report
        with atomic_path(report_path(path)) as partial_report:
            text = json.dumps(report.as_json(), ensure_ascii=False, indent=1)
            partial_report.write_text(text + "\n", encoding="utf-8")
    records = counted(sum(report.records.values()), "record")
    say(
        f"{records} of {counted(report.files, 'file')}; dropped and why: {report_path(path)}",
        head="documents",
    )


def report_path(path: Path) -> Path:
    """Return where the report of a file of records is."""
    return path.with_name(path.name.removesuffix(RECORDS) + ".report.json")

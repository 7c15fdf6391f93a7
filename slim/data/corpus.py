"""Plain text from a file or a data set, and what all data that is read from one shares: parts,
order, streaming."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, TypeVar

from slim.core.errors import SlimError
from slim.core.settings import cache_name, require_flag, require_number
from slim.data.base import TEST, VALIDATION, PlainText, TrainingData, is_test, is_validation
from slim.data.text import Text

BUFFER = 4096  # documents that are shuffled together where the whole is never in memory
PASSAGE = 4000  # characters, where a text has no documents of its own

Item = TypeVar("Item")


@dataclass
class Corpus(TrainingData):
    """A file or data set, and how it is divided. Training never reads validation or test.

    Attributes:
        text: as in :class:`slim.data.text.Text`, like the next four.
        subset: configuration of a data set; None: its default.
        split: split to train on.
        revision: branch, tag or commit of a hub data set; None: its main branch.
        streaming: read the data as far as the steps need, in a random order only within ``BUFFER``
            documents.
        validation_split: split of a data set; None: a share of the documents.
        validation_fraction: that share, 0.001 to 0.5, chosen by a hash of the documents' text.
        test_split: as ``validation_split``.
        test_fraction: as ``validation_fraction``; 0 to 0.5.
        seed: of the order of the documents and of the choice of those kept apart.
    """

    text: str = ""
    subset: str | None = None
    split: str = "train"
    revision: str | None = None
    streaming: bool = False
    validation_split: str | None = None
    validation_fraction: float = 0.05
    test_split: str | None = None
    test_fraction: float = 0.0
    seed: int = 0

    noun = "The data"
    allowed = "a .jsonl or .parquet file, or the id of a hub data set"

    def __post_init__(self) -> None:
        if not isinstance(self.text, str) or not self.text:
            raise SlimError(f"This data needs data.text=...: {self.allowed}.")
        require_flag("data.streaming", self.streaming)
        require_number("data.seed", self.seed, 0, integer=True)
        if self.validation_split is None:
            require_number("data.validation_fraction", self.validation_fraction, 0.001, 0.5)
        require_number("data.test_fraction", self.test_fraction, 0, 0.5)
        self._check_splits()

    def _check_splits(self) -> None:
        """Refuse to learn from what is there to measure with."""
        if str(self.split).split("[")[0].startswith("test"):
            raise SlimError(
                f"data.split={self.split} is there to test models, not to train them. Use another "
                "split, such as train, and data.validation_split or data.test_split for this one."
            )
        path = self.source(self.split).path
        if path is not None and path.is_file() and (self.validation_split or self.test_split):
            raise SlimError(
                f"{self.text} is one file and has no splits. Leave data.validation_split and "
                "data.test_split at null, or give a folder with files named train, validation and "
                "test."
            )
        seen = {self.split}
        for split in (self.validation_split, self.test_split):
            if split is not None and split in seen:
                raise SlimError(
                    "data.split, data.validation_split and data.test_split must differ, and two "
                    f"of them are {split}. Use null for a share chosen by a hash."
                )
            seen.add(split)

    @property
    def endless(self) -> bool:
        """Whether epochs mean nothing: nobody knows where a stream ends before having read it."""
        return self.streaming

    @property
    def title(self) -> str:
        return f"{self.noun} {self.text}"

    def source(self, split: str) -> Text:
        """Return the text of a split. Raises ``SlimError`` if there can be none."""
        text = Text(self.text, self.subset, split, revision=self.revision, streaming=self.streaming)
        text.group = "data"
        return text

    def check_row(self, row: dict, where: str) -> None:
        """Raise ``SlimError`` for a row that cannot be learned from.

        Args:
            row: of the file or data set.
            where: it stands, for messages.
        """

    def part_identity(self, *names: str) -> dict:
        """Return what the text is and how it is divided, and the settings ``names``, as plain
        values."""
        settings = {name: getattr(self, name) for name in names}
        settings["validation_split"] = self.validation_split
        settings["seed"] = self.seed
        settings["validation_fraction"] = None
        if not self.validation_split:
            settings["validation_fraction"] = self.validation_fraction
        # what is held back for a test is missing in training
        if self.test_fraction and not self.test_split:
            settings["test_fraction"] = self.test_fraction
        if self.streaming:  # another order
            settings["streaming"] = True
        return {"class": cache_name(self), **self._text_identity, **settings}

    @cached_property
    def _text_identity(self) -> dict:
        return self.source(self.split).text_identity()

    def split_of(self, part: str) -> str | None:
        """Return the split that holds ``part`` alone, or None where it is a share of ``split``."""
        splits = {VALIDATION: self.validation_split, TEST: self.test_split}
        return splits.get(part) or None

    def opened(self, part: str) -> Text:
        """Return the text in which ``part`` is."""
        return self.source(self.split_of(part) or self.split)

    def belongs(self, text: str, part: str) -> bool:
        """Whether a document of :meth:`opened` belongs to ``part``.

        Args:
            text: what the document is told apart by.
            part: ``"train"``, ``"validation"`` or ``"test"``.
        """
        if self.split_of(part):
            return True
        in_validation = not self.validation_split and is_validation(
            text, self.validation_fraction, self.seed
        )
        in_test = not self.test_split and is_test(text, self.test_fraction, self.seed)
        if part == VALIDATION:
            return in_validation
        if part == TEST:
            return in_test
        return not in_validation and not in_test

    def shuffled(self, items: Iterable[Item]) -> Iterator[Item]:
        """Yield the items in random order; streamed ones in an order that is random nearby."""
        order = random.Random(f"{self.seed}/order")
        if not self.streaming:
            everything = list(items)
            order.shuffle(everything)
            yield from everything
            return
        buffer: list[Item] = []
        for item in items:
            buffer.append(item)
            if len(buffer) > BUFFER:
                yield _taken(buffer, order)
        while buffer:
            yield _taken(buffer, order)


def _taken(buffer: list[Item], order: random.Random) -> Item:
    """Remove a random item and return it; the last one takes its place."""
    place = order.randrange(len(buffer))
    item = buffer[place]
    buffer[place] = buffer[-1]
    buffer.pop()
    return item


@dataclass
class TextData(Corpus, PlainText):
    """Plain text from a file or a data set.

    Attributes:
        column: text column of a data set or of a file with rows.
        passage: the text is joined and cut at line ends into documents of about so many
            characters; 0 leaves the documents as they are. A ``.txt`` file, being one document, is
            always cut.
    """

    cache_name: ClassVar[str] = "TextData"

    column: str = "text"
    passage: int = 0

    noun = "The text"
    allowed = "a .txt, .jsonl or .parquet file, or the id of a hub data set"

    def __post_init__(self) -> None:
        require_number("data.passage", self.passage, 0, integer=True)
        super().__post_init__()

    def source(self, split: str) -> Text:
        text = Text(self.text, self.subset, split, self.column, self.revision, self.streaming)
        text.group = "data"
        return text

    def check_row(self, row: dict, where: str) -> None:
        self.source(self.split).cell(row, where)

    def cache_key(self) -> dict:
        return self.part_identity("passage")

    def documents(self, part: str) -> Iterator[str]:
        return self.shuffled(
            text for text in self._passages(part) if text.strip() and self.belongs(text, part)
        )

    def _passages(self, part: str) -> Iterable[str]:
        """Yield the documents of the part's split, cut where they are to be cut."""
        source = self.opened(part)
        is_one_document = source.path is not None and source.path.suffix == ".txt"
        if self.passage or is_one_document:
            return passages(source.documents(), self.passage or PASSAGE)
        return source.documents()


def passages(documents: Iterable[str], length: int) -> Iterator[str]:
    """Join documents and cut them again at line ends.

    Args:
        documents: each ends a line.
        length: characters of a piece, about.
    """
    lines: list[str] = []
    size = 0
    for document in documents:
        if not document.endswith("\n"):
            document += "\n"
        for line in document.splitlines(keepends=True):
            lines.append(line)
            size += len(line)
            if size >= length:
                yield "".join(lines)
                lines = []
                size = 0
    if lines:
        yield "".join(lines)

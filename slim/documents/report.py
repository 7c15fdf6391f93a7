"""What a conversion made, and what it dropped and why."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass, field

from slim.core.tables import Table


@dataclass
class Drop:
    """Something that is not in the records.

    Attributes:
        source: the file.
        page: number of the page; None: the whole file.
        what: ``"file"``, ``"page"``, ``"table"``, ``"code"``, ``"line"`` or ``"picture"``.
        reason: why.
        count: how many.
    """

    source: str
    page: int | None
    what: str
    reason: str
    count: int = 1


@dataclass
class Report:
    """What was made, and what was dropped and why.

    Attributes:
        files: that were read.
        pages: that they have.
        records: that were made, by split.
        characters: in all records.
        length: characters of a page, by which pages are split and joined.
        scans: pages read by OCR.
        confidence: mean confidence of OCR over these pages in per cent; None without any.
        pictures: on the pages.
        asked: answers of the server in this run.
        tokens: of these questions and answers.
        drops: what was dropped.
    """

    files: int = 0
    pages: int = 0
    records: Counter = field(default_factory=Counter)
    characters: int = 0
    length: float = 0.0
    scans: int = 0
    confidence: float | None = None
    pictures: int = 0
    asked: int = 0
    tokens: int = 0
    drops: list[Drop] = field(default_factory=list)

    def drop(self, source: str, page: int | None, what: str, reason: str, count: int = 1) -> None:
        """Write down something that is not in the records; see :class:`Drop`.

        Args:
            source: the file.
            page: number of the page; None: the whole file.
            what: kind of what was dropped.
            reason: why.
            count: how many.
        """
        self.drops.append(Drop(source, page, what, reason, count))

    def as_json(self) -> dict:
        """Return the report as plain JSON values."""
        return {**asdict(self), "records": dict(self.records), "length": round(self.length)}

    def tables(self) -> list[Table]:
        """Return the report for people: what there is, and what was dropped for which reason."""
        made = [["files read", f"{self.files:,}"], ["pages", f"{self.pages:,}"]]
        if self.scans:
            confidence = "" if self.confidence is None else f" (confidence {self.confidence} %)"
            made.append(["  of them read by OCR", f"{self.scans:,}{confidence}"])
        if self.pictures:
            made.append(["pictures", f"{self.pictures:,}"])
        for split, count in self.records.items():
            made.append([f"records: {split}", f"{count:,}"])
        made.append(["characters", f"{self.characters:,}"])
        made.append(["characters of a page", f"{self.length:,.0f}"])
        if self.asked:
            made.append(["answers of the server", f"{self.asked:,} ({self.tokens:,} tokens)"])
        tables = [Table(["made", ""], made)]
        rows = self._reasons()
        if rows:
            tables.append(Table(["dropped", "number", "why", "such as"], rows, fold=[2, 3]))
        return tables

    def _reasons(self) -> list[list[str]]:
        """Return a row for each reason: what was dropped, how often, and an example."""
        counts: Counter = Counter()
        examples: dict[tuple[str, str], str] = {}
        for drop in self.drops:
            # which page it repeats, or which line repeats, is in the file
            reason = drop.reason.partition(" as ")[0].partition(":")[0]
            key = (drop.what, reason)
            counts[key] += drop.count
            place = drop.source if drop.page is None else f"{drop.source}, page {drop.page}"
            examples.setdefault(key, place)
        rows = []
        for key, count in counts.most_common():
            what, reason = key
            rows.append([what, f"{count:,}", reason, examples[key]])
        return rows

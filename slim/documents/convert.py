"""From a folder of documents to records: read, cleaned, without duplicates, translated if asked, in
pieces of about equal length, divided by document."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from slim.core.console import track
from slim.core.errors import SlimError
from slim.core.text import counted
from slim.data.base import TEST, TRAIN, VALIDATION, share_of
from slim.documents.asking import Asking
from slim.documents.duplicates import Duplicates
from slim.documents.layout import page_text
from slim.documents.lengths import Passage, fitted
from slim.documents.pages import CODE, TABLE, Page
from slim.documents.reading import File, PageStore, files_in, read_all
from slim.documents.repeats import remove_repeats
from slim.documents.report import Report
from slim.documents.settings import DocumentSettings

USUAL_LENGTH = 2000  # characters of a page, where no document has pages
SHOWN = 3  # files named in a message


class Conversion:
    """The documents of a folder as records.

    Args:
        folder: with the documents; or a single one.
        settings: what is kept, and in what pieces.
        cache: folder for pages that were read and answers that were paid for.

    Attributes:
        report: of what was made; complete once all records are.
    """

    def __init__(self, folder: Path, settings: DocumentSettings, cache: Path):
        self.folder = folder
        self.settings = settings
        self.store = PageStore(cache)
        self.report = Report()
        self._asking = Asking(settings, self.store)

    def records(self) -> Iterator[dict]:
        """Yield the records, document after document.

        Returns:
            ``text``; ``source`` (the file), ``page`` and ``last_page``, ``part`` (of a page that
            was split, from 1, else 0); ``document`` (16 hex digits of its checksum); ``split``;
            ``ocr`` (confidence in per cent, or None); ``pictures`` (``page``, ``width``,
            ``height``, and a ``description`` if asked for).

        Raises:
            SlimError: when nothing can be read, a scan needs Tesseract, or the server is down.
        """
        files = self._readable()
        lengths, paged = self._measure(files)
        self.report = Report(files=len(files))
        for file in self._unreadable:
            self.report.drop(file.source, None, "file", file.problem)
        length = self.settings.length
        if length is None:
            length = sum(paged) / len(paged) if paged else USUAL_LENGTH
        self.report.length = length
        with_text = [file for file in files if lengths[file.source]]
        if not with_text:
            for file in files:
                self._passages(file, self.report, [])
            raise SlimError(self._nothing())
        splits = self._splits(with_text)
        duplicates = Duplicates(self.settings.similarity)
        confidences: list[float] = []
        for file in track(files, "documents"):
            passages = self._passages(file, self.report, confidences)
            passages = self._distinct(file, passages, duplicates)
            passages = self._asking.translated(file, passages, self.report)
            self._asking.describe(file, passages, self.report)
            for passage in fitted(passages, length, self.settings.join):
                if len(passage.text) < self.settings.least:
                    self.report.drop(
                        file.source, passage.first, "page",
                        f"fewer than {self.settings.least} characters",
                    )  # fmt: skip
                    continue
                yield self._record(file, passage, splits)
        if confidences:
            self.report.confidence = round(sum(confidences) / len(confidences), 1)
        self.report.asked = self._asking.budget.requests
        self.report.tokens = self._asking.budget.spent
        if not self.report.records:
            raise SlimError(self._nothing())

    def _readable(self) -> list[File]:
        """Read all files; return those that can be read, each content once."""
        files = read_all(files_in(self.folder), self.settings, self.store)
        seen: dict[str, str] = {}
        readable = []
        self._unreadable: list[File] = []
        for file in files:
            if not file.problem and file.checksum in seen:
                file.problem = f"the same file as {seen[file.checksum]}"
            if file.problem:
                self._unreadable.append(file)
                continue
            seen[file.checksum] = file.source
            readable.append(file)
        return readable

    def _measure(self, files: list[File]) -> tuple[dict[str, int], list[int]]:
        """Return the characters of every file, and of every page of files that have pages."""
        lengths = {}
        paged = []
        for file in files:
            passages = self._passages(file, Report(), [])
            lengths[file.source] = sum(len(passage.text) for passage in passages)
            if len(passages) > 1:
                paged += [len(passage.text) for passage in passages]
        return lengths, paged

    def _passages(self, file: File, report: Report, confidences: list[float]) -> list[Passage]:
        """Return the cleaned text of a file's pages; what is dropped goes into ``report``."""
        pages = self.store.pages(file, self.settings)
        report.pages += len(pages) + file.left_out
        if file.left_out:
            limit = self.settings.typed("max_pages", self.settings.max_pages)
            report.drop(file.source, None, "page", f"beyond {limit}", file.left_out)
        for pattern, count in remove_repeats(pages).items():
            report.drop(file.source, None, "line", f"repeats on pages: {pattern}", count)
        pictures = self._shown_pictures(file, pages, report)
        passages = []
        for page in pages:
            if page.problem:
                report.drop(file.source, page.number, "page", page.problem)
                continue
            if page.askew:
                report.drop(file.source, page.number, "line", "text at another angle")
            self._without_kinds(file, page, report)
            if page.confidence is not None:
                report.scans += 1
                confidences.append(page.confidence)
            text = page_text(page.lines)
            on_page = [(page.number, picture) for picture in page.pictures if picture in pictures]
            if not text.strip() and not (on_page and self.settings.describe):
                report.drop(file.source, page.number, "page", "no text")
                continue
            passages.append(Passage(text, page.number, page.number, 0, page.confidence, on_page))
        return passages

    def _shown_pictures(self, file: File, pages: list[Page], report: Report) -> list:
        """Return the pictures that stand on few pages: logos stand on all."""
        on_pages: Counter = Counter()
        by_name = {}
        for page in pages:
            for picture in page.pictures:
                on_pages[picture.name] += 1
                by_name[picture.name] = picture
        shown = []
        for name, count in on_pages.items():
            if count >= max(3, 0.3 * len(pages)):
                report.drop(file.source, None, "picture", "repeats on pages", count)
            else:
                shown.append(by_name[name])
                report.pictures += count
        return shown

    def _without_kinds(self, file: File, page: Page, report: Report) -> None:
        """Remove tables and code from a page where the settings say so."""
        for kind, choice in ((TABLE, self.settings.tables), (CODE, self.settings.code)):
            if choice == "keep":
                continue
            kept = [line for line in page.lines if line.kind != kind]
            count = len(page.lines) - len(kept)
            if count:
                option = "tables" if kind == TABLE else "code"
                reason = self.settings.typed(option, "drop")
                report.drop(file.source, page.number, kind, reason, count)
            page.lines = kept

    def _distinct(
        self, file: File, passages: list[Passage], duplicates: Duplicates
    ) -> list[Passage]:
        """Return the pages that say something new."""
        kept = []
        for passage in passages:
            name = f"{file.source}, page {passage.first}"
            original = duplicates.original(passage.text, name) if passage.text.strip() else None
            if original is None:
                kept.append(passage)
            else:
                self.report.drop(
                    file.source, passage.first, "page", f"nearly the same as {original}"
                )
        return kept

    def _splits(self, files: list[File]) -> dict[str, str]:
        """Return the split of every document, chosen by a hash of its content; empty where the
        split goes by record."""
        settings = self.settings
        parts = ((VALIDATION, settings.validation_fraction), (TEST, settings.test_fraction))
        wanted = [(name, fraction) for name, fraction in parts if fraction]
        if settings.split_by == "page" or not wanted:
            return {}
        order = sorted(files, key=lambda file: share_of(file.checksum, settings.seed))
        splits = {file.checksum: TRAIN for file in files}
        if len(files) <= len(wanted):
            raise SlimError(
                f"{counted(len(files), 'document')} with text cannot be divided by document into "
                f"{len(wanted) + 1} parts.\nAdd documents, or use "
                f"{settings.typed('split_by', 'page')}, or "
                f"{settings.typed('validation_fraction', 0)} for training only."
            )
        place = 0
        for name, fraction in wanted:
            count = max(1, round(fraction * len(files)))
            for file in order[place : place + count]:
                splits[file.checksum] = name
            place += count
        return splits

    def _split(self, file: File, passage: Passage, splits: dict[str, str]) -> str:
        if splits:
            return splits[file.checksum]
        share = share_of(passage.text, self.settings.seed)
        if share < self.settings.validation_fraction:
            return VALIDATION
        if share >= 1 - self.settings.test_fraction:
            return TEST
        return TRAIN

    def _record(self, file: File, passage: Passage, splits: dict[str, str]) -> dict:
        """Return a passage as a record, and count it."""
        split = self._split(file, passage, splits)
        self.report.records[split] += 1
        self.report.characters += len(passage.text)
        pictures = []
        for page, picture in passage.pictures:
            row: dict = {"page": page, "width": picture.width, "height": picture.height}
            description = self._asking.descriptions.get(picture.name)
            if description:
                row["description"] = description
            pictures.append(row)
        return {
            "text": passage.text,
            "source": file.source,
            "page": passage.first,
            "last_page": passage.last,
            "part": passage.part,
            "document": file.checksum[:16],
            "split": split,
            "ocr": passage.confidence,
            "pictures": pictures,
        }

    def _nothing(self) -> str:
        """Say why there is no record."""
        reasons: dict[str, list[str]] = {}
        for drop in self.report.drops:
            if drop.what in ("file", "page"):
                reasons.setdefault(drop.reason, []).append(drop.source)
        parts = []
        for reason, sources in reasons.items():
            names = ", ".join(list(dict.fromkeys(sources))[:SHOWN])
            parts.append(f"{reason}: {names}")
        why = "; ".join(parts[:SHOWN]) or "it holds no files"
        return f"{self.folder} has no text that can be read ({why})."

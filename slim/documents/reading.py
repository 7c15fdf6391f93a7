"""Files of a folder, and their pages: read in several processes, each page once."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import active_children, get_context
from pathlib import Path

from slim.checkpoints.store import digest
from slim.core.console import progress_bar
from slim.core.errors import SlimError
from slim.core.io import atomic_path, sha256
from slim.documents import markup, ocr, office, pdf
from slim.documents.pages import Page, Unreadable, as_json, from_json
from slim.documents.settings import DocumentSettings

VERSION = 1  # of the readers: raised when they give other pages of the same file
PART = 16  # pages of a PDF that one process reads at a time

PDF = (".pdf",)
PLAIN = {
    ".pptx": office.read_pptx,
    ".docx": office.read_docx,
    ".html": markup.read_html,
    ".htm": markup.read_html,
    ".md": markup.read_markdown,
    ".markdown": markup.read_markdown,
    ".txt": markup.read_plain,
}
WITH_PICTURES = (".pptx", ".docx")
SCANS = (".png", ".jpg", ".jpeg", ".tif", ".tiff")
ENDINGS = (*PDF, *PLAIN, *SCANS)


@dataclass
class File:
    """A file.

    Attributes:
        path: where it is.
        source: its name below the folder, with ``/``.
        checksum: SHA-256 of its content.
        pages: number of them; 1 where only reading tells.
        problem: why it cannot be read; empty where it can.
        left_out: pages beyond the limit.
    """

    path: Path
    source: str
    checksum: str = ""
    pages: int = 1
    problem: str = ""
    left_out: int = 0

    def parts(self) -> list[range]:
        """Return the numbers of the pages that are read together."""
        if self.path.suffix.lower() not in PDF:
            return [range(1, 2)]
        starts = range(1, self.pages + 1, PART)
        return [range(start, min(start + PART, self.pages + 1)) for start in starts]


def files_in(folder: Path) -> list[File]:
    """Return all files of a folder and of those below it by name, or the one file; hidden ones are
    left out.

    Args:
        folder: a folder or a file.

    Raises:
        SlimError: when there is no such folder or file.
    """
    if folder.is_file():
        return [File(folder, folder.name)]
    if not folder.is_dir():
        raise SlimError(f"There is no folder or file {folder}. Give one with documents.")
    files = []
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        is_hidden = any(part.startswith((".", "~$")) for part in name.parts)
        if path.is_file() and not is_hidden:
            files.append(File(path, name.as_posix()))
    return files


def inspect(file: File, settings: DocumentSettings) -> File:
    """Return a file with its checksum and number of pages, or why it cannot be read.

    Args:
        file: as :func:`files_in` returned it.
        settings: with the limits of a file.
    """
    ending = file.path.suffix.lower()
    if ending not in ENDINGS:
        file.problem = f"kind of file that is not read ({ending or 'no ending'})"
        return file
    try:
        if file.path.stat().st_size > settings.max_megabytes * 1e6:
            limit = settings.typed("max_megabytes", settings.max_megabytes)
            file.problem = f"larger than {limit}"
            return file
        file.checksum = sha256(file.path)
        if ending in PDF:
            pages = pdf.count_pages(file.path)
            file.pages = min(pages, settings.max_pages)
            file.left_out = pages - file.pages
    except Unreadable as error:
        file.problem = str(error)
    except ImportError as error:
        raise _missing(error) from error
    except OSError as error:
        file.problem = f"cannot be read ({error.strerror or error})"
    return file


def _missing(error: ImportError) -> SlimError:
    return SlimError(
        f"Documents need packages that are not installed ({error.name}): "
        "pip install 'slim[documents]'"
    )


class PageStore:
    """Pages that were read, on disk: what was read once, by OCR above all, is not read again.

    Attributes:
        folder: of the store; made when the first page comes.
        pictures: folder with the pictures of the pages, for a model that describes them.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.pictures = folder / "pictures"

    def path(self, file: File, numbers: range, settings: DocumentSettings) -> Path:
        """Return where pages of a file are kept.

        Args:
            file: with its checksum.
            numbers: of the pages.
            settings: how they are read.
        """
        key = [VERSION, file.checksum, file.path.suffix.lower(), numbers.start, numbers.stop]
        key += [settings.ocr, settings.languages, settings.describe]
        return self.folder / "pages" / f"{digest(key)}.json"

    def find(self, file: File, numbers: range, settings: DocumentSettings) -> list[Page] | None:
        """Return pages of a file, or None where they were not read or what is there is damaged.

        Args:
            file: as for :meth:`path`.
            numbers: as for :meth:`path`.
            settings: as for :meth:`path`.
        """
        try:
            text = self.path(file, numbers, settings).read_text(encoding="utf-8")
            return from_json(json.loads(text))
        except (OSError, ValueError, TypeError, KeyError):
            return None

    def add(
        self, file: File, numbers: range, settings: DocumentSettings, pages: list[Page]
    ) -> None:
        """Keep pages of a file.

        Args:
            file: as for :meth:`path`.
            numbers: as for :meth:`path`.
            settings: as for :meth:`path`.
            pages: that were read.
        """
        path = self.path(file, numbers, settings)
        # several processes may read copies of a file at the same time
        partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
        with atomic_path(path, partial) as target:
            target.write_text(json.dumps(as_json(pages)), encoding="utf-8")

    def pages(self, file: File, settings: DocumentSettings) -> list[Page]:
        """Return all pages of a file that :func:`read_all` has read.

        Args:
            file: that it returned.
            settings: how they were read.
        """
        pages: list[Page] = []
        for numbers in file.parts():
            pages += self.find(file, numbers, settings) or []
        return pages


def read_part(file: File, numbers: range, settings: DocumentSettings, store: PageStore) -> int:
    """Read pages of a file, keep them, and return how many there are.

    Args:
        file: with its checksum.
        numbers: of the pages.
        settings: how they are read.
        store: keeps them.

    Raises:
        SlimError: when a scan needs Tesseract, and it is not there.
    """
    pages = store.find(file, numbers, settings)
    if pages is None:
        try:
            pages = _read(file, numbers, settings, store)
        except Unreadable as error:
            pages = [Page(numbers.start, problem=str(error))]
        except (SlimError, MemoryError):
            raise
        except ImportError as error:
            raise _missing(error) from error
        except Exception as error:  # a broken file must not end the reading of a thousand others
            pages = [Page(numbers.start, problem=f"cannot be read ({type(error).__name__})")]
        store.add(file, numbers, settings, pages)
    return len(pages)


def _read(file: File, numbers: range, settings: DocumentSettings, store: PageStore) -> list[Page]:
    ending = file.path.suffix.lower()
    pictures = store.pictures if settings.describe else None
    if ending in SCANS:
        return _images(file.path, settings)
    if ending in PDF:
        pages = []
        for page in pdf.read_pages(file.path, numbers, pictures):
            pages.append(_with_ocr(file.path, page, settings))
        return pages
    if ending in WITH_PICTURES:
        return PLAIN[ending](file.path, pictures)
    return PLAIN[ending](file.path)


def _with_ocr(path: Path, page: Page, settings: DocumentSettings) -> Page:
    """Return a page of a PDF, read by OCR where it has to be."""
    if page.problem not in ("", pdf.SCAN):
        return page
    if settings.ocr == "never" and page.problem:
        page.problem = f"scan, and {settings.typed('ocr', 'never')}"
        return page
    if settings.ocr == "always" or page.problem:
        ocr.require_tesseract(settings.languages)
        return ocr.read_scan(pdf.rendered(path, page.number), page.number, settings.languages)
    return page


def _images(path: Path, settings: DocumentSettings) -> list[Page]:
    """Return the pages of an image file."""
    from PIL import Image, ImageSequence, UnidentifiedImageError

    if settings.ocr == "never":
        return [Page(1, problem=f"scan, and {settings.typed('ocr', 'never')}")]
    ocr.require_tesseract(settings.languages)
    pages = []
    try:
        with Image.open(path) as image:
            for number, frame in enumerate(ImageSequence.Iterator(image), 1):
                pages.append(ocr.read_scan(frame.convert("L"), number, settings.languages))
    except (UnidentifiedImageError, OSError, Image.DecompressionBombError) as error:
        raise Unreadable(f"damaged or no image ({type(error).__name__})") from error
    return pages


def read_all(files: list[File], settings: DocumentSettings, store: PageStore) -> list[File]:
    """Read all pages of all files and keep them in ``store``.

    Args:
        files: that :func:`files_in` returned.
        settings: how they are read.
        store: keeps the pages.

    Returns:
        The files, with a ``problem`` where they cannot be read.

    Raises:
        SlimError: when a scan needs Tesseract, and it is not there.
    """
    jobs = min(settings.jobs or os.cpu_count() or 1, len(files)) or 1
    with _Workers(jobs) as workers:
        inspected = []
        with progress_bar("files", len(files)) as advance:
            for file, result in workers.run(inspect, [(file, settings) for file in files]):
                if isinstance(result, Exception):
                    file[0].problem = "crashed the reader"
                    result = file[0]
                inspected.append(result)
                advance()
        tasks = []
        for file in inspected:
            if not file.problem:
                tasks += [(file, numbers, settings, store) for numbers in file.parts()]
        with progress_bar("pages", sum(len(task[1]) for task in tasks)) as advance:
            for task, result in workers.run(read_part, tasks):
                if isinstance(result, Exception):
                    page = Page(task[1].start, problem="crashed the reader")
                    store.add(*task[:3], [page])
                advance(len(task[1]))
    return sorted(inspected, key=lambda file: file.source)


class _Workers:
    """Processes that do one thing after the other; with one job this process itself.

    A file that makes a library crash ends its process: then what is left is done in processes of
    its own, one task each, so that only that file is lost."""

    def __init__(self, jobs: int):
        self.jobs = jobs

    def __enter__(self) -> _Workers:
        return self

    def __exit__(self, *_) -> None:
        return

    def run(self, function, tasks: list[tuple]) -> Iterator[tuple]:
        """Yield each task with its result as it comes, or with the error of a crash.

        Args:
            function: of a module, called with the parts of each task.
            tasks: what can be sent to another process.
        """
        if self.jobs == 1:
            for task in tasks:
                yield task, function(*task)
            return
        left = dict(enumerate(tasks))
        others = active_children()
        with self._pool(self.jobs) as pool:
            futures: dict[Future, int] = {}
            for number, task in left.items():
                futures[pool.submit(function, *task)] = number
            try:
                for future in as_completed(futures):
                    result = future.result()
                    yield left.pop(futures[future]), result
                return
            except BrokenProcessPool:
                pass
            except BaseException:
                # leaving the pool would wait for pages that nobody wants any more
                for process in active_children():
                    if process not in others:
                        process.terminate()
                raise
        for number in sorted(left):
            with self._pool(1) as pool:
                try:
                    result = pool.submit(function, *left[number]).result()
                except BrokenProcessPool as error:
                    result = error
            yield left[number], result

    def _pool(self, jobs: int) -> ProcessPoolExecutor:
        # spawned: a copy of a process with torch's threads may hang
        return ProcessPoolExecutor(jobs, get_context("spawn"), _start)


def _start() -> None:
    """Prepare a worker: Tesseract's threads would compete with the other workers."""
    import signal

    os.environ["OMP_THREAD_LIMIT"] = "1"
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C ends the parent, which ends them

"""Everything that slim says while it works, and the signs of life of long work.

Messages go to standard error, so that standard output holds the result alone, and through the
logger ``slim``: ``hydra/job_logging=default`` writes them to a file as well, ``hydra.verbose=slim``
shows details. A character that a stream cannot encode is written as its escape (``\\xe8``): text
never ends a run.
"""

from __future__ import annotations

import logging
import os
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import NoReturn, TextIO, TypeVar

T = TypeVar("T")

FILE_WIDTH = 80  # characters per line of results where there is no terminal
INTERVAL = 30.0  # seconds between two signs of life where there is no terminal
LOGGER = logging.getLogger("slim")


def say(message: str, head: str = "", dim: bool = False) -> None:
    """Tell the user something on standard error.

    Args:
        message: plain text; square brackets have no meaning in it.
        head: what the message is about, set in bold in front of it.
        dim: show it less prominently.
    """
    _log(logging.INFO, message, head, "bold", "dim" if dim else "")


def warn(message: str, head: str = "") -> None:
    """Tell the user that something is not as it should be; the work continues.

    Args:
        message: plain text.
        head: what is wrong, in a few words, set in yellow in front of the message. Without it the
            message itself is yellow.
    """
    _log(logging.WARNING, message, head, "yellow", "" if head else "yellow")


def fail(message: str, code: int) -> NoReturn:
    """Print an error as ``slim: message`` and end the process.

    Args:
        message: one or two lines.
        code: the exit code.
    """
    never_fail_on_a_character()
    _log(logging.ERROR, f"slim: {message}", "", "", "")
    sys.exit(code)


def be_quiet() -> None:
    """Show nothing from here on: of several processes, one speaks."""
    console().quiet = True


def never_fail_on_a_character() -> None:
    """Let standard output and error escape what their encoding lacks (ASCII, lone surrogates)."""
    for stream in (sys.stdout, sys.stderr):
        # some stand-ins for streams, as in notebooks, have no encoding to speak of
        if hasattr(stream, "reconfigure") and stream.errors != "backslashreplace":
            stream.reconfigure(errors="backslashreplace")


@contextmanager
def output_may_be_cut() -> Iterator[None]:
    """Let the body end without an error where whoever reads standard output has seen enough, as
    ``| head`` does. Nothing more is written then."""
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        _write_nowhere(sys.stdout)


def _write_nowhere(stream: TextIO) -> None:
    """Let what is still written to a closed stream go nowhere, also at the end of the process."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def console():
    """Return the rich console on standard error. Messages go through :func:`say` and
    :func:`warn`."""
    global _console
    if _console is None:
        _console = _make_console(stderr=True)
    return _console


def _make_console(**settings):
    from rich.console import Console  # local: --help does without rich

    class PatientConsole(Console):
        def on_broken_pipe(self) -> None:  # rich would end the process, with its work
            self.quiet = True
            _write_nowhere(self.file)

    return PatientConsole(**settings)


_console = None


def results_console():
    """Return the rich console for results, standard output.

    A terminal has its own width; a file has ``FILE_WIDTH``, or what ``COLUMNS`` says.
    """
    never_fail_on_a_character()
    if sys.stdout.isatty():
        return _make_console()
    columns = os.environ.get("COLUMNS", "")
    width = FILE_WIDTH
    if columns.isdigit() and int(columns):
        width = int(columns)
    return _make_console(width=width)


def show_line(text: str) -> None:
    """Print plain text as one line of the results, however long: what is to be copied must not be
    broken."""
    results_console().print(text, highlight=False, markup=False, soft_wrap=True)


def show_labelled(label: str, text: str) -> None:
    """Print what can be pasted, after its label where both fit one line, else on a line of its own.

    Args:
        label: what it is.
        text: a path, a command or an address.
    """
    line = f"{label}: {text}"
    if len(line) > results_console().width:
        line = f"{label}:\n{text}"
    show_line(line)


def _log(level: int, message: str, head: str, head_style: str, style: str) -> None:
    if not any(isinstance(handler, _ConsoleHandler) for handler in LOGGER.handlers):
        LOGGER.addHandler(_ConsoleHandler())
        if LOGGER.level == logging.NOTSET:  # hydra.verbose=slim may have set it
            LOGGER.setLevel(logging.INFO)
    whole = f"{head} {message}" if head else message
    # the text is an argument, since "%" in it has no meaning
    LOGGER.log(level, "%s", whole, extra={"head": head, "styles": (head_style, style)})


class _ConsoleHandler(logging.Handler):
    """Shows what is logged on the console, above the bars."""

    def emit(self, record: logging.LogRecord) -> None:
        from rich.text import Text  # local: --help does without rich

        if record.levelno >= logging.ERROR:
            print(record.getMessage(), file=sys.stderr)  # at once, also where rich is slow to load
            return
        head_style, style = getattr(record, "styles", ("", ""))
        out = console()
        message = record.getMessage()
        if out.is_terminal:
            message = between_words(message, out.width)
        text = Text(message, style=style)
        text.stylize(head_style, 0, len(getattr(record, "head", "")))
        out.print(text, soft_wrap=True)


def between_words(message: str, width: int) -> str:
    """Return a message with line breaks where a terminal would break lines within words. What is
    longer than a line by itself, such as a path, stays in one piece.

    Args:
        message: of one line or several.
        width: of the terminal.
    """
    lines = []
    for line in message.split("\n"):
        parts = textwrap.wrap(line, width, break_long_words=False, break_on_hyphens=False)
        lines.extend(parts or [line])
    return "\n".join(lines)


@dataclass
class _Task:
    """Something under way. total: its steps, None if unknown. done: those that are finished."""

    title: str
    total: int | None = None
    done: int = 0
    started: float = field(default_factory=time.monotonic)

    def line(self) -> str:
        """Say how far it is: ``speed 12 of 40, 1 min so far, about 2 min left``."""
        elapsed = time.monotonic() - self.started
        parts = [self.title]
        if self.total:
            parts[0] += f" {self.done} of {self.total}"
        elif self.done:
            parts[0] += f" {self.done}"
        parts.append(f"{duration(elapsed)} so far")
        if self.total and 0 < self.done <= self.total:
            parts.append(f"about {duration(elapsed / self.done * (self.total - self.done))} left")
        return ", ".join(parts)


_tasks: list[_Task] = []  # under way, the innermost last


@contextmanager
def activity(title: str) -> Iterator[None]:
    """Give signs of life while the body runs, whatever it does: without a terminal a line every
    ``INTERVAL`` seconds, which shows the innermost bar. A terminal shows the bars themselves.

    Args:
        title: what is being done, such as ``prune taylor``.
    """
    with _signs_of_life(_Task(title)):
        yield


@contextmanager
def _signs_of_life(task: _Task) -> Iterator[None]:
    """Count ``task`` as under way; the outermost one keeps the thread that reports."""
    ended = threading.Event()
    outermost = not _tasks and not console().is_terminal
    _tasks.append(task)
    if outermost:
        threading.Thread(target=_report, args=(ended,), daemon=True).start()
    try:
        yield
    finally:
        ended.set()
        _tasks.remove(task)


def _report(ended: threading.Event) -> None:
    """Say every ``INTERVAL`` seconds what is under way, until ``ended``."""
    while not ended.wait(INTERVAL):
        under_way = list(_tasks)  # the other thread goes on meanwhile
        if not under_way:
            continue
        innermost = under_way[-1].line()
        if len(under_way) > 1:
            innermost = f"{under_way[0].title}: {innermost}"
        say(innermost, dim=True)


@contextmanager
def progress_bar(title: str, total: int | None = None) -> Iterator[Callable[..., None]]:
    """Show how far the body is: a bar on a terminal, else a line every ``INTERVAL`` seconds.

    Args:
        title: what is being done.
        total: number of steps, None if that is not known.

    Yields:
        ``advance(steps=1, note="")``; ``note`` is shown after the bar.
    """
    task = _Task(title, total)
    with _signs_of_life(task), _bar(title, total) as show:

        def advance(steps: int = 1, note: str | None = None) -> None:
            task.done += steps
            if show is not None:
                show(steps, note)

        yield advance


def _bar(title: str, total: int | None):
    """Return a context manager that shows a bar and yields what moves it, or None without a
    terminal."""
    if not console().is_terminal:
        return nullcontext()
    return _terminal_bar(title, total)


@contextmanager
def _terminal_bar(title: str, total: int | None) -> Iterator[Callable[[int, str | None], None]]:
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=console(), transient=True) as progress:
        task = progress.add_task(title, total=total, note="")

        def show(steps: int, note: str | None) -> None:
            if note is None:
                progress.update(task, advance=steps)
            else:
                progress.update(task, advance=steps, note=note)

        yield show


def track(items: Iterable[T], title: str, total: int | None = None) -> Iterator[T]:
    """Yield ``items`` while showing how far they are.

    Args:
        items: what to yield.
        title: what is being done with them.
        total: their number, for items that do not know it.
    """
    if total is None and hasattr(items, "__len__"):
        total = len(items)
    with progress_bar(title, total) as advance:
        for item in items:
            yield item
            advance()


def duration(seconds: float) -> str:
    """Show a time for people: ``45 s``, ``3 min``, ``1.5 h``."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    if seconds < 6000:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"


def hide_library_bars() -> None:
    """Switch off transformers' bars for reading and writing shards, which would break up our
    own."""
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()

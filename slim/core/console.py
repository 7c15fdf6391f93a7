"""Progress bars for long work, with the time left; silent where the output is not a terminal."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

T = TypeVar("T")


def console():
    """Return the console for progress and messages: standard error, so that standard output stays
    the result."""
    global _console
    if _console is None:
        from rich.console import Console

        _console = Console(stderr=True)
    return _console


_console = None


def results_console(width: int = 160):
    """Return the console for results: standard output, ``width`` characters wide where that is a
    file."""
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else width)


def be_quiet() -> None:
    """Show nothing from here on: of several processes, one speaks."""
    console().quiet = True


@contextmanager
def progress_bar(title: str, total: int | None = None) -> Iterator[Callable[..., None]]:
    """Show a bar while the body runs and yield ``advance(steps=1, note="")``; ``note`` is shown
    behind the bar."""
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
    out = console()
    with Progress(*columns, console=out, transient=True, disable=not out.is_terminal) as progress:
        task = progress.add_task(title, total=total, note="")

        def advance(steps: int = 1, note: str | None = None) -> None:
            progress.update(task, advance=steps, **({} if note is None else {"note": note}))

        yield advance


def track(items: Iterable[T], title: str, total: int | None = None) -> Iterator[T]:
    """Yield ``items`` while showing a bar."""
    if total is None and hasattr(items, "__len__"):
        total = len(items)
    with progress_bar(title, total) as advance:
        for item in items:
            yield item
            advance()


def hide_library_bars() -> None:
    """Switch off transformers' bars for reading and writing shards, which would break up our
    own."""
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()

"""What a sweep shows while it runs: a line per point that has ended, with how many are done and the
time left."""

from __future__ import annotations

import threading
from contextlib import nullcontext
from statistics import median
from typing import TYPE_CHECKING

from slim.core.console import console, progress_bar

if TYPE_CHECKING:
    from slim.sweeps.sweep import Sweep

INTERVAL = 0.3  # seconds between two looks into the sweep's folder


class Watcher(threading.Thread):
    """Looks for points that have ended, in whatever process, and prints a line for each.

    A line stands above the stages' own bars, in terminals and in log files. Where the points run in
    other processes, which are silent, there is a bar too."""

    def __init__(self, sweep: Sweep):
        super().__init__(daemon=True)
        self.sweep, self.seen = sweep, set()
        self._ended = threading.Event()

    def run(self) -> None:
        with (
            progress_bar("points", self.sweep.total)
            if self.sweep.elsewhere
            else nullcontext() as advance
        ):
            while not self._ended.wait(INTERVAL):
                ended = self.look()
                if advance is not None and ended:
                    advance(ended)

    def stop(self) -> None:
        """Show what is left to show and end."""
        self._ended.set()
        self.join()
        self.look()

    def look(self) -> int:
        """Print the points that have ended since the last look and return how many."""
        records, before = self.sweep.folder.points(), len(self.seen)
        for record in records:
            if record["number"] in self.seen:
                continue
            self.seen.add(record["number"])
            ended = [
                other for other in records if other["number"] in self.seen or other.get("reused")
            ]
            if not record.get("reused"):
                console().print(
                    line(record, ended, self.sweep.total, self.sweep.workers),
                    highlight=False,
                    soft_wrap=True,
                )
        return len(self.seen) - before


def line(record: dict, ended: list[dict], total: int | None, workers: int) -> str:
    """Return the line for a point: how many are done, what it was, how it ended, time left."""
    from rich.markup import escape

    failed = sum(other["status"] != "FINISHED" and not other.get("skipped") for other in ended)
    count = f"{len(ended)}/{total}" if total else str(len(ended))
    left = time_left(ended, total, workers)
    state = (
        f"{record['seconds']:.1f} s"
        if record["status"] == "FINISHED"
        else f"[red]{escape(record['error'] or 'failed')}[/]"
    )
    notes = [
        note
        for note in (f"{failed} failed" if failed else "", f"{left} left" if left else "")
        if note
    ]
    return f"[bold]point {count}[/] {escape(record['name'])}: {state}" + (
        f"  [dim]({', '.join(notes)})[/]" if notes else ""
    )


def time_left(ended: list[dict], total: int | None, workers: int) -> str:
    """Return the time left in words, from the median of the points that ran; empty where there is
    no telling."""
    times = [
        record["seconds"]
        for record in ended
        if record["status"] == "FINISHED" and not record.get("reused")
    ]
    if not total or not times or len(ended) >= total:
        return ""
    seconds = median(times) * (total - len(ended)) / workers
    return (
        f"{seconds:.0f} s"
        if seconds < 100
        else f"{seconds / 60:.0f} min"
        if seconds < 6000
        else f"{seconds / 3600:.1f} h"
    )

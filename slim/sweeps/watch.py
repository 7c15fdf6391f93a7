"""What a sweep shows while it runs: a line per point that has ended, with how many are done and the
time left."""

from __future__ import annotations

import threading
from contextlib import nullcontext
from statistics import median

from slim.core.console import duration, progress_bar, say, warn
from slim.sweeps.protocols import OpenSweep

INTERVAL = 0.3  # seconds between two looks into the sweep's folder


class Watcher(threading.Thread):
    """Looks for points that have ended, in whatever process, and prints a line for each.

    A line stands above the stages' own bars, in terminals and in log files. Where the points run in
    other processes, which are silent, there is a bar too.
    """

    def __init__(self, sweep: OpenSweep):
        super().__init__(daemon=True)  # it must not keep a process alive that was interrupted
        self.sweep = sweep
        self.seen: set[int] = set()  # numbers of the points that have their line
        self._ended = threading.Event()

    def run(self) -> None:
        bar = nullcontext()
        if self.sweep.elsewhere:
            bar = progress_bar("points", self.sweep.total)
        with bar as advance:
            while not self._ended.wait(INTERVAL):
                ended = self.look()
                if advance is not None and ended:
                    advance(ended)

    def stop(self) -> None:
        """Show what is left to show and end."""
        self._ended.set()
        self.join()
        self.look()  # for points that ended after the thread's last look

    def look(self) -> int:
        """Print the points that have ended since the last look and return how many."""
        records = self.sweep.folder.points()
        new = [record for record in records if record["number"] not in self.seen]
        for record in new:
            self.seen.add(record["number"])
            if record.get("reused"):  # the sweep has said how many these are
                continue
            # as if they had ended one after the other, so that the count rises by one per line
            ended = [r for r in records if r["number"] in self.seen or r.get("reused")]
            show = say if record["status"] == "FINISHED" else warn
            show(
                point_line(record, ended, self.sweep.total, self.sweep.workers),
                head=point_head(ended, self.sweep.total),
            )
        return len(new)


def point_head(ended: list[dict], total: int | None) -> str:
    """Return how many points are done: ``point 3/9``.

    Args:
        ended: records of the points that have ended.
        total: number of points, None if unknown.
    """
    if total:
        return f"point {len(ended)}/{total}"
    return f"point {len(ended)}"


def point_line(record: dict, ended: list[dict], total: int | None, workers: int) -> str:
    """Return the line for a point that has ended: its name, how it ended, failures, time left.

    Args:
        record: how the point ended (see :meth:`slim.sweeps.folder.SweepFolder.write_point`).
        ended: the records of all points that have ended.
        total: number of points, None if unknown.
        workers: how many run at the same time.
    """
    state = record["error"] or "failed"
    if record["status"] == "FINISHED":
        state = f"{record['seconds']:.1f} s"
    notes = []
    failed = 0
    for point in ended:
        if point["status"] != "FINISHED" and not point.get("skipped"):
            failed += 1
    if failed:
        notes.append(f"{failed} failed")
    left = time_left(ended, total, workers)
    if left:
        notes.append(f"{left} left")
    line = f"{record['name']}: {state}"
    if notes:
        line += f"  ({', '.join(notes)})"
    return line


def time_left(ended: list[dict], total: int | None, workers: int) -> str:
    """Return the time left in words, from the median of the points that ran; empty where there is
    no telling.

    Args:
        ended: the records of the points that have ended.
        total: number of points, None if unknown.
        workers: how many run at the same time.
    """
    times = []
    for record in ended:
        if record["status"] == "FINISHED" and not record.get("reused"):
            times.append(record["seconds"])
    if not total or not times or len(ended) >= total:
        return ""
    # the median: the first point also made what the others take from the store
    return duration(median(times) * (total - len(ended)) / workers)

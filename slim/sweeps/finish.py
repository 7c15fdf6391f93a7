"""The end of a sweep: the table over its points, ``sweep.json``, the report, and the exit code."""

from __future__ import annotations

import json
from dataclasses import dataclass

from slim.core.console import warn
from slim.core.tables import Table, print_table
from slim.report.table import BEST, WORST, cell, headline_columns, mark
from slim.sweeps.protocols import OpenSweep
from slim.tracking.tracker import ending

SHOWN = ("number", "overrides", "run_id", "status", "error", "seconds")


@dataclass
class Figures:
    """The figures of a point's last checkpoint, as the tables of :mod:`slim.report.table` read
    them."""

    label: str
    metrics: dict
    quality: dict
    speed: dict


def finish(sweep: OpenSweep, error: BaseException | None) -> int:
    """Say and record how the sweep ended.

    Args:
        sweep: whose points have ended.
        error: what ended it early, None if nothing did.

    Returns:
        The exit code: 0, 1 (an error of slim's own), 2 (a point failed), 130.
    """
    points = sweep.folder.points()
    failed = [point for point in points if has_failed(point)]
    summary = sweep.header()
    summary["swept"] = sweep.swept or varied(points)
    summary["points"] = [short_record(point) for point in points]
    sweep.folder.write_header(summary)
    tracker = sweep.tracker
    tracker.log_text(json.dumps(summary, indent=1) + "\n", "sweep.json")
    if points:
        print_points(sweep, points)
    if error is None:
        attach_report(tracker)
        attach_search(sweep)
    counts = {
        "points": len(points),
        "points_failed": len(failed),
        "points_skipped": sum(bool(point.get("skipped")) for point in points),
    }
    kept = None
    if error is None and not sweep.lost:  # else points may be under way elsewhere, or missing
        kept = {point["run_id"] for point in points}
    status_of_all = "FINISHED" if error is None else ending(error)
    tracker.close(status_of_all, counts, kept)
    for line in tracker.browse_lines():
        print(line)
    return exit_code(error, failed)


def has_failed(point: dict) -> bool:
    """Whether a point was tried and did not finish."""
    return point["status"] != "FINISHED" and not point.get("skipped")


def short_record(point: dict) -> dict:
    """Return what ``sweep.json`` says of a point."""
    return {name: point[name] for name in SHOWN}


def exit_code(error: BaseException | None, failed: list[dict]) -> int:
    """Return the exit code of a sweep.

    Args:
        error: what ended it early, None if nothing did.
        failed: the records of the points that failed.
    """
    if isinstance(error, KeyboardInterrupt):
        return 130
    if any(point.get("own") for point in failed):  # an error of slim's own
        return 1
    return 2 if failed else 0


def varied(points: list[dict]) -> dict[str, list[str]]:
    """Return key -> values of the settings in which the points differ, in order of appearance."""
    values: dict[str, list[str]] = {}
    for point in points:
        for key, value in point["overrides"].items():
            seen = values.setdefault(key, [])
            if value not in seen:
                seen.append(value)
    if len(points) == 1:
        return values
    return {key: seen for key, seen in values.items() if len(seen) > 1}


def print_points(sweep: OpenSweep, points: list[dict]) -> None:
    """Print the table over the points, and below it why some of them failed."""
    print_table(points_table(list(sweep.swept or varied(points)), points))
    for point in points:
        if point["error"]:
            print(f"{point['name']}: {point['error']}")


def points_table(keys: list[str], points: list[dict]) -> Table:
    """Return a row per point: its settings, metrics of its last checkpoint, how it ended, seconds.

    Args:
        keys: the settings in which the points differ.
        points: as the sweep's folder records them.
    """
    keys = keys or ["point"]
    figures = {point["number"]: figures_of(point) for point in points if point["final"]}
    measured = list(figures.values())
    shown = headline_columns(measured)
    rows = []
    for point in points:
        row = [str(point["overrides"].get(key, "-")) for key in keys]
        if keys == ["point"]:
            row = [point["name"]]
        last = figures.get(point["number"])
        for column in shown:
            row.append(cell(last, column) + mark(measured, last, column) if last else "- ")
        seconds = "-" if point.get("reused") else f"{point['seconds']:.1f}"
        rows.append([*row, seconds, status(point)])
    count = "1 point" if len(points) == 1 else f"{len(points)} points"
    headings = [*short_names(keys), *(column.label for column in shown), "seconds", "status"]
    notes = [f"{BEST} best and {WORST} worst of a column"] if len(measured) > 1 else []
    title = f"Sweep of {count}: the last checkpoint of each"
    return Table(headings, rows, keys=len(keys), title=title, notes=notes)


def short_names(keys: list[str]) -> list[str]:
    """Return the last parts of settings' names, ``bits`` for ``quantizer.bits``, unless two have
    the same."""
    last = [key.rpartition(".")[2] for key in keys]
    return last if len(set(last)) == len(last) else keys


def figures_of(point: dict) -> Figures:
    """Return the figures of a point's last checkpoint with their protocols."""
    final = point["final"]
    return Figures(point["name"], final["metrics"], final["quality"], final["speed"])


def status(point: dict) -> str:
    """Say how a point ended in a word or two."""
    if point.get("reused"):
        return "done before"
    if point["status"] == "FINISHED":
        return "done"
    return "skipped" if point.get("skipped") else "failed"


def attach_report(tracker) -> None:
    """Put the report over the points beside the sweep's run. A report that cannot be made is said,
    and ends nothing."""
    try:
        from slim.report.build import build_report

        report = build_report(tracker.client, [tracker.run_id])
    except Exception as error:
        warn(f"{type(error).__name__}: {error}", head="The report could not be made:")
        return
    tracker.log_text(report.html, "report.html")
    tracker.log_text(report.markdown, "report.md")


def attach_search(sweep: OpenSweep) -> None:
    """Put what a search found beside the sweep's run."""
    for name in ("search.json", "search.md"):
        path = sweep.folder.path / name
        if path.is_file():
            sweep.tracker.log_text(path.read_text(encoding="utf-8"), name)

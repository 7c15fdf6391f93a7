"""The end of a sweep: the table over its points, ``sweep.json``, the report, and the exit code."""

from __future__ import annotations

import json
from dataclasses import dataclass

from slim.core.console import results_console, warn
from slim.sweeps.protocols import OpenSweep

SHOWN = ("number", "overrides", "run_id", "status", "error", "seconds")
# For the report: a table in a terminal has only so much room.
DETAILS = ("prefill_tokens_per_second", "weights_bytes", "resident_bytes", "peak_bytes")


@dataclass
class Figures:
    """The figures of a point's last checkpoint, as the tables of :mod:`slim.report.table` read
    them."""

    label: str
    metrics: dict
    quality: dict
    speed: dict


def finish(sweep: OpenSweep, error: BaseException | None) -> int:
    """Say and record how the sweep ended, and return the exit code: 0, 1 (an error of slim's own),
    2 (a point failed), 130."""
    points = sweep.folder.points()
    kind = (
        "KILLED"
        if isinstance(error, KeyboardInterrupt)
        else "FAILED"
        if error is not None
        else "FINISHED"
    )
    whole = error is None and not sweep.lost  # else points may be under way elsewhere, or missing
    failed = [
        point for point in points if point["status"] != "FINISHED" and not point.get("skipped")
    ]
    summary = {
        **sweep.header(),
        "swept": sweep.swept or varied(points),
        "points": [{name: point[name] for name in SHOWN} for point in points],
    }
    sweep.folder.write_header(summary)
    tracker = sweep.tracker
    tracker.log_text(json.dumps(summary, indent=1) + "\n", "sweep.json")
    if points:
        print_table(sweep, points)
    if error is None:
        attach_report(tracker)
        attach_search(sweep)
    counts = {
        "points": len(points),
        "points_failed": len(failed),
        "points_skipped": sum(bool(p.get("skipped")) for p in points),
    }
    tracker.close(kind, counts, {point["run_id"] for point in points} if whole else None)
    for line in tracker.browse_lines():
        print(line)
    return (
        130
        if kind == "KILLED"
        else 1
        if any(point.get("own") for point in failed)
        else 2
        if failed
        else 0
    )


def varied(points: list[dict]) -> dict[str, list[str]]:
    """Return key -> values of the settings in which the points differ, in order of appearance."""
    values: dict[str, dict] = {}
    for point in points:
        for key, value in point["overrides"].items():
            values.setdefault(key, {})[value] = None
    return {key: list(found) for key, found in values.items() if len(found) > 1 or len(points) == 1}


def print_table(sweep: OpenSweep, points: list[dict]) -> None:
    """Print one table: a row per point with its settings, figures of its last checkpoint, how it
    ended, and seconds."""
    from rich.markup import escape
    from rich.table import Table

    from slim.report.table import cell, columns

    keys = list(sweep.swept or varied(points)) or ["point"]
    figures = {point["number"]: figures_of(point) for point in points if point["final"]}
    shown = [column for column in columns(list(figures.values())) if column.metric not in DETAILS]
    table = Table()
    for heading in short_names(keys):
        table.add_column(heading, overflow="fold")
    for heading in (*(column.heading for column in shown), "seconds"):
        table.add_column(heading, justify="right", overflow="fold")
    table.add_column("status")
    for point in points:
        own = figures.get(point["number"])
        cells = [cell(own, column) if own else "-" for column in shown]
        settings = [
            escape(str(point["overrides"].get(key, point["name"] if key == "point" else "-")))
            for key in keys
        ]
        table.add_row(
            *settings,
            *cells,
            "-" if point.get("reused") else f"{point['seconds']:.1f}",
            status(point),
        )
    out = results_console(220)
    out.print(
        f"Sweep of {len(points)} point{'s' * (len(points) != 1)}: the last checkpoint of each",
        highlight=False,
    )
    out.print(table)
    for point in points:
        if point["error"]:
            print(f"{point['name']}: {point['error']}")


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
    return (
        "done"
        if point["status"] == "FINISHED"
        else "skipped"
        if point.get("skipped")
        else "[red]failed[/]"
    )


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

"""The end of a sweep: the table over its points, ``sweep.json``, the report, and the exit code."""

from __future__ import annotations

import json
from dataclasses import dataclass

from slim.core.console import show_labelled, warn
from slim.core.tables import Table, print_table
from slim.core.text import counted
from slim.report.table import BEST, WORST, cell, headline_columns, mark
from slim.sweeps.protocols import OpenSweep
from slim.tracking.tracker import ending

SHOWN = ("number", "overrides", "run_id", "status", "error", "seconds")


@dataclass
class FinalRow:
    """The metrics of a point's last checkpoint, as the tables of :mod:`slim.report.table` read
    them.

    Attributes:
        label: the point's name.
        metrics: name -> value, of all parts of the evaluation.
        quality: ``metrics`` of the model's quality, and the ``protocol`` they were measured by.
        speed: the same of its speed.
    """

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
    failed = list(filter(has_failed, points))
    skipped = [point for point in points if point.get("skipped")]
    summary = sweep.header()
    # a sweeper that is not slim's does not say what varies: the points themselves do
    summary["swept"] = sweep.swept or varied(points)
    summary["points"] = list(map(short_record, points))
    sweep.folder.write_header(summary)
    tracker = sweep.tracker
    tracker.log_text(json.dumps(summary, indent=1) + "\n", "sweep.json")
    if points:
        print_points(sweep, points)
    # an interrupted sweep ends at once; the next start makes both
    if error is None:
        attach_report(tracker)
        attach_search(sweep)
    counts = {
        "points": len(points),
        "points_failed": len(failed),
        "points_skipped": len(skipped),
    }
    kept = None
    if error is None and not sweep.lost:  # else points may be under way elsewhere, or missing
        kept = {point["run_id"] for point in points}
    tracker.close("FINISHED" if error is None else ending(error), counts, kept)
    for label, text in tracker.browse_lines().items():
        show_labelled(label, text)
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
    for point in failed:
        if point.get("own"):  # an error of slim's own
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
    if len(points) == 1:  # nothing to compare with: all its settings tell what it is
        return values
    return {key: seen for key, seen in values.items() if len(seen) > 1}


def print_points(sweep: OpenSweep, points: list[dict]) -> None:
    """Print the table over the points, and below it why some of them failed.

    Args:
        sweep: says what varies, where it knows.
        points: as the sweep's folder records them.
    """
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
    final = {}  # number of the point -> its last checkpoint
    for point in points:
        if point["final"]:
            final[point["number"]] = final_row(point)
    measured = list(final.values())
    columns = headline_columns(measured)
    rows = []
    for point in points:
        row = setting_cells(point, keys)
        row += metric_cells(final.get(point["number"]), columns, measured)
        rows.append([*row, seconds(point), status(point)])
    headings = short_names(keys)
    for column in columns:
        headings.append(column.label)
    notes = []
    if len(measured) > 1:  # a single one is neither best nor worst
        notes.append(f"{BEST} best and {WORST} worst of a column")
    title = f"Sweep of {counted(len(points), 'point')}: the last checkpoint of each"
    return Table([*headings, "seconds", "status"], rows, keys=len(keys), title=title, notes=notes)


def setting_cells(point: dict, keys: list[str]) -> list[str]:
    """Return the cells that say which point a row is of.

    Args:
        point: as the sweep's folder records it.
        keys: the settings in which the points differ; ``["point"]`` for its name.
    """
    if keys == ["point"]:
        return [point["name"]]
    cells = []
    for key in keys:
        # a setting that is swept in some points only has no value in the others
        cells.append(str(point["overrides"].get(key, "-")))
    return cells


def metric_cells(row: FinalRow | None, columns: list, measured: list[FinalRow]) -> list[str]:
    """Return the cells of a point's metrics, with the marks of the best and the worst.

    Args:
        row: the point's last checkpoint; None where it has none.
        columns: of :func:`slim.report.table.headline_columns`.
        measured: the last checkpoints of all points, which the marks compare.
    """
    if row is None:
        return ["- "] * len(columns)  # the blank stands where others have their mark
    cells = []
    for column in columns:
        cells.append(cell(row, column) + mark(measured, row, column))
    return cells


def seconds(point: dict) -> str:
    """Return how long a point took; nothing for one that was finished before."""
    if point.get("reused"):
        return "-"
    return f"{point['seconds']:.1f}"


def short_names(keys: list[str]) -> list[str]:
    """Return the last parts of settings' names, ``bits`` for ``quantizer.bits``, unless two have
    the same."""
    last_parts = [key.rpartition(".")[2] for key in keys]
    if len(set(last_parts)) < len(last_parts):
        return list(keys)
    return last_parts


def final_row(point: dict) -> FinalRow:
    """Return the metrics of a point's last checkpoint with their protocols."""
    final = point["final"]
    return FinalRow(point["name"], final["metrics"], final["quality"], final["speed"])


def status(point: dict) -> str:
    """Say how a point ended in a word or two."""
    if point.get("reused"):
        return "done before"
    if point["status"] == "FINISHED":
        return "done"
    if point.get("skipped"):
        return "skipped"
    return "failed"


def attach_report(tracker) -> None:
    """Put the report over the points next to the sweep's run. A report that cannot be made is said,
    and ends nothing."""
    try:
        from slim.report.build import build_report

        report = build_report(tracker.client, [tracker.run_id])
    except Exception as error:  # hours of results must not end in a failed picture
        warn(f"{type(error).__name__}: {error}", head="The report could not be made:")
        return
    tracker.log_text(report.html, "report.html")
    tracker.log_text(report.markdown, "report.md")


def attach_search(sweep: OpenSweep) -> None:
    """Put what a search found next to the sweep's run."""
    for name in ("search.json", "search.md"):
        path = sweep.folder.path / name
        if path.is_file():
            sweep.tracker.log_text(path.read_text(encoding="utf-8"), name)

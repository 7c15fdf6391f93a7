"""Which figures a report compares, in which direction they are better, and which models no other
beats in both of two."""

from __future__ import annotations

import math
from collections.abc import Sequence

from slim.report.points import Point
from slim.report.table import (
    PERPLEXITIES,
    SIMILARITY,
    Column,
    by_protocol,
    figure,
    format_figure,
    standard_error,
)

BYTES = Column("size on disk (MB)", "bytes_on_disk", 1e-6, 2, "low")
MEAN = Column("mean accuracy", "tasks/acc", 100, 1, "high")


def quality_columns(points: list[Point]) -> list[Column]:
    """Return every measure of quality there is a figure of, once per protocol: perplexities, mean
    accuracy, tasks."""
    names = dict.fromkeys(name for point in points for name in point.row.metrics)
    of_tasks = [
        Column(f"{name.rpartition('/')[0]} word perplexity", name, 1, 3, "low")
        for name in names
        if _is_word(name)
    ]
    wanted = [
        *PERPLEXITIES,
        *of_tasks,
        MEAN,
        *task_columns(points, "acc"),
        *task_columns(points, "acc_norm"),
        SIMILARITY,
    ]
    return by_protocol(wanted, [point.row for point in points])


def _is_word(name: str) -> bool:
    return name.endswith("/word_perplexity")


def task_columns(points: list[Point], metric: str) -> list[Column]:
    """Return a column per task that has ``metric`` (``acc`` or ``acc_norm``); the mean over tasks
    is none."""
    names = dict.fromkeys(name for point in points for name in point.row.metrics)
    tasks = [name.rpartition("/")[0] for name in names if name.rpartition("/")[2] == metric]
    suffix = "" if metric == "acc" else f" {metric}"
    return [
        Column(f"{task}{suffix}", f"{task}/{metric}", 100, 1, "high")
        for task in tasks
        if task not in ("", "tasks")
    ]


def is_perplexity(column: Column) -> bool:
    """Whether figures of the column are perplexities, which differ by factors."""
    return column.metric.endswith("perplexity")


def axis_title(column: Column) -> str:
    """Return the heading with its unit and direction."""
    unit = " (%)" if column.scale == 100 else ""
    return f"{column.heading}{unit}, {'lower' if column.best == 'low' else 'higher'} is better"


def value(point: Point, column: Column) -> float | None:
    """Return the figure in the column's unit, None if it is missing, NaN or infinite: what a
    picture can show."""
    found = figure(point.row, column)
    return found * column.scale if found is not None and math.isfinite(found) else None


def error(point: Point, column: Column) -> float | None:
    """Return the standard error in the column's unit, None if it is not known."""
    found = standard_error(point.row, column)
    return found * column.scale if found is not None and math.isfinite(found) else None


def with_error(point: Point, column: Column) -> str:
    """Return the cell of a table: the figure as every table shows it, ± its standard error where
    that is known."""
    text, spread = format_figure(figure(point.row, column), column), error(point, column)
    return text if spread is None else f"{text} ± {spread:,.{column.digits}f}"


def against_source(point: Point, column: Column) -> str:
    """Return how a figure differs from that of the chain's source: per cent for a perplexity,
    points for an accuracy."""
    own, first = figure(point.row, column), figure(point.source, column)
    if own is None or first is None or point.row is point.source:
        return "-"
    if is_perplexity(column):
        return f"{100 * (own / first - 1):+.1f} %" if math.isfinite(own / first) else "NaN"
    change = column.scale * (own - first)
    digits, unit = (1, " points") if column.scale == 100 else (column.digits, "")
    return f"{change:+.{digits}f}{unit}" if math.isfinite(change) else "NaN"


def front(costs: Sequence[Sequence[float]]) -> list[int]:
    """Return the indices of the points that no other dominates, by the first coordinate; lower is
    better in all.

    A point is dominated if another is as good in every coordinate and better in one; equal points
    all stay."""
    found: list[int] = []
    # what dominates a point stands before it
    for index in sorted(range(len(costs)), key=lambda i: costs[i]):
        own = costs[index]
        if not any(
            costs[other] != own and all(a <= b for a, b in zip(costs[other], own, strict=True))
            for other in found
        ):
            found.append(index)
    return found


def pareto(points: list[Point], x: Column, y: Column) -> tuple[list[Point], list[Point]]:
    """Return the points on the front of two columns, by x, and the others; those without both
    figures are in neither."""
    known = [p for p in points if value(p, x) is not None and value(p, y) is not None]
    signs = [1 if column.best == "low" else -1 for column in (x, y)]
    best = front([(signs[0] * value(p, x), signs[1] * value(p, y)) for p in known])
    chosen = set(best)
    return sorted((known[i] for i in best), key=lambda p: value(p, x)), [
        p for i, p in enumerate(known) if i not in chosen
    ]


def shortlist(points: list[Point], most: int) -> list[Point]:
    """Return at most so many points, in their order: sources before those on the front of quality
    and bytes before others."""
    quality = primary(points, quality_columns(points))
    best = pareto(points, BYTES, quality)[0] if quality else []
    ranked = sorted(
        range(len(points)), key=lambda i: (points[i].role != "source", points[i] not in best)
    )
    return [points[i] for i in sorted(ranked[:most])]


def primary(points: list[Point], columns: list[Column]) -> Column | None:
    """Return the column that most checkpoints have a figure in, the first of several; None without
    any."""
    return max(
        columns, key=lambda column: sum(value(p, column) is not None for p in points), default=None
    )

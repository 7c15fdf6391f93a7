"""Which figures a report compares, in which direction they are better, and which models no other
beats in both of two."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from slim.evaluation.metrics import BY_NAME, MEAN_ACCURACY, METRICS, Metric, metric_of
from slim.report.points import Point
from slim.report.table import Column, by_protocol, figure, standard_error

SIZE = Column(replace(BY_NAME["bytes_on_disk"], title="size on disk"))


def quality_columns(points: list[Point]) -> list[Column]:
    """Return every measure of quality there is a value of, once per protocol: perplexities, mean
    accuracy, tasks, similarity."""
    perplexities = [metric for metric in METRICS if metric.is_perplexity]
    metrics = [
        *perplexities,
        *task_metrics(points, "word_perplexity"),
        MEAN_ACCURACY,
        *task_metrics(points, "acc"),
        *task_metrics(points, "acc_norm"),
        BY_NAME["similarity/mean"],
    ]
    return by_protocol(metrics, [point.row for point in points])


def task_metrics(points: list[Point], kind: str) -> list[Metric]:
    """Return one metric per task that gives ``kind`` (``"acc"``, ``"acc_norm"``...); the mean over
    tasks is none of them."""
    names: dict[str, None] = {}
    for point in points:
        names.update(dict.fromkeys(point.row.metrics))
    metrics = []
    for name in names:
        task, _, measured = name.rpartition("/")
        if measured == kind and task not in ("", "tasks"):
            metrics.append(metric_of(name))
    return metrics


def axis_title(column: Column) -> str:
    """Return the heading with its unit and direction."""
    unit = " (%)" if column.metric.unit == "%" else ""
    direction = "lower" if column.metric.better == "low" else "higher"
    return f"{column.heading}{unit}, {direction} is better"


def value(point: Point, column: Column) -> float | None:
    """Return what a picture can show: the value in its unit, None if it is missing, NaN or
    infinite."""
    return _shown(figure(point.row, column), column)


def error(point: Point, column: Column) -> float | None:
    """Return the standard error in the metric's unit, None if it is not known."""
    return _shown(standard_error(point.row, column), column)


def _shown(number: float | None, column: Column) -> float | None:
    if number is None or not math.isfinite(number):
        return None
    return number * column.metric.scale


def with_error(point: Point, column: Column) -> str:
    """Return the cell of a table: the value as every table shows it, ± its standard error where
    that is known."""
    text, spread = column.metric.format(figure(point.row, column)), error(point, column)
    return text if spread is None else f"{text} ± {spread:,.{column.metric.digits}f}"


def against_source(point: Point, column: Column) -> str:
    """Return how a value differs from that of the chain's source: per cent for a perplexity,
    points for an accuracy."""
    last, first = figure(point.row, column), figure(point.source, column)
    if last is None or first is None or point.row is point.source:
        return "-"
    if column.metric.is_perplexity:
        return f"{100 * (last / first - 1):+.1f} %" if math.isfinite(last / first) else "NaN"
    change = column.metric.scale * (last - first)
    if not math.isfinite(change):
        return "NaN"
    if column.metric.unit == "%":
        return f"{change:+.1f} points"
    return f"{change:+.{column.metric.digits}f}"


def front(costs: Sequence[Sequence[float]]) -> list[int]:
    """Return the indices of the points that no other dominates, by the first coordinate; lower is
    better in all.

    A point is dominated if another is as good in every coordinate and better in one; equal points
    all stay."""
    best: list[int] = []
    # whatever dominates a point comes before it in this order
    for index in sorted(range(len(costs)), key=lambda i: costs[i]):
        if not any(_dominates(costs[earlier], costs[index]) for earlier in best):
            best.append(index)
    return best


def _dominates(first: Sequence[float], second: Sequence[float]) -> bool:
    return first != second and all(a <= b for a, b in zip(first, second, strict=True))


def pareto(points: list[Point], x: Column, y: Column) -> tuple[list[Point], list[Point]]:
    """Return the points on the front of two columns, by x, and the others; those without both
    figures are in neither."""
    known = [p for p in points if value(p, x) is not None and value(p, y) is not None]
    costs = [(_cost(p, x), _cost(p, y)) for p in known]
    chosen = set(front(costs))
    best = [point for index, point in enumerate(known) if index in chosen]
    others = [point for index, point in enumerate(known) if index not in chosen]
    return sorted(best, key=lambda point: value(point, x)), others


def _cost(point: Point, column: Column) -> float:
    number = value(point, column)
    return number if column.metric.better == "low" else -number


def shortlist(points: list[Point], most: int) -> list[Point]:
    """Return at most so many points, in their order: sources before those on the front of quality
    and bytes before others."""
    quality = primary(points, quality_columns(points))
    best = pareto(points, SIZE, quality)[0] if quality else []
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

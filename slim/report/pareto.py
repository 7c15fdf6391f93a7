"""Which figures a report compares, in which direction they are better, and which models no other
beats in both of two."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from slim.evaluation.metrics import BY_NAME, MEAN_ACCURACY, METRICS, Metric, metric_of
from slim.report.points import Point, rows_of
from slim.report.table import Column, by_protocol, figure, standard_error

SIZE = Column(replace(BY_NAME["bytes_on_disk"], title="size on disk"))


def quality_columns(points: list[Point]) -> list[Column]:
    """Return every measure of quality there is a value of, once per protocol: perplexities, mean
    accuracy, tasks, similarity."""
    metrics = [metric for metric in METRICS if metric.is_perplexity]
    metrics += task_metrics(points, "word_perplexity")
    metrics.append(MEAN_ACCURACY)
    metrics += task_metrics(points, "acc")
    metrics += task_metrics(points, "acc_norm")
    metrics.append(BY_NAME["similarity/mean"])
    return by_protocol(metrics, rows_of(points))


def main_perplexity(points: list[Point]) -> Column | None:
    """Return the perplexity that most of the points have a figure of; None without any."""
    perplexities = []
    for column in quality_columns(points):
        if column.metric.is_perplexity:
            perplexities.append(column)
    return primary(points, perplexities)


def task_metrics(points: list[Point], kind: str) -> list[Metric]:
    """Return one metric per task that was measured in a way.

    Args:
        points: the checkpoints.
        kind: ``"acc"``, ``"acc_norm"``, ``"word_perplexity"``.

    Returns:
        In the order in which the checkpoints name them; the mean over tasks is none of them.
    """
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
    """Return what a picture can show.

    Args:
        point: the checkpoint.
        column: metric and protocol.

    Returns:
        The value in the metric's unit, None if it is missing, NaN or infinite.
    """
    return _shown(figure(point.row, column), column)


def error(point: Point, column: Column) -> float | None:
    """Return the standard error in the metric's unit, None if it is not known.

    Args:
        point: the checkpoint.
        column: metric and protocol.
    """
    return _shown(standard_error(point.row, column), column)


def _shown(number: float | None, column: Column) -> float | None:
    if number is None or not math.isfinite(number):
        return None
    return number * column.metric.scale


def with_error(point: Point, column: Column) -> str:
    """Return the cell of a table: the value as every table shows it, ± its standard error where
    that is known.

    Args:
        point: the checkpoint.
        column: metric and protocol.
    """
    text = column.metric.format(figure(point.row, column))
    spread = error(point, column)
    if spread is None:
        return text
    return f"{text} ± {spread:,.{column.metric.digits}f}"


def against_source(point: Point, column: Column) -> str:
    """Return how a value differs from that of the chain's source.

    Args:
        point: the checkpoint.
        column: metric and protocol.

    Returns:
        Per cent for a perplexity, points for an accuracy; a dash where there is nothing to compare.
    """
    last = figure(point.row, column)
    first = figure(point.source, column)
    if last is None or first is None or point.row is point.source:
        return "-"
    if column.metric.is_perplexity:
        # a perplexity is a ratio already: its size depends on the tokenizer and the text
        change, text = last / first, f"{100 * (last / first - 1):+.1f} %"
    else:
        change = column.metric.scale * (last - first)
        text = f"{change:+.{column.metric.digits}f}"
        if column.metric.unit == "%":
            text = f"{change:+.1f} points"
    if not math.isfinite(change):
        return "NaN"
    return text


def front(costs: Sequence[Sequence[float]]) -> list[int]:
    """Return the points that no other dominates.

    A point is dominated if another is as good in every coordinate and better in one; equal points
    all stay.

    Args:
        costs: [points, coordinates]; lower is better in all.

    Returns:
        Indices of ``costs``, by the first coordinate.
    """
    best: list[int] = []
    # whatever dominates a point comes before it in this order
    for index in sorted(range(len(costs)), key=lambda i: costs[i]):
        # domination is transitive: to compare with those that stayed is enough
        if not any(_dominates(costs[earlier], costs[index]) for earlier in best):
            best.append(index)
    return best


def _dominates(first: Sequence[float], second: Sequence[float]) -> bool:
    return first != second and all(a <= b for a, b in zip(first, second, strict=True))


def pareto(points: list[Point], x: Column, y: Column) -> tuple[list[Point], list[Point]]:
    """Divide points by whether another beats them in two columns.

    Args:
        points: the checkpoints.
        x: first column; the front is sorted by it.
        y: second column.

    Returns:
        The points on the front, and the others; those without both figures are in neither.
    """
    # what cannot be compared is dominated by nothing, and is not on the front either
    known, costs = [], []
    for point in points:
        if value(point, x) is not None and value(point, y) is not None:
            known.append(point)
            costs.append((_cost(point, x), _cost(point, y)))
    on_front = set(front(costs))
    best, others = [], []
    for index, point in enumerate(known):
        if index in on_front:
            best.append(point)
        else:
            others.append(point)
    return sorted(best, key=lambda point: value(point, x)), others


def _cost(point: Point, column: Column) -> float:
    """Return a value, turned so that lower is better."""
    number = value(point, column)
    if column.metric.better == "low":
        return number
    return -number


def shortlist(points: list[Point], most: int) -> list[Point]:
    """Return the points that matter most, in their order.

    Args:
        points: the checkpoints.
        most: how many at most; sources come before those on the front of quality and bytes, and
            these before others.
    """
    quality = primary(points, quality_columns(points))
    best = []
    if quality is not None:
        best, _ = pareto(points, SIZE, quality)
    # sorting is stable: among equals the earlier comes first
    ranked = sorted(
        range(len(points)), key=lambda i: (points[i].role != "source", points[i] not in best)
    )
    return [points[i] for i in sorted(ranked[:most])]


def primary(points: list[Point], columns: list[Column]) -> Column | None:
    """Return the column that most checkpoints have a figure in.

    Args:
        points: the checkpoints.
        columns: to choose from.

    Returns:
        The first of several; None without any.
    """
    best = None
    most = -1
    for column in columns:
        known = sum(value(point, column) is not None for point in points)
        if known > most:
            most, best = known, column
    return best

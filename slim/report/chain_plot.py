"""The picture of one chain as PNG: perplexity and accuracy before and after every step."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

from slim.core.figures import KEPT, new_figure, save_figure
from slim.evaluation.metrics import MEAN_ACCURACY
from slim.report.charts import COLORS
from slim.report.pareto import (
    axis_title,
    error,
    main_perplexity,
    task_metrics,
    value,
)
from slim.report.points import Point, rows_of, step_name
from slim.report.runs import Row
from slim.report.table import Column, by_protocol, record

if TYPE_CHECKING:
    from slim.checkpoints.result import Result

FLAT_TO = 4  # ratio of largest to smallest perplexity from which the axis is logarithmic


def plot_chain(path: Path, results: list[Result]) -> bool:
    """Draw the perplexity and the accuracies of a chain's checkpoints.

    Bars of error are one standard error, where known. Figures of different protocols are lines of
    their own.

    Args:
        path: the PNG to write.
        results: the checkpoints, source first.

    Returns:
        Whether there was anything to draw: a chain of two checkpoints at least, with a figure of
        quality.
    """
    points = chain_points(results)
    sides = _sides(points)
    # a source alone has no step to draw
    if len(points) < 2 or not sides:
        return False
    figure = new_figure(max(4.8, 1.6 + 1.1 * len(points)) * len(sides), 4.2)
    panels = figure.subplots(1, len(sides), squeeze=False)[0]
    for axes, columns in zip(panels, sides, strict=True):
        _draw(axes, points, columns)
    save_figure(figure, path)
    return True


def chain_points(results: list[Result]) -> list[Point]:
    """Return the results of one chain as the report's points."""
    rows = [Row.from_record(record(result)) for result in results]
    points = []
    for length, row in enumerate(rows, 1):
        points.append(Point(row, tuple(rows[:length]), step_name(row), "step", ""))
    return points


def _sides(points: list[Point]) -> list[list[Column]]:
    """Return the columns of every panel: one perplexity, then the accuracies; none that is
    empty."""
    sides = []
    perplexity = main_perplexity(points)
    if perplexity is not None:
        sides.append([perplexity])
    # the mean comes last, so that it is drawn over the tasks
    accuracies = [*task_metrics(points, "acc"), MEAN_ACCURACY]
    tasks = by_protocol(accuracies, rows_of(points))
    if tasks:
        sides.append(tasks)
    return sides


def _draw(axes, points: list[Point], columns: list[Column]) -> None:
    """Draw one line per column over the steps; a figure that is missing, NaN or infinite leaves a
    gap."""
    alone = len(columns) == 1
    for number, column in enumerate(columns):
        heights = [_height(point, column) for point in points]
        axes.errorbar(
            range(len(points)),
            heights,
            yerr=[error(point, column) or 0.0 for point in points],
            marker="o",
            capsize=2,
            label=column.heading,
            **_line_style(column, number, alone),
        )
        if alone:
            _write_figures(axes, heights, column)
    if columns[0].metric.is_perplexity and _is_wide(points, columns):
        axes.set_yscale("log")
    # one word or setting a line: the names of neighbors must not overlap
    labels = [point.name.replace(" ", "\n", 1).replace(", ", ",\n") for point in points]
    axes.set_xticks(range(len(points)), labels, fontsize="small")
    axes.margins(x=0.12, y=0.15)
    axes.set_ylabel(axis_title(columns[0]) if alone else "correct (%), higher is better")
    axes.grid(axis="y", alpha=0.3)
    if not alone:
        axes.legend(fontsize="small", frameon=False)


def _height(point: Point, column: Column) -> float:
    """Return a value in its unit; NaN, which matplotlib leaves out, where there is none."""
    height = value(point, column)
    if height is None:
        return math.nan
    return height


def _line_style(column: Column, number: int, alone: bool) -> dict:
    """Return color and dashes: a single line has the report's color, the mean over tasks is
    dashed."""
    mean = column.metric is MEAN_ACCURACY
    color = COLORS[number % len(COLORS)]
    if alone:
        color = KEPT
    elif mean:
        color = "black"
    return {"color": color, "linestyle": "--" if mean else "-", "linewidth": 1.4}


def _is_wide(points: list[Point], columns: list[Column]) -> bool:
    """Whether the largest value is so far from the smallest that a linear axis would hide one."""
    known = []
    for point in points:
        for column in columns:
            height = value(point, column)
            if height is not None:
                known.append(height)
    return bool(known) and max(known) > FLAT_TO * min(known)


def _write_figures(axes, heights: list[float], column: Column) -> None:
    """Write every value over its mark; NaN stands at the bottom, where there is no mark."""
    for place, height in enumerate(heights):
        text = f"{height:,.{column.metric.digits}f}"
        position = (place, height)
        if math.isnan(height):
            text = "NaN"
        if not math.isfinite(height):
            position = (place, axes.get_ylim()[0])
        axes.annotate(
            text,
            position,
            textcoords="offset points",
            xytext=(0, 7),
            ha="center",
            fontsize="small",
        )

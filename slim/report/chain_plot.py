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
    primary,
    quality_columns,
    task_metrics,
    value,
)
from slim.report.points import Point, step_name
from slim.report.runs import Row
from slim.report.table import Column, by_protocol, record

if TYPE_CHECKING:
    from slim.checkpoints.result import Result

FLAT_TO = 4  # ratio of largest to smallest perplexity from which the axis is logarithmic


def plot_chain(path: Path, results: list[Result]) -> bool:
    """Draw the perplexity and the accuracies of a chain's checkpoints, source first, into the PNG
    ``path``.

    Bars of error are one standard error, where known. Figures of different protocols are lines of
    their own. Returns whether there was anything to draw: a chain of two checkpoints at least, with
    a figure of quality."""
    points = chain_points(results)
    perplexity = primary(
        points, [column for column in quality_columns(points) if column.metric.is_perplexity]
    )
    tasks = by_protocol(
        [*task_metrics(points, "acc"), MEAN_ACCURACY], [point.row for point in points]
    )
    sides = [columns for columns in ([perplexity] if perplexity else [], tasks) if columns]
    if len(points) < 2 or not sides:
        return False
    figure = new_figure(max(4.8, 1.6 + 1.1 * len(points)) * len(sides), 4.2)
    for axes, columns in zip(figure.subplots(1, len(sides), squeeze=False)[0], sides, strict=True):
        _draw(axes, points, columns)
    save_figure(figure, path)
    return True


def chain_points(results: list[Result]) -> list[Point]:
    """Return the results of one chain as the report's points."""
    rows = [Row.from_record(record(result)) for result in results]
    return [
        Point(row, tuple(rows[: number + 1]), step_name(row), "step", "")
        for number, row in enumerate(rows)
    ]


def _draw(axes, points: list[Point], columns: list[Column]) -> None:
    """Draw one line per column over the steps; a figure that is missing, NaN or infinite leaves a
    gap."""
    for number, column in enumerate(columns):
        heights = [
            math.nan if (found := value(point, column)) is None else found for point in points
        ]
        spread = [error(point, column) or 0.0 for point in points]
        mean = column.metric is MEAN_ACCURACY
        colour = KEPT if len(columns) == 1 else "black" if mean else COLORS[number % len(COLORS)]
        style = {"color": colour, "linestyle": "--" if mean else "-", "linewidth": 1.4}
        axes.errorbar(
            range(len(points)),
            heights,
            yerr=spread,
            marker="o",
            capsize=2,
            label=column.heading,
            **style,
        )
        if len(columns) == 1:
            _write_figures(axes, heights, column)
    known = [
        found
        for point in points
        for column in columns
        if (found := value(point, column)) is not None
    ]
    if columns[0].metric.is_perplexity and known and max(known) > FLAT_TO * min(known):
        axes.set_yscale("log")
    labels = [point.name.replace(" ", "\n", 1).replace(", ", ",\n") for point in points]
    axes.set_xticks(range(len(points)), labels, fontsize="small")
    axes.margins(x=0.12, y=0.15)
    axes.set_ylabel(
        axis_title(columns[0]) if len(columns) == 1 else "correct (%), higher is better"
    )
    axes.grid(axis="y", alpha=0.3)
    if len(columns) > 1:
        axes.legend(fontsize="small", frameon=False)


def _write_figures(axes, heights: list[float], column: Column) -> None:
    for place, height in enumerate(heights):
        text = "NaN" if math.isnan(height) else f"{height:,.{column.metric.digits}f}"
        where = (place, height) if math.isfinite(height) else (place, axes.get_ylim()[0])
        axes.annotate(
            text, where, textcoords="offset points", xytext=(0, 7), ha="center", fontsize="small"
        )

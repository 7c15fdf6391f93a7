"""The pictures of the page that compare models, as plotly's JSON: Pareto fronts, a heat map of two
settings, bars per task.

Every picture is ``{"id", "title", "options": [{"label", "sentence", "data", "layout"}]}``; an
option is an entry of its drop-down, with a sentence on what to read in it. Figures of different
protocols are never in the same trace."""

from __future__ import annotations

import html
import textwrap

from slim.core.figures import KEPT, REMOVED
from slim.evaluation.metrics import BY_NAME, Metric
from slim.report.pareto import (
    SIZE,
    axis_title,
    error,
    pareto,
    primary,
    quality_columns,
    shortlist,
    task_metrics,
    value,
    with_error,
)
from slim.report.points import Point, rows_of, settings_lines
from slim.report.table import Column, by_protocol

COLORS = (
    KEPT,
    REMOVED,
    "#5a9e6f",
    "#a277b5",
    "#c49a2b",
    "#3fa7b5",
    "#b5566f",
    "#7f8c4a",
    "#8c6d52",
    "#6b7785",
)
SYMBOLS = {"source": "diamond", "step": "square", "final": "circle"}
HOVER_WIDTH = 90  # characters of a line in the text that shows over a point
LOG_FROM = 8  # ratio of largest to smallest figure from which an axis is logarithmic
# models in the legend of the bars, and of them those that are drawn before a click
BARS, BARS_SHOWN = 24, 8

ACCURACIES = (
    ("acc", "accuracy"),
    ("acc_norm", "accuracy, answers weighed by length (acc_norm)"),
)


def pareto_picture(points: list[Point], x: Metric, identity: str) -> dict | None:
    """Return the picture of quality over another metric.

    Args:
        points: of the report.
        x: what lies along the horizontal axis.
        identity: the picture's id on the page.

    Returns:
        One option per measure of quality and protocol; None without data.
    """
    places = by_protocol([x], rows_of(points))
    options = []
    for measure in primary_first(points, quality_columns(points)):
        for place in places:
            option = _pareto_option(points, place, measure, len(places) > 1)
            if option is not None:
                options.append(option)
    if not options:
        return None
    title = "Quality against speed"
    if x is SIZE.metric:
        title = "Quality against size"
    return {"id": identity, "title": title, "options": options}


def primary_first(points: list[Point], measures: list[Column]) -> list[Column]:
    """Return the columns with the one first that most checkpoints have a figure in.

    Args:
        points: the checkpoints.
        measures: the columns; apart from the first their order stays.
    """
    first = primary(points, measures)
    return sorted(measures, key=lambda column: column is not first)


def _pareto_option(points: list[Point], x: Column, y: Column, several: bool) -> dict | None:
    """Return the front of two columns; ``several``: x has columns of more than one protocol."""
    best, others = pareto(points, x, y)
    if not best:
        return None
    traces = []
    if others:
        traces.append(_scatter(others, x, y, "not on the front"))
    traces.append(_front_trace(best, x, y))
    drawn = best + others
    # accuracies lie within a narrow range, where a logarithm shows nothing
    yaxis = _axis(drawn, y, y.metric.is_perplexity)
    # better is always up
    if y.metric.better == "low":
        yaxis["autorange"] = "reversed"
    label = y.heading
    if several:
        label = f"{y.heading} against {x.heading}"
    return {
        "label": label,
        "sentence": _pareto_sentence(points, best, drawn, x, y),
        "data": traces,
        "layout": {"xaxis": _axis(drawn, x, True), "yaxis": yaxis, "hovermode": "closest"},
    }


def _pareto_sentence(
    points: list[Point], best: list[Point], drawn: list[Point], x: Column, y: Column
) -> str:
    better = "left" if x.metric.better == "low" else "right"
    sentence = (
        f"Up and to the {better} is better. {len(best)} of {len(drawn)} models are on the front: "
        "no other is at least as good in both and better in one. The dotted line is the best that "
        "each place allows."
    )
    left = len(points) - len(drawn)
    if left:
        verb = "is" if left == 1 else "are"
        sentence += f" {left} without both figures of this protocol (or NaN) {verb} not drawn."
    if any(error(point, y) is not None for point in drawn):
        sentence += " The thin lines are ± one standard error."
    return sentence


def _axis(points: list[Point], column: Column, may_be_log: bool) -> dict:
    """Return the axis of a column: logarithmic where it may be and figures differ by a factor."""
    values = [value(point, column) for point in points]
    title = {"text": axis_title(column)}
    if may_be_log and min(values) > 0 and max(values) > LOG_FROM * min(values):
        return {"title": title, "type": "log", "dtick": "D2"}
    return {"title": title, "type": "linear"}


def _scatter(points: list[Point], x: Column, y: Column, name: str) -> dict:
    """Return points as faint marks without a line."""
    symbols, across, up, spreads, hovers = [], [], [], [], []
    for point in points:
        symbols.append(SYMBOLS[point.role])
        across.append(value(point, x))
        up.append(value(point, y))
        spreads.append(error(point, y))
        hovers.append(hover(point, (y, x)))
    return {
        "type": "scatter",
        "mode": "markers",
        "name": name,
        "x": across,
        "y": up,
        "error_y": {"type": "data", "array": spreads, "thickness": 1, "width": 3},
        "marker": {"symbol": symbols, "size": 9, "color": "#8a8f98"},
        "opacity": 0.55,
        "hoverinfo": "text",
        "hovertext": hovers,
    }


def _front_trace(points: list[Point], x: Column, y: Column) -> dict:
    """Return the points of the front, numbered as in the table of the best models."""
    trace = _scatter(points, x, y, "on the front")
    trace["mode"] = "lines+markers+text"
    trace["marker"] |= {"size": 12, "color": KEPT}
    trace["opacity"] = 1.0
    trace["text"] = [str(number) for number in range(1, len(points) + 1)]
    trace["textposition"] = "top center"
    # between two points of the front the one that costs less is the best there is, so the steps
    # turn at its height
    shape = "hv" if x.metric.better == "low" else "vh"
    trace["line"] = {"width": 1.5, "dash": "dot", "color": KEPT, "shape": shape}
    return trace


def hover(point: Point, columns: tuple[Column, ...]) -> str:
    """Return what shows over a point, safe as plotly's HTML.

    Args:
        point: whose chain and settings it shows.
        columns: whose values it shows.
    """
    lines = [f"<b>{_wrap(point.name)}</b>"]
    for column in columns:
        lines.append(f"{html.escape(column.heading)}: {with_error(point, column)}")
    if "parameters" in point.row.metrics:
        lines.append(f"parameters: {point.row.metrics['parameters']:,}")
    for line in settings_lines(point.chain):
        lines.append(f"<i>{_wrap(line)}</i>")
    return "<br>".join(lines)


def _wrap(text: str) -> str:
    """Break a text into at most five lines, safe as plotly's HTML."""
    # escaped after it is broken: an entity such as &lt; must stay in one piece
    lines = textwrap.wrap(text, HOVER_WIDTH)[:5]
    return "<br>".join(map(html.escape, lines))


def task_bars(points: list[Point]) -> dict | None:
    """Return accuracy per task as bars with standard errors: sources and final checkpoints; None
    without tasks."""
    shown = [point for point in points if point.role != "step"]
    options = []
    # sources and results: every step on the way would double the bars
    for metric, label in ACCURACIES:
        columns = by_protocol(task_metrics(shown, metric), rows_of(shown))
        if columns:
            options.append(_bars(shown, columns, label))
    if not options:
        return None
    return {"id": "tasks", "title": "Tasks", "options": options}


def _bars(candidates: list[Point], columns: list[Column], label: str) -> dict:
    """Return the bars of at most ``BARS`` models, most of them hidden until their name is
    clicked."""
    # plotly draws hundreds of bars, and nobody can read them
    points = shortlist(candidates, BARS)
    at_first = {id(point) for point in shortlist(points, BARS_SHOWN)}
    data = []
    for number, point in enumerate(points):
        bars = _point_bars(point, columns)
        bars["marker"] = {"color": COLORS[number % len(COLORS)]}
        bars["visible"] = "legendonly"
        if id(point) in at_first:
            bars["visible"] = True
        data.append(bars)
    sentence = (
        "Bars of one group answered the same questions. The thin lines are ± one standard error: a "
        "difference below two of them may be chance."
    )
    if len(points) > BARS_SHOWN:
        sentence += (
            f" {BARS_SHOWN} of {len(candidates)} models are drawn, the front first; a click on a "
            "name below draws more."
        )
    layout = {
        "barmode": "group",
        "yaxis": {"title": {"text": "correct (%)"}, "rangemode": "tozero"},
        "legend": {"orientation": "h", "y": -0.15},
    }
    return {"label": label, "sentence": sentence, "data": data, "layout": layout}


def _point_bars(point: Point, columns: list[Column]) -> dict:
    """Return the bars of one model, without color."""
    headings, heights, errors, hovers = [], [], [], []
    for column in columns:
        headings.append(column.heading)
        heights.append(value(point, column))
        errors.append(error(point, column))
        shown = f"{html.escape(column.heading)}: {with_error(point, column)}"
        hovers.append(f"<b>{_wrap(point.name)}</b><br>{shown}")
    return {
        "type": "bar",
        "name": html.escape(point.name),
        "x": headings,
        "y": heights,
        "error_y": {"type": "data", "array": errors, "thickness": 1.2, "width": 3},
        "hoverinfo": "text",
        "hovertext": hovers,
    }


def speed_picture(points: list[Point]) -> dict | None:
    """Return the Pareto front of quality and decode speed."""
    return pareto_picture(points, BY_NAME["decode_tokens_per_second"], "pareto-speed")


def size_picture(points: list[Point]) -> dict | None:
    """Return the Pareto front of quality and bytes on disk."""
    return pareto_picture(points, SIZE.metric, "pareto-size")

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
from slim.report.points import Point, settings_lines
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


def pareto_picture(points: list[Point], x: Metric, identity: str) -> dict | None:
    """Return quality over the metric ``x``, one option per measure and protocol; None without
    data."""
    places, measures = by_protocol([x], [point.row for point in points]), quality_columns(points)
    first = primary(points, measures)
    ordered = sorted(measures, key=lambda column: column is not first)
    options = [
        _pareto_option(points, place, measure, len(places) > 1)
        for measure in ordered
        for place in places
    ]
    options = [option for option in options if option is not None]
    title = "Quality against size" if x is SIZE.metric else "Quality against speed"
    return {"id": identity, "title": title, "options": options} if options else None


def _pareto_option(points: list[Point], x: Column, y: Column, several: bool) -> dict | None:
    best, others = pareto(points, x, y)
    if not best:
        return None
    left = len(points) - len(best) - len(others)
    better = "left" if x.metric.better == "low" else "right"
    sentence = (
        f"Up and to the {better} is better. {len(best)} of {len(best) + len(others)} models are on the front: no other is "
        f"at least as good in both and better in one. The dotted line is the best to be had at each place."
        + (
            f" {left} without both figures of this protocol (or NaN) {'is' if left == 1 else 'are'} not drawn."
            if left
            else ""
        )
    )
    if any(error(p, y) is not None for p in (*best, *others)):
        sentence += " The thin lines are ± one standard error."
    traces = [
        _scatter(others, x, y, "not on the front", False),
        _scatter(best, x, y, "on the front", True),
    ]
    yaxis = {
        "title": {"text": axis_title(y)},
        **_scale([value(p, y) for p in (*best, *others)], y.metric.is_perplexity),
    }
    if y.metric.better == "low":
        yaxis["autorange"] = "reversed"
    xaxis = {
        "title": {"text": axis_title(x)},
        **_scale([value(p, x) for p in (*best, *others)], True),
    }
    label = f"{y.heading} against {x.heading}" if several else y.heading
    layout = {"xaxis": xaxis, "yaxis": yaxis, "hovermode": "closest"}
    return {
        "label": label,
        "sentence": sentence,
        "data": [trace for trace in traces if trace["x"]],
        "layout": layout,
    }


def _scale(values: list[float], allowed: bool) -> dict:
    """Return a logarithmic axis where it is ``allowed`` and figures differ by a factor, else a
    linear one."""
    wide = allowed and min(values) > 0 and max(values) > LOG_FROM * min(values)
    return {"type": "log", "dtick": "D2"} if wide else {"type": "linear"}


def _scatter(points: list[Point], x: Column, y: Column, name: str, on_front: bool) -> dict:
    marker = {"symbol": [SYMBOLS[p.role] for p in points], "size": 12, "color": KEPT}
    if not on_front:
        marker |= {"size": 9, "color": "#8a8f98"}
    trace = {
        "type": "scatter",
        "mode": "lines+markers+text" if on_front else "markers",
        "name": name,
        "x": [value(p, x) for p in points],
        "y": [value(p, y) for p in points],
        "error_y": {
            "type": "data",
            "array": [error(p, y) for p in points],
            "thickness": 1,
            "width": 3,
        },
        "marker": marker,
        "opacity": 1.0 if on_front else 0.55,
        "hoverinfo": "text",
        "hovertext": [hover(p, (y, x)) for p in points],
    }
    if on_front:
        trace |= {
            "text": [str(number) for number in range(1, len(points) + 1)],
            "textposition": "top center",
        }
        trace["line"] = {
            "width": 1.5,
            "dash": "dot",
            "color": KEPT,
            "shape": "hv" if x.metric.better == "low" else "vh",
        }
    return trace


def hover(point: Point, columns: tuple[Column, ...]) -> str:
    """Return what shows over a point: its chain, the figures in ``columns``, all settings; safe as
    plotly's HTML."""
    lines = [f"<b>{_wrap(point.name)}</b>"]
    lines += [f"{html.escape(column.heading)}: {with_error(point, column)}" for column in columns]
    lines += (
        [f"parameters: {point.row.metrics['parameters']:,}"]
        if "parameters" in point.row.metrics
        else []
    )
    return "<br>".join([*lines, *(f"<i>{_wrap(line)}</i>" for line in settings_lines(point.chain))])


def _wrap(text: str) -> str:
    return "<br>".join(html.escape(line) for line in textwrap.wrap(text, HOVER_WIDTH)[:5])


def task_bars(points: list[Point]) -> dict | None:
    """Return accuracy per task as bars with standard errors: sources and final checkpoints; None
    without tasks."""
    shown = [point for point in points if point.role != "step"]
    options = []
    for metric, label in (
        ("acc", "accuracy"),
        ("acc_norm", "accuracy, answers weighed by length (acc_norm)"),
    ):
        columns = by_protocol(task_metrics(shown, metric), [point.row for point in shown])
        if columns:
            options.append(_bars(shown, columns, label))
    return {"id": "tasks", "title": "Tasks", "options": options} if options else None


def _bars(candidates: list[Point], columns: list[Column], label: str) -> dict:
    points = shortlist(candidates, BARS)
    shown = {id(point) for point in shortlist(points, BARS_SHOWN)}
    data = [
        {
            "type": "bar",
            "name": html.escape(point.name),
            "x": [column.heading for column in columns],
            "y": [value(point, column) for column in columns],
            "error_y": {
                "type": "data",
                "array": [error(point, column) for column in columns],
                "thickness": 1.2,
                "width": 3,
            },
            "hoverinfo": "text",
            "hovertext": [
                f"<b>{_wrap(point.name)}</b><br>{html.escape(c.heading)}: {with_error(point, c)}"
                for c in columns
            ],
            "marker": {"color": COLORS[number % len(COLORS)]},
            "visible": True if id(point) in shown else "legendonly",
        }
        for number, point in enumerate(points)
    ]
    sentence = (
        "Bars of one group answered the same questions. The thin lines are ± one standard error: a difference below two of "
        "them may be chance."
    )
    if len(points) > BARS_SHOWN:
        sentence += f" {BARS_SHOWN} of {len(candidates)} models are drawn, the front first; a click on a name below draws more."
    layout = {
        "barmode": "group",
        "yaxis": {"title": {"text": "correct (%)"}, "rangemode": "tozero"},
        "legend": {"orientation": "h", "y": -0.15},
    }
    return {"label": label, "sentence": sentence, "data": data, "layout": layout}


def speed_picture(points: list[Point]) -> dict | None:
    """Return the Pareto front of quality and decode speed."""
    return pareto_picture(points, BY_NAME["decode_tokens_per_second"], "pareto-speed")


def size_picture(points: list[Point]) -> dict | None:
    """Return the Pareto front of quality and bytes on disk."""
    return pareto_picture(points, SIZE.metric, "pareto-size")

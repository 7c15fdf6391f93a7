"""Pictures along a chain: quality before and after every step, and the losses of what was
trained."""

from __future__ import annotations

import html

from slim.core.figures import KEPT, REMOVED
from slim.evaluation.metrics import MEAN_ACCURACY
from slim.report.charts import COLORS
from slim.report.pareto import (
    axis_title,
    error,
    main_perplexity,
    task_metrics,
    value,
    with_error,
)
from slim.report.points import Point, rows_of, step_name
from slim.report.runs import Chain, Row
from slim.report.table import Column, by_protocol

MOST = 40  # entries of a drop-down
TRAINED = ("train_loss", "validation_loss")
# by curve: its name in the legend, its color, how it is drawn; validation is measured seldom enough
# for every measurement to have a mark
LOSS_LINES = {
    "train_loss": ("training", KEPT, "lines"),
    "validation_loss": ("validation", REMOVED, "lines+markers"),
}

Loss = tuple[int, float]  # optimizer step, nats per token


def before_after(points: list[Point]) -> dict | None:
    """Return perplexity and accuracies over the steps of a chain, one option per final checkpoint;
    None without figures."""
    by_row = {id(point.row): point for point in points}
    options = []
    for last in points:
        # a source alone has no step to show
        if last.role != "final" or len(last.chain) < 2:
            continue
        option = _steps(last.name, _points_along(last, by_row))
        if option is not None:
            options.append(option)
    if not options:
        return None
    return {"id": "steps", "title": "Before and after every step", "options": options[:MOST]}


def _points_along(last: Point, by_row: dict[int, Point]) -> list[Point]:
    """Return the points from the source to ``last``."""
    chain = []
    for length, row in enumerate(last.chain, 1):
        point = by_row.get(id(row))
        if point is None:
            # another run has the same checkpoint, and its row stands in the report
            point = Point(row, last.chain[:length], row.label, "step", "")
        chain.append(point)
    return chain


def _steps(name: str, chain: list[Point]) -> dict | None:
    perplexities, tasks = _perplexity_and_tasks(chain)
    if not perplexities and not tasks:
        return None
    labels = []
    for number, point in enumerate(chain):
        step = html.escape(step_name(point.row))
        labels.append(f"{number}. {step}".replace(", ", ",<br>"))
    traces = []
    for column in perplexities:
        traces.append(_line(chain, labels, column, len(traces), ""))
    for column in tasks:
        traces.append(_line(chain, labels, column, len(traces), "2"))
    sentence = (
        "Each step from left to right adds to the one before; the first is the source. "
        + _change(chain, perplexities + tasks)
    )
    return {
        "label": name,
        "sentence": sentence.strip(),
        "data": traces,
        "layout": _steps_layout(perplexities, tasks),
    }


def _perplexity_and_tasks(chain: list[Point]) -> tuple[list[Column], list[Column]]:
    """Return the perplexity that most of a chain has, as a list of one or none, and its
    accuracies, the mean first."""
    accuracies = [MEAN_ACCURACY, *task_metrics(chain, "acc")]
    tasks = by_protocol(accuracies, rows_of(chain))
    perplexity = main_perplexity(chain)
    if perplexity is None:
        return [], tasks
    return [perplexity], tasks


def _steps_layout(perplexities: list[Column], tasks: list[Column]) -> dict:
    """Return plotly's layout: perplexity on the left, accuracies on the right; one alone takes all
    the room."""
    left = right = [0, 1]
    if perplexities and tasks:
        left, right = [0, 0.44], [0.56, 1]
    correct = "correct (%), higher is better"
    title = axis_title(perplexities[0]) if perplexities else correct
    return {
        "legend": {"orientation": "h", "y": -0.2},
        "xaxis": _steps_axis("y", left, bool(perplexities)),
        "yaxis": _height_axis("x", title, bool(perplexities)),
        "xaxis2": _steps_axis("y2", right, bool(tasks)),
        "yaxis2": _height_axis("x2", correct, bool(tasks)),
    }


def _steps_axis(anchor: str, domain: list[float], visible: bool) -> dict:
    return {"domain": domain, "anchor": anchor, "type": "category", "visible": visible}


def _height_axis(anchor: str, title: str, visible: bool) -> dict:
    return {"anchor": anchor, "title": {"text": title}, "visible": visible}


def _line(chain: list[Point], labels: list[str], column: Column, number: int, axis: str) -> dict:
    """Return a column's values along a chain as a line; ``axis`` is plotly's ending, "" or "2"."""
    heights, spreads, hovers = [], [], []
    for point in chain:
        heights.append(value(point, column))
        spreads.append(error(point, column))
        hovers.append(f"{html.escape(column.heading)}: {with_error(point, column)}")
    color = COLORS[number % len(COLORS)]
    return {
        "type": "scatter",
        "mode": "lines+markers",
        "name": column.heading,
        "x": labels,
        "y": heights,
        "error_y": {"type": "data", "array": spreads, "thickness": 1, "width": 3},
        "xaxis": f"x{axis}",
        "yaxis": f"y{axis}",
        "hoverinfo": "text",
        "hovertext": hovers,
        "marker": {"color": color, "size": 8},
        "line": {"color": color},
    }


def _change(chain: list[Point], columns: list[Column]) -> str:
    """Say by how much the first measure changed from the source to the end."""
    source, last = chain[0], chain[-1]
    for column in columns:
        if value(source, column) is not None and value(last, column) is not None:
            return (
                f"From {with_error(source, column)} to {with_error(last, column)} in "
                f"{column.heading}."
            )
    return ""


def loss_curves(chains: list[Chain]) -> dict | None:
    """Return training and validation loss of every trained checkpoint, one option each; None where
    nothing was trained."""
    options: dict[str, dict] = {}
    for chain in chains:
        for number, row in enumerate(chain.rows):
            # several chains may lead on from the same trained checkpoint
            if row.digest in options or not _was_trained(row):
                continue
            before = " → ".join(step_name(earlier) for earlier in chain.rows[:number])
            options[row.digest] = _losses(f"{step_name(row)}, after {before}", row.curves)
    if not options:
        return None
    shown = list(options.values())[:MOST]
    return {"id": "losses", "title": "Loss of healing", "options": shown}


def _was_trained(row: Row) -> bool:
    return any(point[0] in TRAINED for point in row.curves)


def _losses(name: str, curves: list) -> dict:
    """Return the picture of one training; ``curves`` are [label, value, step] as recorded."""
    losses: dict[str, list[Loss]] = {kind: [] for kind in TRAINED}
    for label, loss, step in curves:
        if label in losses:
            losses[label].append((step, loss))
    data = []
    for kind, points in losses.items():
        if points:
            data.append(_loss_line(kind, points))
    layout = {
        "xaxis": {"title": {"text": "optimiser step"}},
        "yaxis": {"title": {"text": "loss per token (nats)"}},
        "legend": {"orientation": "h", "y": -0.2},
    }
    sentence = _loss_sentence(losses["validation_loss"])
    return {"label": name, "sentence": sentence, "data": data, "layout": layout}


def _loss_line(kind: str, points: list[Loss]) -> dict:
    title, color, mode = LOSS_LINES[kind]
    return {
        "type": "scatter",
        "mode": mode,
        "name": title,
        "x": [step for step, _ in points],
        "y": [loss for _, loss in points],
        "line": {"color": color},
        "marker": {"color": color},
    }


def _loss_sentence(validation: list[Loss]) -> str:
    if not validation:
        return "Training loss only; nothing was held out."
    first_step, before = validation[0]
    # NaN is unequal to itself and sorts after every number
    best_step, lowest = min(validation, key=lambda point: (point[1] != point[1], point[1]))
    kept = f"at step {best_step}, which was kept"
    if best_step == first_step:
        kept = "so the untouched model was kept"
    return (
        f"On held-out text the loss was {before:.3f} before training; the lowest is "
        f"{lowest:.3f}, {kept}."
    )

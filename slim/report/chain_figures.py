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
    primary,
    quality_columns,
    task_metrics,
    value,
    with_error,
)
from slim.report.points import Point, step_name
from slim.report.runs import Chain
from slim.report.table import Column, by_protocol

MOST = 40  # entries of a drop-down
TRAINED = ("train_loss", "validation_loss")


def before_after(points: list[Point]) -> dict | None:
    """Return perplexity and accuracies over the steps of a chain, one option per final checkpoint;
    None without figures."""
    by_row = {id(point.row): point for point in points}
    options = []
    for last in points:
        chain = [
            by_row.get(id(row)) or Point(row, last.chain[: i + 1], row.label, "step", "")
            for i, row in enumerate(last.chain)
        ]
        if last.role == "final" and len(chain) > 1:
            options.append(_steps(last.name, chain))
    options = [option for option in options if option is not None]
    return (
        {"id": "steps", "title": "Before and after every step", "options": options[:MOST]}
        if options
        else None
    )


def _steps(name: str, chain: list[Point]) -> dict | None:
    perplexity = primary(
        chain, [column for column in quality_columns(chain) if column.metric.is_perplexity]
    )
    perplexities = [perplexity] if perplexity else []
    tasks = by_protocol(
        [MEAN_ACCURACY, *task_metrics(chain, "acc")], [point.row for point in chain]
    )
    labels = [
        f"{number}. {html.escape(step_name(point.row))}".replace(", ", ",<br>")
        for number, point in enumerate(chain)
    ]
    traces = [
        _line(chain, labels, column, number, "") for number, column in enumerate(perplexities)
    ]
    traces += [
        _line(chain, labels, column, number + len(perplexities), "2")
        for number, column in enumerate(tasks)
    ]
    if not traces:
        return None
    layout: dict = {"legend": {"orientation": "h", "y": -0.2}}
    sides = [("", perplexities), ("2", tasks)]
    for position, (axis, columns) in enumerate(sides):
        alone = not all(columns for _, columns in sides)
        domain = [0, 1] if alone else ([0, 0.44], [0.56, 1])[position]
        layout[f"xaxis{axis}"] = {
            "domain": domain,
            "anchor": f"y{axis}",
            "type": "category",
            "visible": bool(columns),
        }
        title = axis_title(columns[0]) if not axis and columns else "correct (%), higher is better"
        layout[f"yaxis{axis}"] = {
            "anchor": f"x{axis}",
            "title": {"text": title},
            "visible": bool(columns),
        }
    sentence = (
        "Each step from left to right adds to the one before; the first is the source. "
        + _change(chain, [*perplexities, *tasks])
    )
    return {"label": name, "sentence": sentence.strip(), "data": traces, "layout": layout}


def _line(chain: list[Point], labels: list[str], column: Column, number: int, axis: str) -> dict:
    return {
        "type": "scatter",
        "mode": "lines+markers",
        "name": column.heading,
        "x": labels,
        "y": [value(point, column) for point in chain],
        "error_y": {
            "type": "data",
            "array": [error(point, column) for point in chain],
            "thickness": 1,
            "width": 3,
        },
        "xaxis": f"x{axis}",
        "yaxis": f"y{axis}",
        "hoverinfo": "text",
        "hovertext": [
            f"{html.escape(column.heading)}: {with_error(point, column)}" for point in chain
        ],
        "marker": {"color": COLORS[number % len(COLORS)], "size": 8},
        "line": {"color": COLORS[number % len(COLORS)]},
    }


def _change(chain: list[Point], columns: list[Column]) -> str:
    """Say by how much the first measure changed from the source to the end."""
    for column in columns:
        first, last = value(chain[0], column), value(chain[-1], column)
        if first is not None and last is not None:
            return (
                f"From {with_error(chain[0], column)} to {with_error(chain[-1], column)} in "
                f"{column.heading}."
            )
    return ""


def loss_curves(chains: list[Chain]) -> dict | None:
    """Return training and validation loss of every trained checkpoint, one option each; None where
    nothing was trained."""
    trained = {}
    for chain in chains:
        for number, row in enumerate(chain.rows):
            if any(point[0] in TRAINED for point in row.curves):
                before = " → ".join(step_name(one) for one in chain.rows[:number])
                trained.setdefault(row.digest, (f"{step_name(row)}, after {before}", row.curves))
    options = [_losses(name, curves) for name, curves in trained.values()]
    return (
        {"id": "losses", "title": "Loss of healing", "options": options[:MOST]} if options else None
    )


def _losses(name: str, curves: list) -> dict:
    parts = {
        kind: [(step, loss) for label, loss, step in curves if label == kind] for kind in TRAINED
    }
    data = []
    for kind, colour, mode, title in zip(
        TRAINED,
        (KEPT, REMOVED),
        ("lines", "lines+markers"),
        ("training", "validation"),
        strict=True,
    ):
        if parts[kind]:
            steps, losses = zip(*parts[kind], strict=True)
            data.append(
                {
                    "type": "scatter",
                    "mode": mode,
                    "name": title,
                    "x": list(steps),
                    "y": list(losses),
                }
            )
            data[-1] |= {"line": {"color": colour}, "marker": {"color": colour}}
    layout = {
        "xaxis": {"title": {"text": "optimiser step"}},
        "yaxis": {"title": {"text": "loss per token (nats)"}},
        "legend": {"orientation": "h", "y": -0.2},
    }
    return {
        "label": name,
        "sentence": _loss_sentence(parts["validation_loss"]),
        "data": data,
        "layout": layout,
    }


def _loss_sentence(validation: list[tuple[int, float]]) -> str:
    if not validation:
        return "Training loss only; nothing was held out."
    (first, before), best = (
        validation[0],
        min(validation, key=lambda point: (point[1] != point[1], point[1])),
    )
    moved = (
        "so the untouched model was kept"
        if best[0] == first
        else f"at step {best[0]}, which was kept"
    )
    return (
        f"On held-out text the loss was {before:.3f} before training; the lowest is "
        f"{best[1]:.3f}, {moved}."
    )

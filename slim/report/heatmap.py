"""The heat map of two settings that differ between runs, such as bits against group size."""

from __future__ import annotations

import json
from collections import defaultdict
from itertools import combinations

from slim.report.charts import hover
from slim.report.pareto import axis_title, primary, quality_columns, value
from slim.report.points import Point, plain_settings, varying_settings
from slim.report.runs import Row
from slim.report.table import Column, cell

MOST = 24  # entries of the drop-down
SMALLEST = 2  # values a setting must take


def heat_map(points: list[Point]) -> dict | None:
    """Return a quality per pair of values of two numeric settings, one option per pair, measure and
    rest; None without two.

    Runs that also differ in anything else (another method, a third setting) are in options of their
    own."""
    finals = [point for point in points if point.role == "final"]
    measures = quality_columns(finals)
    first = primary(finals, measures)
    measures = sorted(measures, key=lambda column: column is not first)
    grids = sorted(_grids(finals), key=lambda grid: -len(grid[2]))
    options = [
        _option(*grid, column)
        for column in measures
        for grid in grids
        if any(value(p, column) for p in grid[2].values())
    ]
    return (
        {"id": "heat", "title": "Two settings at once", "options": options[:MOST]}
        if options
        else None
    )


def _grids(
    points: list[Point],
) -> list[tuple[tuple[str, str], str, dict[tuple[float, float], Point]]]:
    """Return (pair of settings, what else tells these runs apart, (first, second) -> point) for
    every grid of two by two."""
    numbers = {id(point): _numbers(point) for point in points}
    names = dict.fromkeys(name for found in numbers.values() for name in found)
    varying = [
        name
        for name in names
        if len({found.get(name) for found in numbers.values()} - {None}) >= SMALLEST
    ]
    grids = []
    for pair in combinations(varying, 2):
        cells: dict[str, dict] = defaultdict(dict)
        for point in points:
            own = numbers[id(point)]
            if all(name in own for name in pair):
                cells[_rest(point, pair)][own[pair[0]], own[pair[1]]] = point
        grids += [(pair, rest, grid) for rest, grid in cells.items() if _is_grid(grid)]
    if len(grids) == 1:
        return [(grids[0][0], "", grids[0][2])]
    differing = varying_settings(row for point in points for row in point.chain)
    return [
        (pair, _rest_label(next(iter(grid.values())), pair, differing), grid)
        for pair, _, grid in grids
    ]


def _is_grid(cells: dict[tuple[float, float], Point]) -> bool:
    """Whether there are two values of each setting at least, and half of the cells are filled: not
    a line of points."""
    sizes = [len({place[axis] for place in cells}) for axis in (0, 1)]
    return min(sizes) >= SMALLEST and 2 * len(cells) >= sizes[0] * sizes[1]


def _numbers(point: Point) -> dict[str, float]:
    """Return the numeric settings of all stages of a chain as ``{"quantize bits": 3}``."""
    found = {}
    for row in point.chain:
        for name, number in plain_settings(row).items():
            if isinstance(number, (int, float)) and not isinstance(number, bool):
                found[f"{row.kind} {name}"] = number
    return found


def _rest(point: Point, pair: tuple[str, str]) -> str:
    """Return all that the chain says besides the pair of settings."""
    return json.dumps(
        [[row.label, {n: v for n, v in _others(row, pair)}] for row in point.chain], sort_keys=True
    )


def _others(row: Row, pair: tuple[str, str]) -> list[tuple[str, object]]:
    return [
        (name, value)
        for name, value in plain_settings(row).items()
        if f"{row.kind} {name}" not in pair
    ]


def _rest_label(point: Point, pair: tuple[str, str], varying: dict) -> str:
    """Return the methods of a chain and the settings besides the pair that differ between runs."""
    steps = []
    for row in point.chain:
        own = varying[row.kind, row.method]
        steps.append(
            " ".join(
                [
                    (row.method or row.label).lower(),
                    *(f"{n} {v}" for n, v in _others(row, pair) if n in own),
                ]
            )
        )
    return " → ".join(steps)


def _option(pair: tuple[str, str], rest: str, grid: dict, column: Column) -> dict:
    xs, ys = sorted({place[0] for place in grid}), sorted({place[1] for place in grid})
    cells = [[grid.get((x, y)) for x in xs] for y in ys]
    empty = sum(point is None for line in cells for point in line)
    trace = {
        "type": "heatmap",
        "x": [f"{x:g}" for x in xs],
        "y": [f"{y:g}" for y in ys],
        "z": [
            [None if point is None else value(point, column) for point in line] for line in cells
        ],
        "text": [
            ["" if point is None else cell(point.row, column) for point in line] for line in cells
        ],
        "texttemplate": "%{text}",
        "hoverinfo": "text",
        "hovertext": [
            ["not run, or failed" if point is None else hover(point, (column,)) for point in line]
            for line in cells
        ],
        "colorscale": "Viridis",
        "reversescale": column.metric.better == "low",
        "colorbar": {"title": {"text": column.heading, "side": "right"}},
        "xgap": 2,
        "ygap": 2,
    }
    sentence = f"The lighter the better. Along a row changes {pair[0]}, along a column {pair[1]}. ({axis_title(column)}.)"
    if empty:
        sentence += f" {empty} of {len(xs) * len(ys)} cells are empty: not run, or failed."
    axes = {
        "xaxis": {"title": {"text": pair[0]}, "type": "category"},
        "yaxis": {"title": {"text": pair[1]}, "type": "category"},
    }
    label = f"{column.heading}: {pair[0]} and {pair[1]}" + (f"; {rest}" if rest else "")
    return {"label": label, "sentence": sentence, "data": [trace], "layout": axes}

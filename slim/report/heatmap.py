"""The heat map of two settings that differ between runs, such as bits against group size."""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import dataclass, replace
from itertools import combinations

from slim.report.charts import hover
from slim.report.pareto import axis_title, primary, quality_columns, value
from slim.report.points import Point, plain_settings, varying_settings
from slim.report.runs import Row
from slim.report.table import Column, cell

MOST = 24  # entries of the drop-down
SMALLEST = 2  # values a setting must take

Place = tuple[float, float]  # a value of the first setting and one of the second


@dataclass(frozen=True)
class Grid:
    """Results over two settings.

    Attributes:
        pair: names of the settings, such as ``"quantize bits"``: along a row, along a column.
        rest: what else tells these runs from others; empty where there are no others.
        points: the results, by the values of both settings.
    """

    pair: tuple[str, str]
    rest: str
    points: dict[Place, Point]

    def values(self, axis: int) -> list[float]:
        """Return the values of a setting: the first (0) or the second (1)."""
        return sorted({place[axis] for place in self.points})

    @property
    def is_filled(self) -> bool:
        """Whether there are two values of each setting at least, and half of the cells are filled:
        not a line of points."""
        across, down = len(self.values(0)), len(self.values(1))
        return min(across, down) >= SMALLEST and 2 * len(self.points) >= across * down


def heat_map(points: list[Point]) -> dict | None:
    """Return the picture of a quality over two numeric settings.

    Runs that also differ in anything else (another method, a third setting) are in options of their
    own.

    Args:
        points: of the report; only results of runs matter.

    Returns:
        One option per pair of settings, measure and rest; None where no two settings vary.
    """
    finals = [point for point in points if point.role == "final"]
    measures = quality_columns(finals)
    first = primary(finals, measures)
    measures = sorted(measures, key=lambda column: column is not first)
    grids = sorted(_grids(finals), key=lambda grid: -len(grid.points))
    options = []
    for column in measures:
        for grid in grids:
            if any(value(point, column) for point in grid.points.values()):
                options.append(_option(grid, column))
    if not options:
        return None
    return {"id": "heat", "title": "Two settings at once", "options": options[:MOST]}


def _grids(points: list[Point]) -> list[Grid]:
    """Return every grid of two by two or more."""
    numbers = {id(point): _numbers(point) for point in points}
    values: dict[str, set[float]] = {}
    for settings in numbers.values():
        for name, number in settings.items():
            values.setdefault(name, set()).add(number)
    varying = [name for name, known in values.items() if len(known) >= SMALLEST]
    grids = []
    for pair in combinations(varying, 2):
        by_rest: dict[str, dict[Place, Point]] = defaultdict(dict)
        for point in points:
            settings = numbers[id(point)]
            if all(name in settings for name in pair):
                place = (settings[pair[0]], settings[pair[1]])
                by_rest[_rest(point, pair)][place] = point
        for cells in by_rest.values():
            grids.append(Grid(pair, "", cells))
    grids = [grid for grid in grids if grid.is_filled]
    if len(grids) == 1:
        return grids
    differing = varying_settings(row for point in points for row in point.chain)
    named = []
    for grid in grids:
        example = next(iter(grid.points.values()))
        named.append(replace(grid, rest=_rest_label(example, grid.pair, differing)))
    return named


def _numbers(point: Point) -> dict[str, float]:
    """Return the numeric settings of all stages of a chain as ``{"quantize bits": 3}``."""
    numbers = {}
    for row in point.chain:
        for name, number in plain_settings(row).items():
            if isinstance(number, (int, float)) and not isinstance(number, bool):
                numbers[f"{row.kind} {name}"] = number
    return numbers


def _rest(point: Point, pair: tuple[str, str]) -> str:
    """Return all that the chain says besides the pair of settings."""
    steps = [[row.label, _besides(row, pair)] for row in point.chain]
    return json.dumps(steps, sort_keys=True)


def _besides(row: Row, pair: tuple[str, str]) -> dict[str, object]:
    settings = plain_settings(row)
    return {name: value for name, value in settings.items() if f"{row.kind} {name}" not in pair}


def _rest_label(point: Point, pair: tuple[str, str], varying: dict) -> str:
    """Return the methods of a chain and the settings besides the pair that differ between runs."""
    steps = []
    for row in point.chain:
        words = [(row.method or row.label).lower()]
        for name, setting in _besides(row, pair).items():
            if name in varying[row.kind, row.method]:
                words.append(f"{name} {setting}")
        steps.append(" ".join(words))
    return " → ".join(steps)


def _option(grid: Grid, column: Column) -> dict:
    xs, ys = grid.values(0), grid.values(1)
    heights, texts, hovers, empty = [], [], [], 0
    for y in ys:
        line = [grid.points.get((x, y)) for x in xs]
        empty += line.count(None)
        heights.append([None if point is None else value(point, column) for point in line])
        texts.append(["" if point is None else cell(point.row, column) for point in line])
        hovers.append([_hover(point, column) for point in line])
    across, down = grid.pair
    trace = {
        "type": "heatmap",
        "x": [f"{x:g}" for x in xs],
        "y": [f"{y:g}" for y in ys],
        "z": heights,
        "text": texts,
        "texttemplate": "%{text}",
        "hoverinfo": "text",
        "hovertext": hovers,
        "colorscale": "Viridis",
        "reversescale": column.metric.better == "low",
        "colorbar": {"title": {"text": column.heading, "side": "right"}},
        "xgap": 2,
        "ygap": 2,
    }
    sentence = (
        f"The lighter the better. Along a row changes {across}, along a column {down}. "
        f"({axis_title(column)}.)"
    )
    if empty:
        sentence += f" {empty} of {len(xs) * len(ys)} cells are empty: not run, or failed."
    axes = {
        "xaxis": {"title": {"text": across}, "type": "category"},
        "yaxis": {"title": {"text": down}, "type": "category"},
    }
    label = f"{column.heading}: {across} and {down}"
    if grid.rest:
        label += f"; {grid.rest}"
    return {"label": label, "sentence": sentence, "data": [trace], "layout": axes}


def _hover(point: Point | None, column: Column) -> str:
    return "not run, or failed" if point is None else hover(point, (column,))

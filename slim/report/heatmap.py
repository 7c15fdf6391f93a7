"""The heat map of two settings that differ between runs, such as bits against group size."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import combinations

from slim.report.charts import hover, primary_first
from slim.report.pareto import axis_title, quality_columns, value
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
    # the grid with most results comes first in the drop-down
    grids = sorted(_grids(finals), key=lambda grid: -len(grid.points))
    options = []
    for column in primary_first(finals, quality_columns(finals)):
        for grid in grids:
            if any(value(point, column) for point in grid.points.values()):
                options.append(_option(grid, column))
    if not options:
        return None
    return {"id": "heat", "title": "Two settings at once", "options": options[:MOST]}


def _grids(points: list[Point]) -> list[Grid]:
    """Return every grid of two by two or more."""
    numbers = {id(point): _numbers(point) for point in points}
    grids = []
    for pair in combinations(_varying(numbers.values()), 2):
        # runs that differ in anything besides the pair do not compare within one grid
        by_rest: dict[str, dict[Place, Point]] = defaultdict(dict)
        for point in points:
            settings = numbers[id(point)]
            if pair[0] in settings and pair[1] in settings:
                place = (settings[pair[0]], settings[pair[1]])
                by_rest[_rest(point, pair)][place] = point
        for cells in by_rest.values():
            grid = Grid(pair, "", cells)
            if grid.is_filled:
                grids.append(grid)
    # a single grid needs nothing that tells it from others
    if len(grids) == 1:
        return grids
    return _labeled(grids, points)


def _varying(numbers: Iterable[dict[str, float]]) -> list[str]:
    """Return the settings that take two values at least."""
    values: dict[str, set[float]] = {}
    for settings in numbers:
        for name, number in settings.items():
            values.setdefault(name, set()).add(number)
    return [name for name, taken in values.items() if len(taken) >= SMALLEST]


def _labeled(grids: list[Grid], points: list[Point]) -> list[Grid]:
    """Return the grids with what tells each from the others."""
    # the settings of steps on the way count as well
    rows = []
    for point in points:
        rows += point.chain
    differing = varying_settings(rows)
    labeled = []
    for grid in grids:
        # all points of a grid agree in what is besides the pair
        example = next(iter(grid.points.values()))
        labeled.append(replace(grid, rest=_rest_label(example, grid.pair, differing)))
    return labeled


def _numbers(point: Point) -> dict[str, float]:
    """Return the numeric settings of all stages of a chain as ``{"quantize bits": 3}``."""
    numbers = {}
    for row in point.chain:
        for name, number in plain_settings(row).items():
            # True and False are ints to Python, and no axis to a reader
            if isinstance(number, (int, float)) and not isinstance(number, bool):
                numbers[f"{row.kind} {name}"] = number
    return numbers


def _rest(point: Point, pair: tuple[str, str]) -> str:
    """Return all that the chain says besides the pair of settings."""
    steps = [[row.label, _besides(row, pair)] for row in point.chain]
    return json.dumps(steps, sort_keys=True)


def _besides(row: Row, pair: tuple[str, str]) -> dict[str, object]:
    """Return the settings of a step without those of the pair."""
    settings = {}
    for name, setting in plain_settings(row).items():
        if f"{row.kind} {name}" not in pair:
            settings[name] = setting
    return settings


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
    across, down = grid.pair
    sentence = (
        f"The lighter the better. Along a row changes {across}, along a column {down}. "
        f"({axis_title(column)}.)"
    )
    cells = len(grid.values(0)) * len(grid.values(1))
    empty = cells - len(grid.points)
    if empty:
        sentence += f" {empty} of {cells} cells are empty: not run, or failed."
    # categories: a value that is twice another is not twice as far from zero
    axes = {
        "xaxis": {"title": {"text": across}, "type": "category"},
        "yaxis": {"title": {"text": down}, "type": "category"},
    }
    label = f"{column.heading}: {across} and {down}"
    if grid.rest:
        label += f"; {grid.rest}"
    return {"label": label, "sentence": sentence, "data": [_trace(grid, column)], "layout": axes}


def _trace(grid: Grid, column: Column) -> dict:
    """Return the grid as plotly's heat map, one list per value of the second setting."""
    heights, texts, hovers = [], [], []
    for y in grid.values(1):
        heights.append([])
        texts.append([])
        hovers.append([])
        for x in grid.values(0):
            point = grid.points.get((x, y))
            heights[-1].append(_height(point, column))
            texts[-1].append(_text(point, column))
            hovers[-1].append(_hover(point, column))
    return {
        "type": "heatmap",
        "x": [f"{x:g}" for x in grid.values(0)],
        "y": [f"{y:g}" for y in grid.values(1)],
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


def _height(point: Point | None, column: Column) -> float | None:
    """Return what colors a cell; one that was not run, or failed, stays empty."""
    if point is None:
        return None
    return value(point, column)


def _text(point: Point | None, column: Column) -> str:
    if point is None:
        return ""
    return cell(point.row, column)


def _hover(point: Point | None, column: Column) -> str:
    if point is None:
        return "not run, or failed"
    return hover(point, (column,))

"""The table over the checkpoints of a chain: for the terminal, as Markdown, as JSON, and the
samples side by side."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from slim.core.tables import Table, text_width
from slim.core.text import markdown_lines, short_settings
from slim.evaluation.differences import paired, perplexity_records
from slim.evaluation.metrics import (
    ACCURACY,
    DETAIL,
    HEADLINE,
    MEAN_ACCURACY,
    METRICS,
    Metric,
    metrics_of,
)
from slim.evaluation.protocol import protocol_key, variants

if TYPE_CHECKING:
    from slim.checkpoints.result import Result


BEST, WORST = "*", "!"
LONGEST_NAME = 40  # characters of a checkpoint's name that a heading can hold
MOST_TASKS = 10  # tasks that a terminal shows one by one
# a terminal shows quality (0) before what the files say, and that before speed
ORDER = {None: 1, "speed": 2, "energy": 3}


@dataclass(frozen=True)
class Column:
    """The values of a metric that compare: those of one protocol.

    Attributes:
        metric: what it shows, and how.
        words: what tells its protocol from others in the same table; empty for the only one.
        protocol: key of the protocol (:func:`slim.evaluation.protocol.protocol_key`), None for
            any.
    """

    metric: Metric
    words: str = ""
    protocol: str | None = None

    @property
    def heading(self) -> str:
        """The metric's heading, and the protocol where there are several."""
        return self._told_apart(self.metric.heading)

    @property
    def label(self) -> str:
        """The heading where there is little room."""
        return self._told_apart(self.metric.label)

    def _told_apart(self, name: str) -> str:
        if not self.words:
            return name
        return f"{name}, {self.words}"


def columns(results: list[Result], level: str = DETAIL) -> list[Column]:
    """Return the columns that at least one result has a value for.

    Values of different protocols never share one: each protocol has its own column, with what
    tells it apart in the heading.

    Args:
        results: the rows.
        level: ``"headline"`` for the few that a terminal shows, ``"detail"`` for all of a page.
    """
    names: dict[str, None] = {}
    for result in results:
        names.update(dict.fromkeys(result.metrics))
    return by_protocol(metrics_of(list(names), level), results)


def by_protocol(metrics: list[Metric], results: list[Result]) -> list[Column]:
    """Return one column per metric and protocol.

    Args:
        metrics: what to show, in the order of the columns.
        results: the rows.

    Returns:
        None for a metric that no row has a value of.
    """
    split = []
    for metric in metrics:
        for key, words in variants(results, metric.name).items():
            split.append(Column(metric, words, key))
    return split


def figure(result: Result, column: Column) -> float | None:
    """Return the value of a checkpoint in a column.

    Args:
        result: the checkpoint.
        column: metric and protocol.

    Returns:
        None if the checkpoint was not measured, or by another protocol.
    """
    name = column.metric.name
    if column.protocol is not None and protocol_key(result, name) != column.protocol:
        return None
    return result.metrics.get(name)


def best_cells(results: list[Result], column: Column, worst: bool = False) -> set[str]:
    """Return the text of the best cell of a column (one text: what reads the same is as good).

    Args:
        results: the rows.
        column: a column of the table.
        worst: return the worst one instead.

    Returns:
        Empty where nothing is better than anything else, or where all cells read the same.
    """
    better = column.metric.better
    if better is None:
        return set()
    values = {}
    for result in results:
        value = figure(result, column)
        # NaN is no worst value: it says that something broke
        if value is not None and math.isfinite(value):
            values[cell(result, column)] = value
    if len(values) < 2:
        return set()
    # the best of what is better low is the lowest, and so is the worst of what is better high
    if (better == "low") != worst:
        return {min(values, key=values.get)}
    return {max(values, key=values.get)}


def rows(
    results: list[Result], shown: list[Column], bold: tuple[str, str] | None
) -> list[list[str]]:
    """Return the cells of the table, label first.

    Args:
        results: the rows.
        shown: the columns.
        bold: marks before and after the best of every column, None for none.
    """
    table = [[result.label] for result in results]
    for column in shown:
        best = set()
        if bold:
            best = best_cells(results, column)
        for result, cells in zip(results, table, strict=True):
            text = cell(result, column)
            if text in best:
                text = f"{bold[0]}{text}{bold[1]}"
            cells.append(text)
    return table


def cell(result: Result, column: Column) -> str:
    """Format one value; NaN stays visible and a missing one is a dash.

    Args:
        result: the checkpoint.
        column: metric and protocol.
    """
    return column.metric.format(figure(result, column))


def standard_error(result: Result, column: Column) -> float | None:
    """Return the standard error of a figure.

    Args:
        result: the checkpoint.
        column: metric and protocol of the figure.

    Returns:
        Not scaled to the metric's unit; None where none is known.
    """
    # an error of another protocol is not that of the column
    if figure(result, column) is None:
        return None
    return result.metrics.get(column.metric.stderr)


def terminal_table(results: list[Result], compared: bool = False) -> Table:
    """Return the table for the terminal: a row per metric, a column per checkpoint.

    Args:
        results: a chain's checkpoints, source first, or checkpoints to compare.
        compared: whether they are not a chain.

    Returns:
        Quality first; next to a value its change against the first checkpoint; ``*`` after the
        best of a row and ``!`` after the worst.
    """
    shown = headline_columns(results)
    names = [shown_label(result) for result in results]
    headings, legend = numbered(names)
    cells = [checkpoint_cells(results, result, shown) for result in results]
    rows = []
    for number, column in enumerate(shown):
        row = [column.label]
        for of_checkpoint in cells:
            row.append(of_checkpoint[number])
        rows.append(row)
    if len(results) == 1:
        return Table(["", *headings], rows, title="One checkpoint", notes=legend)
    title = "Every column is the one to its left after one more step"
    if compared:
        title = "Checkpoints compared"
    notes = [
        f"{BEST} best and {WORST} worst of a row; next to it the change against {names[0]}",
        *legend,
    ]
    return Table(["", *headings], rows, title=title, notes=notes)


def headline_columns(results: list[Result]) -> list[Column]:
    """Return the columns a terminal shows: quality, size, speed and memory; of many tasks the mean
    only."""
    shown = columns(results, HEADLINE)
    tasks, others = [], []
    for column in shown:
        is_accuracy = column.metric.change == ACCURACY.change
        if is_accuracy and column.metric.part == "tasks":
            tasks.append(column)
        else:
            others.append(column)
    # a benchmark of many subjects would push everything else off the screen
    if len(tasks) > MOST_TASKS:
        shown = by_protocol([MEAN_ACCURACY], results) + others
    return sorted(shown, key=lambda column: ORDER.get(column.metric.part, 0))


def shown_label(result: Result) -> str:
    """Return the name of a checkpoint with what tells it from others of its method, such as
    ``quantize gptq 3b g64``."""
    # a row of a report has no checkpoint: only what was recorded of it
    checkpoint = getattr(result, "checkpoint", None)
    if checkpoint is None:
        return result.label
    manifest = checkpoint.manifest
    if not manifest or manifest.get("hash") != result.digest:
        return result.label
    return f"{result.label} {short_settings(manifest.get('settings') or {})}".strip()


def numbered(names: list[str]) -> tuple[list[str], list[str]]:
    """Return headings for checkpoints, and a legend where names are too long to be headings."""
    if all(text_width(name) <= LONGEST_NAME for name in names):
        return names, []
    headings, legend = [], []
    for number, name in enumerate(names, 1):
        headings.append(str(number))
        legend.append(f"{number}: {name}")
    return headings, legend


def checkpoint_cells(results: list[Result], result: Result, shown: list[Column]) -> list[str]:
    """Return the cells of a checkpoint.

    Args:
        results: all checkpoints; changes are against the first.
        result: one of them.
        shown: the columns.

    Returns:
        One per column: value, mark and change, the changes aligned.
    """
    cells, changes = [], []
    for column in shown:
        change = ""
        if result is not results[0]:
            first = figure(results[0], column)
            change = column.metric.format_change(figure(result, column), first)
        cells.append(cell(result, column) + mark(results, result, column))
        changes.append(change)
    widest = max(map(len, changes), default=0)
    if widest == 0:
        return cells
    aligned = []
    for value, change in zip(cells, changes, strict=True):
        aligned.append(f"{value} {change:>{widest}}")
    return aligned


def mark(results: list[Result], result: Result, column: Column) -> str:
    """Return the mark of the best or the worst value of a column; a space for any other.

    Args:
        results: all checkpoints.
        result: the one to mark.
        column: metric and protocol.
    """
    text = cell(result, column)
    if text in best_cells(results, column):
        return BEST
    if text in best_cells(results, column, worst=True):
        return WORST
    return " "


def markdown_table(results: list[Result], compared: bool = False) -> str:
    """Return the same table in Markdown.

    Args:
        results: a chain's checkpoints, source first, or checkpoints to compare.
        compared: whether they are not a chain; then the best of every column is bold.
    """
    shown = columns(results)
    headings = ["checkpoint"] + [column.heading for column in shown]
    # along a chain the source is mostly the best, which is no news
    bold = None
    if compared:
        bold = ("**", "**")
    return "\n".join(markdown_lines(headings, rows(results, shown, bold))) + "\n"


def json_table(results: list[Result]) -> str:
    """Return all figures with their protocols as JSON: one record per checkpoint, see
    :func:`record`."""
    return json.dumps([record(result) for result in results], indent=2) + "\n"


def record(result: Result) -> dict:
    """Return what ``results.json`` says of a checkpoint, as plain JSON values; NaN stays NaN.

    ``kind``, ``method``, ``settings`` and ``curves`` are those of the stage that made it in this
    chain; a source has the kind ``source``, whoever made it. ``measured`` names the figures that
    belong to each of the two protocols."""
    manifest = result.checkpoint.manifest
    # a source is named by its files instead
    made = {}
    if manifest.get("hash") == result.digest:
        made = manifest
    return {
        "checkpoint": result.label,
        "folder": str(result.checkpoint.folder),
        "hash": result.digest,
        "cached": result.cached,
        "seconds": result.seconds,
        "kind": made.get("kind", "source"),
        "method": made.get("method"),
        "settings": made.get("settings") or {"source": result.label},
        "metrics": {**result.metrics, **errors_of_perplexity(result)},
        "measured": {
            "quality": list(result.quality.get("metrics", {})),
            "speed": list(result.speed.get("metrics", {})),
        },
        "facts": result.metadata,
        "protocol": {
            "quality": result.quality.get("protocol"),
            "speed": result.speed.get("protocol"),
        },
        "curves": made.get("curves", []),
        "samples": result.quality.get("samples", []),
    }


def errors_of_perplexity(result: Result) -> dict[str, float]:
    """Return ``<metric>_stderr`` of the perplexities whose windows or documents were recorded.

    The ratio estimator of :func:`slim.evaluation.differences.paired` gives the error of the mean
    negative log-likelihood; the perplexity is its exponential, so its error is that times the
    perplexity. Empty where it is not finite."""
    errors = {}
    for metric in METRICS:
        value = result.metrics.get(metric.name)
        nll, weights = perplexity_records(metric, result.quality.get("records", {}))
        if value is None or not nll:
            continue
        error = value * paired(nll, weights)[1]
        if math.isfinite(error):
            errors[metric.stderr] = error
    return errors


def samples_text(results: list[Result]) -> str:
    """Return the sample answers of every checkpoint, prompt by prompt, in Markdown."""
    lines = []
    # all checkpoints of an evaluation were asked the same prompts
    for index, sample in enumerate(results[0].quality.get("samples", [])):
        lines += [f"## {sample['prompt']}", ""]
        for result in results:
            answer = result.quality["samples"][index]["answer"].strip()
            lines.append(f"- **{result.label}**: {answer!r}")
        lines.append("")
    return "\n".join(lines)

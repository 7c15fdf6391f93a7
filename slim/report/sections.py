"""What a report says, before it is a page or Markdown: sentences, tables, pictures, answers."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from slim.core.text import counted
from slim.evaluation.health import REPEATING
from slim.report.chain_figures import before_after, loss_curves
from slim.report.charts import size_picture, speed_picture, task_bars
from slim.report.heatmap import heat_map
from slim.report.pareto import (
    SIZE,
    against_source,
    axis_title,
    pareto,
    primary,
    quality_columns,
    shortlist,
    with_error,
)
from slim.report.points import Point, points_of, rows_of, settings_lines
from slim.report.published import Published, published_tables
from slim.report.runs import Collection
from slim.report.table import Column, columns, figure

MODELS_ANSWERING = 16  # models whose answers are shown
ROLES = {"source": "source", "step": "step on the way", "final": "result of a run"}


@dataclass(frozen=True)
class Cell:
    """A cell of a table.

    Attributes:
        text: what it shows.
        number: what it is sorted by; None sorts last.
    """

    text: str
    number: float | None = None


@dataclass(frozen=True)
class Table:
    """A table with the sentence above it.

    Attributes:
        sentence: how to read it.
        headings: of the columns.
        rows: cells, as many per row as headings.
    """

    sentence: str
    headings: list[str]
    rows: list[list[Cell]]


@dataclass(frozen=True)
class Answers:
    """What every model answered to one prompt.

    Attributes:
        prompt: the same for all.
        answers: (name of the model, its answer).
    """

    prompt: str
    answers: list[tuple[str, str]]


@dataclass
class Sections:
    """All parts of a report; a part without data is None or empty.

    Attributes:
        title: of the page.
        summary: what the report is about, in a sentence or two.
        notes: what was left out, and what to beware of.
        best: the front of quality and size.
        models: every checkpoint.
        pictures: as :mod:`slim.report.charts` describes them.
        classes: (name of a run, its picture of classes as PNG in base64).
        answers: per prompt.
        failures: the runs without results.
        published: tables of the studies.
        settings: per run its name, what was typed, a line per step, and ``config.yaml``.
    """

    title: str
    summary: str
    notes: list[str]
    best: Table | None
    models: Table | None
    pictures: list[dict]
    answers: list[Answers]
    failures: Table | None
    published: list[Published]
    settings: list[tuple[str, str, list[str], str]] = field(default_factory=list)
    classes: list[tuple[str, str]] = field(default_factory=list)


def sections(collection: Collection) -> Sections:
    """Arrange what the runs say."""
    points = points_of(collection.chains)
    published, unknown = published_tables(collection.published, points)
    notes = collection.notes + protocol_notes(points) + repeating(points) + unknown
    return Sections(
        title=collection.title or "Report",
        summary=summary(collection, points),
        notes=notes,
        best=best_table(points),
        models=models_table(points),
        pictures=_pictures(collection, points),
        answers=answers(points),
        failures=failures_table(collection),
        published=published,
        settings=_settings(collection, points),
        classes=[(chain.name, chain.classes) for chain in collection.chains if chain.classes],
    )


def _pictures(collection: Collection, points: list[Point]) -> list[dict]:
    """Return the pictures that there is data for, in the order of the page."""
    # size before speed: it is what most readers came for, and every run has it
    pictures = [
        size_picture(points),
        speed_picture(points),
        heat_map(points),
        task_bars(points),
        before_after(points),
        loss_curves(collection.chains),
    ]
    return [picture for picture in pictures if picture is not None]


def _settings(collection: Collection, points: list[Point]) -> list[tuple[str, str, list[str], str]]:
    """Return per run its name, what was typed, a line per step, and ``config.yaml``."""
    # the names by which the tables call the results
    names = {point.row.digest: point.name for point in points}
    settings = []
    for chain in collection.chains:
        name = names[chain.final.digest]
        settings.append((name, chain.typed, settings_lines(chain.rows), chain.config))
    return settings


def summary(collection: Collection, points: list[Point]) -> str:
    """Say in a sentence or two what the report is about.

    Args:
        collection: the runs.
        points: their checkpoints.
    """
    text = f"{counted(len(collection.chains), 'run')} of slim"
    sources = sorted({point.source.label for point in points})
    if sources:
        text += f" on {', '.join(sources)}"
    if points:
        text += f", with {counted(len(points), 'checkpoint')} measured"
    # what the plan rules out was never tried: it did not fail
    skipped = sum(failure.skipped for failure in collection.failures)
    failed = len(collection.failures) - skipped
    without = []
    if failed:
        without.append(f"{counted(failed, 'run')} failed")
    if skipped:
        verb = "was" if skipped == 1 else "were"
        without.append(f"{counted(skipped, 'run')} {verb} ruled out by the plan before any work")
    if not without:
        return f"{text}. "
    return f"{text}. {' and '.join(without)}."


def protocol_notes(points: list[Point]) -> list[str]:
    """Say which figures were measured by several protocols, and how the page keeps them apart."""
    # quality twice does no harm; speed and memory are only in the columns of the table
    protocols: dict[str, set[str]] = {}
    for column in quality_columns(points) + columns(rows_of(points)):
        protocols.setdefault(column.metric.name, set()).add(column.protocol)
    several = []
    for name, keys in protocols.items():
        if len(keys) > 1:
            several.append(name.replace("_", " "))
    if not several:
        return []
    return [
        "These runs were not all measured by the same protocol (more than one for: "
        f"{', '.join(several)}). Figures of different protocols do not compare: each protocol has "
        "columns and pictures of its own, and the heading says what tells it apart."
    ]


def repeating(points: list[Point]) -> list[str]:
    """Name the models whose answers mostly repeat themselves: perplexity and tasks do not show
    it."""
    names = []
    for point in points:
        if point.row.metrics.get("repeated_4grams", 0.0) > REPEATING:
            names.append(point.name)
    if not names:
        return []
    return [
        f"Repeating themselves in more than half of their answers' 4-grams: {'; '.join(names)}."
    ]


def best_table(points: list[Point]) -> Table | None:
    """Return the answer to "what is the best model for my memory?".

    Returns:
        The front of quality and bytes, smallest first; None where no quality was measured.
    """
    quality = primary(points, quality_columns(points))
    if quality is None:
        return None
    best, _ = pareto(points, SIZE, quality)
    if not best:
        return None
    direction = axis_title(quality).rpartition(", ")[2]
    sentence = (
        "Take the last row whose size you can afford: nothing smaller or equally large has a "
        f"better {quality.heading} ({direction}). Sizes are those of the weight files; "
        "the numbers are those in the picture of quality against size."
    )
    headings = [
        "",
        "from (MB)",
        "take",
        quality.heading,
        "against its source",
        "share of the source's size",
    ]
    rows = []
    for number, point in enumerate(best, 1):
        # against its own source: a report may be about several models
        share = point.row.metrics["bytes_on_disk"] / point.source.metrics["bytes_on_disk"]
        cells = [
            Cell(str(number), number),
            _cell(point, SIZE),
            Cell(point.name),
            _cell(point, quality, errors=True),
            Cell(against_source(point, quality)),
            Cell(f"{100 * share:.0f} %", share),
        ]
        rows.append(cells)
    return Table(sentence, headings, rows)


def models_table(points: list[Point]) -> Table | None:
    """Return the table of every checkpoint: parameters, bytes, quality with standard errors, speed,
    memory, energy."""
    if not points:
        return None
    shown = columns(rows_of(points))
    rows = []
    for point in points:
        cells = [_cell(point, column, errors=True) for column in shown]
        rows.append([Cell(point.name), Cell(ROLES[point.role]), *cells])
    sentence = (
        "Every checkpoint once: sources first, then in the order of the runs. ± is one standard "
        "error of a figure alone; rows that answered the same questions differ more surely than it "
        "suggests. A dash: not measured, or not by the protocol of the column."
    )
    headings = ["model", "what it is"]
    headings += [column.heading for column in shown]
    return Table(sentence, headings, rows)


def _cell(point: Point, column: Column, errors: bool = False) -> Cell:
    """Return the cell of a checkpoint, with its standard error where ``errors``."""
    number = figure(point.row, column)
    text = column.metric.format(number)
    if errors:
        text = with_error(point, column)
    # NaN compares with nothing: it would break the order of the column it is sorted by
    if number is not None and math.isnan(number):
        number = None
    return Cell(text, number)


def failures_table(collection: Collection) -> Table | None:
    """Return the runs without results, with their reasons."""
    if not collection.failures:
        return None
    rows = []
    for failure in collection.failures:
        state = failure.status.lower()
        if failure.skipped:
            state = "ruled out by the plan"
        rows.append([Cell(failure.typed or failure.name), Cell(state), Cell(failure.reason)])
    return Table("These have no figures and stand in no picture.", ["run", "state", "reason"], rows)


def answers(points: list[Point]) -> list[Answers]:
    """Return prompt by prompt what the models answered, in the order of the table; of many models
    those that matter most."""
    # chosen among those that answered, so that no place is given to a model without samples
    answering = [point for point in points if point.row.samples]
    by_prompt: dict[str, list[tuple[str, str]]] = {}
    for point in shortlist(answering, MODELS_ANSWERING):
        for sample in point.row.samples:
            by_prompt.setdefault(sample["prompt"], []).append((point.name, sample["answer"]))
    return [Answers(prompt, given) for prompt, given in by_prompt.items()]

"""Figures that the studies published, to be shown apart from ours: other hardware, other software,
other versions.

Facts from the tables of two studies; the file says which, and what is known to be wrong with some
of them."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from slim.evaluation.metrics import BY_NAME, Metric
from slim.report.points import Point, rows_of
from slim.report.table import by_protocol, cell

FILE = Path(__file__).parent.parent / "assets" / "report" / "published.json"
MARK = "published, other hardware"
SHARES = ("acc", "acc_norm")


@dataclass(frozen=True)
class Published:
    """One table of a study, and the same measures of ours in a table of its own.

    Attributes:
        title: heading above both.
        source: which study, in words.
        notes: sentences on how its figures were measured, and what is wrong with them.
        headings: of the published figures, model first.
        rows: the published figures.
        own_headings: of ours.
        own_rows: ours; empty where these runs measured none of it.
    """

    title: str
    source: str
    notes: list[str]
    headings: list[str]
    rows: list[list[str]]
    own_headings: list[str]
    own_rows: list[list[str]]


@cache
def facts() -> dict:
    """Return the file of published figures."""
    return json.loads(FILE.read_text(encoding="utf-8"))


def known_tables() -> list[str]:
    """Return the names of all tables there are figures of."""
    names = dict.fromkeys(row["table"] for row in facts()["rows"])
    return [*names, *facts()["inference"]["tables"]]


def published_tables(names: list[str], points: list[Point]) -> tuple[list[Published], list[str]]:
    """Return tables of the studies, each with ours.

    Args:
        names: of the tables.
        points: the checkpoints of the report.

    Returns:
        The tables, and sentences on names that do not exist.
    """
    known, inference = known_tables(), facts()["inference"]["tables"]
    tables, timed, problems = [], [], []
    for name in names:
        # an unknown name costs its table and not the report
        if name not in known:
            problems.append(f"No published table {name} is known. There are: {', '.join(known)}.")
        elif name in inference:
            timed.append(name)
        else:
            tables.append(_quality(name, points))
    if timed:
        tables.append(_inference(timed, points))
    return tables, problems


def _quality(name: str, points: list[Point]) -> Published:
    """Return a table of figures of quality."""
    published = [row for row in facts()["rows"] if row["table"] == name]
    # rows of one table were not all measured on the same tasks
    metrics: dict[str, None] = {}
    for row in published:
        metrics.update(dict.fromkeys(row["metrics"]))
    rows = []
    for row in published:
        cells = [row["model"], row["method"]]
        for metric in metrics:
            cells.append(_figure(row["metrics"].get(metric), metric))
        rows.append(cells)
    study = "thesis"
    title = f"Table {name}"
    if name == "seed-2":
        study = name
        title = "Width pruning of TinyLlama"
    own_headings, own_rows = _ours(list(metrics), points)
    return Published(
        title=title,
        source=facts()["sources"][study],
        notes=_notes(name, rows),
        headings=["model", "method"] + [_heading(metric) for metric in metrics],
        rows=rows,
        own_headings=own_headings,
        own_rows=own_rows,
    )


def _notes(name: str, rows: list[list[str]]) -> list[str]:
    """Return what is known about the figures of a table: how they were measured, and what is wrong
    with them."""
    if name == "seed-2":
        return []
    notes = facts()["notes"]
    sentences = []
    if name != "4.12":
        sentences.append(f"Protocol: {notes['protocol']}.")
    for key, text in notes.items():
        # a key such as "4.4/4.9 taylor6" belongs to both tables
        if name in key.split(" ")[0].split("/"):
            sentences.append(f"Table {name}: {text}.")
    if any(row[1] == "reference" for row in rows):
        sentences.append(f"Reference rows: {notes['reference rows']}.")
    return sentences


def _heading(metric: str) -> str:
    heading = metric.replace("/", " ")
    if _is_share(metric):
        return f"{heading} (%)"
    return heading


def _is_share(metric: str) -> bool:
    """Whether a figure is a share of right answers, shown in per cent."""
    return metric.rpartition("/")[2] in SHARES


def _figure(value: float | None, metric: str) -> str:
    if value is None:
        return "-"
    if metric == "parameters":
        return f"{value / 1e6:,.2f} M"
    if _is_share(metric):
        return f"{100 * value:.1f}"
    return f"{value:,.2f}"


def _ours(metrics: list[str], points: list[Point]) -> tuple[list[str], list[list[str]]]:
    """Return headings and rows of our values for the same measures; perplexities whatever their
    text."""
    wanted = []
    for name in metrics:
        if _is_share(name):
            metric = Metric(name, _heading(name), scale=100, digits=1)
        else:
            metric = Metric(name, _heading(name), scale=1, digits=2)
        wanted.append(metric)
    # the studies' perplexities are of other texts: ours stands next to them under its own name
    if any(name.endswith("/ppl") for name in metrics):
        wanted.append(replace(BY_NAME["perplexity"], title="perplexity (this report's text)"))
    return _own_rows(wanted, points)


def _own_rows(wanted: list[Metric], points: list[Point]) -> tuple[list[str], list[list[str]]]:
    """Return headings and rows of our values, the number of parameters first; empty where these
    runs measured nothing else."""
    # how large a model is belongs next to every figure of it
    size = BY_NAME["parameters"]
    metrics = [size]
    for metric in wanted:
        if metric.name != size.name:
            metrics.append(metric)
    columns = by_protocol(metrics, rows_of(points))
    if all(column.metric is size for column in columns):
        return [], []
    headings = ["model"]
    rows = [[point.name] for point in points]
    for column in columns:
        headings.append(column.heading)
        for point, row in zip(points, rows, strict=True):
            row.append(cell(point.row, column))
    return headings, rows


def _inference(names: list[str], points: list[Point]) -> Published:
    """Return the figures of speed and memory; several tables of the study hold the same ones."""
    inference = facts()["inference"]
    rows = []
    for row in inference["rows"]:
        rows.append([row["model"], f"{row['tok_s']:.1f}", f"{row['mem_gib']:.2f}"])
    wanted = [
        replace(BY_NAME["whole_length_tokens_per_second"], digits=1),
        replace(BY_NAME["decode_tokens_per_second"], digits=1),
        replace(BY_NAME["weights_bytes"], unit="GiB", scale=2**-30, digits=2),
        replace(BY_NAME["resident_bytes"], unit="GiB", scale=2**-30, digits=2),
    ]
    own_headings, own_rows = _own_rows(wanted, points)
    noun = "Tables" if len(names) > 1 else "Table"
    return Published(
        title=f"{noun} {' and '.join(names)}: inference",
        source=facts()["sources"]["thesis"],
        notes=[f"Protocol: {inference['method']}."],
        headings=["model", "tok/s, prompt included", "memory (GiB)"],
        rows=rows,
        own_headings=own_headings,
        own_rows=own_rows,
    )

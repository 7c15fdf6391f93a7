"""The table over the checkpoints of a chain: for the terminal, as Markdown, as JSON, and the
samples side by side."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from slim.core.text import markdown_lines
from slim.evaluation.protocol import protocol_key, variants

if TYPE_CHECKING:
    from slim.checkpoints.result import Result


@dataclass(frozen=True)
class Column:
    """A column of the table: its heading, the metric it shows, and how."""

    heading: str
    metric: str
    scale: float = 1.0
    digits: int = 0
    # "low" or "high": which value is the best, set in bold where a table asks for it
    best: str | None = None
    protocol: str | None = None  # key of the protocol whose figures the column holds


PERPLEXITIES = (
    Column("perplexity", "perplexity", 1, 3, "low"),
    Column("word perplexity", "word_perplexity", 1, 3, "low"),
    Column("byte perplexity", "byte_perplexity", 1, 4, "low"),
)
SIMILARITY = Column("similarity", "similarity/mean", 1, 3, "high")
DECODE = Column("decode (tok/s)", "decode_tokens_per_second", 1, 0, "high")
FIXED = (
    Column("parameters (M)", "parameters", 1e-6, 2),
    Column("disk (MB)", "bytes_on_disk", 1e-6, 2, "low"),
    *PERPLEXITIES,
)
SPEED = (
    SIMILARITY,
    Column("prefill (tok/s)", "prefill_tokens_per_second", 1, 0, "high"),
    DECODE,
    Column("energy (J/tok)", "energy_joules_per_token", 1, 3, "low"),
    Column("energy (J/tok, estimate)", "energy_joules_per_token_estimate", 1, 3, "low"),
    Column("weights (MB)", "weights_bytes", 1e-6, 2, "low"),
    Column("resident (MB)", "resident_bytes", 1e-6, 1, "low"),
    Column("peak (MB)", "peak_bytes", 1e-6, 1, "low"),
)


def columns(results: list[Result]) -> list[Column]:
    """Return the columns that at least one result has a figure for.

    Figures of different protocols never share one: each protocol has its own column, with what
    tells it apart in the heading."""
    tasks = []
    for result in results:
        for name in result.metrics:
            task, _, metric = name.rpartition("/")
            if metric == "acc" and task != "tasks":
                tasks.append(Column(f"{task}", name, 100, 1, "high"))
            elif metric == "word_perplexity":
                tasks.append(Column(f"{task} word perplexity", name, 1, 3, "low"))
    return by_protocol([*FIXED, *dict.fromkeys(tasks), *SPEED], results)


def by_protocol(wanted: list[Column], results: list[Result]) -> list[Column]:
    """Return each wanted column once per protocol in ``results``, told apart in the heading; none
    without a figure."""
    return [
        replace(column, heading=", ".join(filter(None, (column.heading, words))), protocol=key)
        for column in wanted
        for key, words in variants(results, column.metric).items()
    ]


def figure(result: Result, column: Column) -> float | None:
    """Return the figure of a checkpoint in a column, None if it has none of the column's
    protocol."""
    foreign = column.protocol is not None and protocol_key(result, column.metric) != column.protocol
    return None if foreign else result.metrics.get(column.metric)


def best_cells(results: list[Result], column: Column) -> set[str]:
    """Return the text of the best cell of a column (one text: what reads the same is as good);
    empty without a contest."""
    known = [
        (value, cell(result, column))
        for result in results
        if math.isfinite(value := figure(result, column) or math.nan)
    ]
    if column.best is None or len({text for _, text in known}) < 2:
        return set()
    return {(min if column.best == "low" else max)(known)[1]}


def rows(
    results: list[Result], shown: list[Column], bold: tuple[str, str] | None
) -> list[list[str]]:
    """Return the cells of the table, label first; the best of every column between the two marks of
    ``bold``."""
    best = [best_cells(results, column) if bold else set() for column in shown]
    table = []
    for result in results:
        cells = [cell(result, column) for column in shown]
        marked = [
            f"{bold[0]}{text}{bold[1]}" if text in top else text
            for text, top in zip(cells, best, strict=True)
        ]
        table.append([result.label, *marked])
    return table


def cell(result: Result, column: Column) -> str:
    """Format one figure; NaN stays visible and a missing figure is a dash."""
    return format_figure(figure(result, column), column)


def format_figure(value: float | None, column: Column) -> str:
    """Format a figure as those of a column are."""
    if value is None:
        return "-"
    return "NaN" if math.isnan(value) else f"{value * column.scale:,.{column.digits}f}"


def standard_error(result: Result, column: Column) -> float | None:
    """Return the standard error of a figure in its column, unscaled, or None where none is
    known."""
    return None if figure(result, column) is None else result.metrics.get(f"{column.metric}_stderr")


def terminal_table(results: list[Result], compared: bool = False):
    """Return the table for the terminal, a rich ``Table``; with the best in bold where checkpoints
    are ``compared``."""
    from rich.table import Table

    chain, several = (
        "Every row is the row above it after one more stage",
        "Every row is a checkpoint, the best is bold",
    )
    table = Table(title=several if compared else chain, title_justify="left")
    table.add_column("checkpoint", no_wrap=True)
    shown = columns(results)
    for column in shown:
        table.add_column(column.heading, justify="right")
    for cells in rows(results, shown, ("[bold]", "[/bold]") if compared else None):
        table.add_row(*cells)
    return table


def markdown_table(results: list[Result], compared: bool = False) -> str:
    """Return the same table in Markdown."""
    shown = columns(results)
    headings = ["checkpoint", *(column.heading for column in shown)]
    return (
        "\n".join(
            markdown_lines(headings, rows(results, shown, ("**", "**") if compared else None))
        )
        + "\n"
    )


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
    made = manifest if manifest.get("hash") == result.digest else {}
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
        "facts": result.facts,
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
    from slim.evaluation.differences import paired

    records, found = result.quality.get("records", {}), {}
    weights = {
        "perplexity": ("perplexity", None),
        "word_perplexity": ("documents", "words"),
        "byte_perplexity": ("documents", "bytes"),
    }
    for metric, (part, unit) in weights.items():
        value, rows = result.metrics.get(metric), records.get(part)
        if value is not None and rows:
            found[f"{metric}_stderr"] = value * paired(rows["nll"], rows[unit] if unit else None)[1]
    return {name: error for name, error in found.items() if math.isfinite(error)}


def samples_text(results: list[Result]) -> str:
    """Return the sample answers of every checkpoint, prompt by prompt, in Markdown."""
    lines = []
    prompts = [sample["prompt"] for sample in results[0].quality.get("samples", [])]
    for index, prompt in enumerate(prompts):
        lines += [f"## {prompt}", ""]
        for result in results:
            lines.append(
                f"- **{result.label}**: {result.quality['samples'][index]['answer'].strip()!r}"
            )
        lines.append("")
    return "\n".join(lines)

"""The table over the checkpoints of a chain: for the terminal, as Markdown, as JSON, and the samples side by side."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from slim.pipeline import Result, Step


@dataclass(frozen=True)
class Column:
    """A column of the table: its heading, the metric it shows, and how."""

    heading: str
    metric: str
    scale: float = 1.0
    digits: int = 0
    best: str | None = None  # "low" or "high": the best value is set in bold


FIXED = (
    Column("parameters (M)", "parameters", 1e-6, 2),
    Column("disk (MB)", "bytes_on_disk", 1e-6, 2),
    Column("perplexity", "perplexity", 1, 3),
)
SPEED = (
    Column("prefill (tok/s)", "prefill_tokens_per_second", 1, 0),
    Column("decode (tok/s)", "decode_tokens_per_second", 1, 0),
    Column("weights (MB)", "weights_bytes", 1e-6, 2),
    Column("resident (MB)", "resident_bytes", 1e-6, 1),
    Column("peak (MB)", "peak_bytes", 1e-6, 1),
)


def columns(results: list[Result]) -> list[Column]:
    """Return the columns that at least one result has a figure for."""
    tasks = []
    for result in results:
        for name in result.metrics:
            task, _, metric = name.rpartition("/")
            if metric == "acc" and task != "tasks":
                preferred = f"{task}/acc_norm" if f"{task}/acc" not in result.metrics else name
                tasks.append(Column(f"{task}", preferred, 100, 1))
    tasks = list(dict.fromkeys(tasks))
    return [column for column in (*FIXED, *tasks, *SPEED) if any(column.metric in r.metrics for r in results)]


def cell(result: Result, column: Column) -> str:
    """Format one figure; NaN stays visible and a missing figure is a dash."""
    value = result.metrics.get(column.metric)
    if value is None:
        return "-"
    if math.isnan(value):
        return "NaN"
    return f"{value * column.scale:,.{column.digits}f}"


def terminal_table(results: list[Result]):
    """Return the table for the terminal, a rich ``Table``."""
    from rich.table import Table

    table = Table(title="Every row is the row above it after one more stage", title_justify="left")
    table.add_column("checkpoint", no_wrap=True)
    shown = columns(results)
    for column in shown:
        table.add_column(column.heading, justify="right")
    for result in results:
        table.add_row(result.label, *(cell(result, column) for column in shown))
    return table


def markdown_table(results: list[Result]) -> str:
    """Return the same table in Markdown."""
    shown = columns(results)
    lines = [
        "| checkpoint | " + " | ".join(column.heading for column in shown) + " |",
        "| --- |" + " ---: |" * len(shown),
    ]
    for result in results:
        lines.append(f"| {result.label} | " + " | ".join(cell(result, column) for column in shown) + " |")
    return "\n".join(lines) + "\n"


def json_table(results: list[Result]) -> str:
    """Return all figures with their protocols as JSON."""
    rows = [
        {
            "checkpoint": result.label,
            "folder": str(result.checkpoint.folder),
            "hash": result.digest,
            "cached": result.cached,
            "metrics": result.metrics,
            "facts": result.facts,
            "protocol": {"quality": result.quality.get("protocol"), "speed": result.speed.get("protocol")},
        }
        for result in results
    ]
    return json.dumps(rows, indent=2) + "\n"


def samples_text(results: list[Result]) -> str:
    """Return the sample answers of every checkpoint, prompt by prompt, in Markdown."""
    lines = []
    prompts = [sample["prompt"] for sample in results[0].quality.get("samples", [])]
    for index, prompt in enumerate(prompts):
        lines += [f"## {prompt}", ""]
        for result in results:
            lines.append(f"- **{result.label}**: {result.quality['samples'][index]['answer'].strip()!r}")
        lines.append("")
    return "\n".join(lines)


def plan_table(steps: list[Step]):
    """Return what a run would do as a rich ``Table``."""
    from rich.table import Table

    from slim.pipeline import gigabytes
    from slim.stage import Stage

    table = Table(title="Plan: nothing has been run", title_justify="left")
    for heading in ("stage", "result", "parameters", "on disk", "peak memory", "folder"):
        table.add_column(heading, justify="right" if heading in ("parameters", "on disk", "peak memory") else "left")
    for step in steps:
        state = "there already" if step.cached else "to be made" if isinstance(step.stage, Stage) else "to be fetched"
        peak = "-" if step.cached or not step.peak_bytes else gigabytes(step.peak_bytes)
        size = gigabytes(step.description.weight_bytes())
        folder = step.folder.name if step.folder else "-"
        table.add_row(step.label, state, f"{step.description.parameters():,}", size, peak, folder)
    return table

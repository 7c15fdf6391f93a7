"""The plan, for the terminal."""

from __future__ import annotations

from slim.chain.pipeline import Pipeline
from slim.checkpoints.result import Step
from slim.checkpoints.stage import Stage
from slim.core.console import results_console
from slim.core.text import gigabytes
from slim.quantization.storage import weight_bytes


def show_plan(pipeline: Pipeline, steps: list[Step]) -> None:
    """Print what would run, and whether it fits."""

    out = results_console()
    out.print(plan_table(steps))
    problem = pipeline.limit_problem(steps)
    out.print(
        f"This would not fit: {problem}" if problem else "Disk and memory suffice.", highlight=False
    )


def plan_table(steps: list[Step]):
    """Return what a run would do as a rich ``Table``."""
    from rich.table import Table

    table = Table(title="Plan: nothing has been run", title_justify="left")
    for heading in ("stage", "result", "parameters", "on disk", "peak memory", "folder"):
        table.add_column(
            heading,
            justify="right" if heading in ("parameters", "on disk", "peak memory") else "left",
        )
    for step in steps:
        state = (
            "there already"
            if step.cached
            else "to be made"
            if isinstance(step.stage, Stage)
            else "to be fetched"
        )
        peak = "-" if step.cached or not step.peak_bytes else gigabytes(step.peak_bytes)
        size = gigabytes(weight_bytes(step.spec))
        folder = step.folder.name if step.folder else "-"
        table.add_row(step.label, state, f"{step.spec.parameters():,}", size, peak, folder)
    return table

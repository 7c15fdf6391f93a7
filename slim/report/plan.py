"""The plan, for the terminal."""

from __future__ import annotations

from slim.chain.estimate import time_line
from slim.chain.pipeline import Pipeline
from slim.checkpoints.result import Step
from slim.checkpoints.stage import Stage
from slim.core.console import results_console, show_line
from slim.core.tables import Table, print_table, wrapped
from slim.core.text import gigabytes
from slim.quantization.storage import weight_bytes
from slim.tracking.connection import server_problem


def show_plan(pipeline: Pipeline, steps: list[Step], uri: str | None) -> None:
    """Print what would run, whether it fits, what is missing for it, and how long it takes.

    Args:
        pipeline: what would run.
        steps: its plan.
        uri: where it would be tracked; None for the store's own file.
    """
    lines = []
    problem = pipeline.limit_problem(steps)
    if problem is None:
        lines.append("Disk and memory suffice.")
    else:
        lines.append(f"This would not fit: {problem}")
    for problem in (pipeline.text_problem(steps), server_problem(uri)):
        if problem is not None:
            lines.append(f"This would not run: {problem}")
    for step in steps:
        if isinstance(step.stage, Stage) and not step.cached:
            missing = step.stage.to_fetch()
            if missing is not None:
                lines.append(missing)
    lines.append(time_line(steps, pipeline.evaluation, pipeline.store.root, pipeline.device))
    print_table(plan_table(steps))
    for text in lines:
        prose, *commands = text.split("\n")
        for line in [*wrapped(prose, results_console().width), *commands]:
            show_line(line)


def plan_table(steps: list[Step]) -> Table:
    """Return what a run would do, a row per step."""
    rows = []
    for step in steps:
        # what is there already needs no memory to be made
        peak = "-"
        if step.peak_bytes and not step.cached:
            peak = gigabytes(step.peak_bytes)
        parameters = f"{step.spec.parameters():,}"
        size = gigabytes(weight_bytes(step.spec))
        folder = step.folder.name if step.folder else "-"
        rows.append([step.label, _state(step), parameters, size, peak, folder])
    headings = ["step", "result", "parameters", "on disk", "peak memory", "folder"]
    return Table(headings, rows, fold=[1, 5], title="Plan: nothing has been run")


def _state(step: Step) -> str:
    if step.cached:
        return "there already"
    if isinstance(step.stage, Stage):
        return "to be made"
    return "to be fetched"

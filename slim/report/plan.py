"""The plan, for the terminal."""

from __future__ import annotations

from slim.chain.estimate import time_line
from slim.chain.pipeline import Pipeline
from slim.checkpoints.result import Step
from slim.checkpoints.stage import Stage
from slim.core.console import results_console
from slim.core.tables import Table, print_table
from slim.core.text import gigabytes
from slim.quantization.storage import weight_bytes


def show_plan(pipeline: Pipeline, steps: list[Step]) -> None:
    """Print what would run, and whether it fits.

    Args:
        pipeline: what would run.
        steps: its plan.
    """
    print_table(plan_table(steps))
    problem = pipeline.limit_problem(steps)
    verdict = "Disk and memory suffice."
    if problem:
        verdict = f"This would not fit: {problem}"
    results_console().print(verdict, highlight=False, markup=False, soft_wrap=True)
    line = time_line(steps, pipeline.evaluation, pipeline.store.root, pipeline.device)
    results_console().print(line, highlight=False, markup=False, soft_wrap=True)


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

"""What came of a search: the best point, or the front between several objectives; on screen, as
Markdown and as JSON."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slim.core.console import results_console
from slim.core.errors import SlimError
from slim.core.tables import Table, print_table
from slim.core.text import markdown_lines
from slim.evaluation.metrics import BY_NAME, metric_of
from slim.report.pareto import front
from slim.search.budget import size
from slim.search.metrics import DECODE, is_better_high
from slim.search.point import judge
from slim.search.space import as_typed, settings

if TYPE_CHECKING:
    from slim.models.spec import ModelSpec
    from slim.search.budget import Budget
    from slim.search.settings import Search
    from slim.sweeps.folder import SweepFolder
    from slim.sweeps.grid import Planned

JSON, MARKDOWN = "search.json", "search.md"


@dataclass
class Trial:
    """A point that was run or ruled out.

    Attributes:
        number: of the point in its sweep.
        point: setting -> value.
        asked: Optuna's trial.
        planned: its configuration.
        model: the description of the model that it ends in.
        needed: memory that the plan foresees, bytes.
        result: see :func:`slim.search.point.judge`; None if it failed.
        skipped: whether its plan rules it out.
        error: why it failed.
    """

    number: int
    point: dict[str, Any]
    asked: Any = None
    planned: Planned | None = None
    model: ModelSpec | None = None
    needed: float | None = None
    result: dict | None = None
    skipped: bool = False
    error: str | None = None

    @property
    def good(self) -> bool:
        """Whether it is in the contest."""
        return self.result is not None and self.result["problem"] is None

    def take(self, folder: SweepFolder, search: Search) -> None:
        """Take what the sweep's folder records of it.

        Args:
            folder: of the sweep.
            search: says what counts.
        """
        record = {}
        for candidate in folder.points():
            if candidate["number"] == self.number:
                record = candidate
        if record.get("status") != "FINISHED" or not record["final"]:
            self.error = record.get("error") or "it ended without a result"
            return
        final = record["final"]
        self.result = {**judge(search, final["metrics"], self.model), "folder": final["folder"]}


def conclude(trials: list[Trial], search: Search, folder: Path) -> dict:
    """Write ``search.json`` and ``search.md`` into a sweep's ``folder`` and return what is in the
    former.

    Raises ``SlimError`` where no point is any good, with what came nearest to the budget.
    """
    found = {
        "objectives": dict(zip(search.objectives, search.directions, strict=True)),
        "budget": {
            name: getattr(search.budget, name)
            for name in ("memory_gb", "context", "tokens_per_second")
        },
        "best": [entry(trial) for trial in best(trials, search.objectives)],
        "points": [entry(trial) for trial in trials],
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / JSON).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    if not found["best"]:
        raise SlimError(nothing_good(trials, search.budget))
    (folder / MARKDOWN).write_text(markdown(found), encoding="utf-8")
    return found


def best(trials: list[Trial], objectives: list[str]) -> list[Trial]:
    """Return the trials in the contest that no other one beats in every objective, ordered by the
    last objective.

    A trial is beaten by one that is at least as good in all objectives and better in one; of equal
    ones the first stays."""
    good = [trial for trial in trials if trial.good]
    costs = [costs_of(trial, objectives) for trial in good]
    first: dict[tuple, int] = {}  # costs -> the first trial that has them
    for index in sorted(front(costs)):
        first.setdefault(costs[index], index)
    order = sorted(first.values(), key=lambda index: (costs[index][-1], index))
    return [good[index] for index in order]


def costs_of(trial: Trial, objectives: list[str]) -> tuple[float, ...]:
    """Return the objectives of a finished trial so that less of each is better."""
    costs = []
    for name in objectives:
        value = trial.result["objectives"][name]
        costs.append(-value if is_better_high(name) else value)
    return tuple(costs)


def entry(trial: Trial) -> dict:
    """Return a trial as plain JSON values."""
    result = trial.result or {"objectives": {}, "problem": None}
    problem = trial.error or result["problem"]
    return {
        "settings": trial.point,
        "state": state_of(trial, problem),
        **result,
        "problem": problem,
        "planned_memory_bytes": trial.needed,
    }


def state_of(trial: Trial, problem: str | None) -> str:
    """Say in a word or two what became of a trial."""
    if trial.skipped:
        return "skipped"
    if trial.result is None:
        return "failed"
    return "over budget" if problem else "good"


def nothing_good(trials: list[Trial], budget: Budget) -> str:
    """Say in two lines why no trial is any good."""
    skipped = [trial for trial in trials if trial.skipped]
    run = [trial for trial in trials if trial.result is not None]
    if run:
        nearest = max(run, key=nearness)
        return (
            f"None of the {len(run)} points that were run is within the budget: "
            f"{name(nearest.point)} {nearest.result['problem']}, and that is the nearest.\n"
            "Allow more, or search among smaller models."
        )
    if skipped:
        least = min(skipped, key=lambda trial: trial.needed)
        return (
            f"No point meets budget.memory_gb={budget.memory_gb:g}: the smallest of "
            f"{len(skipped)} would take {size(least.needed)} ({name(least.point)}).\n"
            "Nothing was run. Allow more, use a smaller budget.context, or search among smaller "
            "models."
        )
    errors = [trial.error for trial in trials if trial.error] or ["there was none"]
    return f"No point of the search could be run. The first: {errors[0]}"


def nearness(trial: Trial) -> tuple[float, float]:
    """Order finished trials by how near they come to a budget: rate first, then memory."""
    return trial.result["tokens_per_second"] or 0, -trial.result["memory_bytes"]


def name(point: dict) -> str:
    """Name a point by its settings."""
    return " ".join(settings(point))


def title(found: dict) -> str:
    """Return what stands above the table."""
    states = [point["state"] for point in found["points"]]
    objectives = list(found["objectives"])
    line = f"Pareto front of {' and '.join(objectives)}"
    if len(objectives) == 1:
        line = f"Best {objectives[0]}"
    limits = []
    for key, value in found["budget"].items():
        if value is not None and key != "context":
            limits.append(f"{key}={value:g}")
    if limits:
        line += f" within {' and '.join(limits)}"
    skipped = states.count("skipped")
    line += f" ({len(states) - skipped} points tried"
    if skipped:
        line += f", {skipped} ruled out by their plan"
    return line + ")"


def table(found: dict) -> tuple[list[str], list[list[str]]]:
    """Return headings and rows: settings, objectives, memory as the budget counts it, decode rate
    where it was measured."""
    keys, objectives = list(found["best"][0]["settings"]), list(found["objectives"])
    timed = DECODE not in objectives and any(
        row["tokens_per_second"] is not None for row in found["best"]
    )
    extra = {"memory (MB)": lambda row: f"{row['memory_bytes'] / 1e6:,.2f}"}
    if timed:
        extra["decode (tok/s)"] = lambda row: f"{row['tokens_per_second'] or 0:,.0f}"
    rows = [
        [
            *(as_typed(row["settings"][key]) for key in keys),
            *(figure(metric, row["objectives"][metric]) for metric in objectives),
            *(show(row) for show in extra.values()),
        ]
        for row in found["best"]
    ]
    return [*keys, *map(heading, objectives), *extra], rows


def heading(metric: str) -> str:
    """Return the heading of a metric's column."""
    return metric_of(metric).heading


def figure(metric: str, value: float) -> str:
    """Format an objective as the table over checkpoints does, one it does not know with four digits
    that count."""
    known = metric_of(metric)
    return known.format(value) if known.digits or known.name in BY_NAME else f"{value:.4g}"


def markdown(found: dict) -> str:
    """Return the table in Markdown, with the title above and where the checkpoints are below."""
    places = [f"- {name(row['settings'])}: `{row['folder']}`" for row in found["best"]]
    return "\n".join([f"# {title(found)}", "", *markdown_lines(*table(found)), "", *places, ""])


def show(found: dict) -> None:
    """Print the table, and the folder of the checkpoint where there is one point only.

    Args:
        found: what the search found, as ``search.json`` has it.
    """
    headings, rows = table(found)
    keys = len(found["best"][0]["settings"])
    print_table(Table(headings, rows, keys=keys, title=title(found)))
    if len(rows) == 1:
        out = results_console()
        out.print(f"its checkpoint: {found['best'][0]['folder']}", highlight=False, soft_wrap=True)

"""What came of a search: the best point, or the front between several objectives; on screen, as
Markdown and as JSON."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slim.core.console import show_labelled
from slim.core.errors import SlimError
from slim.core.tables import Table, print_table
from slim.core.text import counted, markdown_lines
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
        # plain values only: they go into search.json as they are
        self.result = {**judge(search, final["metrics"], self.model), "folder": final["folder"]}


def conclude(trials: list[Trial], search: Search, folder: Path) -> dict:
    """Write ``search.json`` and ``search.md`` and return what is in the former.

    Args:
        trials: all points, also those that failed or were ruled out.
        search: what was looked for.
        folder: of the sweep; it is made where it is missing.

    Returns:
        ``objectives`` (metric -> direction), ``budget`` (its limits), ``best`` and ``points``
        (lists of :func:`entry`).

    Raises:
        SlimError: when no point is any good, with the one that came nearest to the budget.
    """
    budget = search.budget
    outcome = {
        "objectives": dict(zip(search.objectives, search.directions, strict=True)),
        "budget": {
            "memory_gb": budget.memory_gb,
            "context": budget.context,
            "tokens_per_second": budget.tokens_per_second,
        },
        "best": list(map(entry, best(trials, search.objectives))),
        "points": list(map(entry, trials)),
    }
    # before any complaint: the table of what was tried explains why nothing is good
    folder.mkdir(parents=True, exist_ok=True)
    (folder / JSON).write_text(json.dumps(outcome, indent=1) + "\n", encoding="utf-8")
    if not outcome["best"]:
        raise SlimError(nothing_good(trials, search.budget))
    (folder / MARKDOWN).write_text(markdown(outcome), encoding="utf-8")
    return outcome


def best(trials: list[Trial], objectives: list[str]) -> list[Trial]:
    """Return the trials in the contest that no other one beats in every objective, ordered by the
    last objective.

    A trial is beaten by one that is at least as good in all objectives and better in one; of equal
    ones the first stays.

    Args:
        trials: all points.
        objectives: metrics that count.
    """
    good = []
    costs = []
    for trial in trials:
        if trial.good:
            good.append(trial)
            costs.append(costs_of(trial, objectives))
    first: dict[tuple, int] = {}  # costs -> the first trial that has them
    for index in sorted(front(costs)):
        first.setdefault(costs[index], index)
    # the number decides between equal last objectives: the same trials give the same order
    order = sorted(first.values(), key=lambda index: (costs[index][-1], index))
    return [good[index] for index in order]


def costs_of(trial: Trial, objectives: list[str]) -> tuple[float, ...]:
    """Return the objectives of a finished trial so that less of each is better.

    Args:
        trial: that was measured.
        objectives: metrics that count.
    """
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
    """Say in a word or two what became of a trial.

    Args:
        trial: that has ended.
        problem: why it is out of the contest, None if it is not.
    """
    if trial.skipped:
        return "skipped"
    if trial.result is None:
        return "failed"
    return "over budget" if problem else "good"


def nothing_good(trials: list[Trial], budget: Budget) -> str:
    """Say in two lines why no trial is any good.

    Args:
        trials: none of which is good.
        budget: what they had to meet.
    """
    skipped = [trial for trial in trials if trial.skipped]
    measured = [trial for trial in trials if trial.result is not None]
    if measured:
        nearest = max(measured, key=nearness)
        return (
            f"None of the points that were run ({len(measured)}) is within the budget: "
            f"{name(nearest.point)} {nearest.result['problem']}, and that is the nearest.\n"
            "Allow more, or search among smaller models."
        )
    if skipped:
        # how far the budget is from any model tells by how much to raise it
        least = min(skipped, key=lambda trial: trial.needed)
        return (
            f"No point meets budget.memory_gb={budget.memory_gb:g}: the smallest of "
            f"{len(skipped)} would take {size(least.needed)} ({name(least.point)}).\n"
            "Nothing was run. Allow more, use a smaller budget.context, or search among smaller "
            "models."
        )
    first_error = "there was none"
    for trial in trials:
        if trial.error:
            first_error = trial.error
            break
    return f"No point of the search could be run. The first: {first_error}"


def nearness(trial: Trial) -> tuple[float, float]:
    """Order finished trials by how near they come to a budget: rate first, then memory."""
    return trial.result["tokens_per_second"] or 0, -trial.result["memory_bytes"]


def name(point: dict) -> str:
    """Name a point by its settings."""
    return " ".join(settings(point))


def title(outcome: dict) -> str:
    """Return what stands above the table."""
    tried = 0
    skipped = 0
    for point in outcome["points"]:
        if point["state"] == "skipped":
            skipped += 1
        else:
            tried += 1
    objectives = list(outcome["objectives"])
    line = f"Pareto front of {' and '.join(objectives)}"
    if len(objectives) == 1:
        line = f"Best {objectives[0]}"
    limits = []
    for key, value in outcome["budget"].items():
        # the context is no limit of its own: it says what the memory is for
        if value is not None and key != "context":
            limits.append(f"{key}={value:g}")
    if limits:
        line += f" within {' and '.join(limits)}"
    line += f" ({counted(tried, 'point')} tried"
    if skipped:
        line += f", {skipped} ruled out by their plan"
    return line + ")"


def table(outcome: dict) -> tuple[list[str], list[list[str]]]:
    """Return headings and rows: settings, objectives, memory as the budget counts it, decode rate
    where it was measured.

    Args:
        outcome: see :func:`conclude`.
    """
    keys = list(outcome["best"][0]["settings"])
    objectives = list(outcome["objectives"])
    timed = decode_is_extra(outcome)
    rows = []
    for point in outcome["best"]:
        row = []
        for key in keys:
            row.append(as_typed(point["settings"][key]))
        for metric in objectives:
            row.append(figure(metric, point["objectives"][metric]))
        row.append(f"{point['memory_bytes'] / 1e6:,.2f}")
        if timed:
            row.append(f"{point['tokens_per_second'] or 0:,.0f}")
        rows.append(row)
    headings = [*keys, *map(heading, objectives), "memory (MB)"]
    if timed:
        headings.append("decode (tok/s)")
    return headings, rows


def decode_is_extra(outcome: dict) -> bool:
    """Whether the decode rate was measured and has no column as an objective."""
    if DECODE in outcome["objectives"]:
        return False
    return any(point["tokens_per_second"] is not None for point in outcome["best"])


def heading(metric: str) -> str:
    """Return the heading of a metric's column."""
    return metric_of(metric).heading


def figure(metric: str, value: float) -> str:
    """Format an objective as the table over checkpoints does, one it does not know with four digits
    that count.

    Args:
        metric: its name.
        value: what was measured.
    """
    known = metric_of(metric)
    if known.digits or known.name in BY_NAME:
        return known.format(value)
    return f"{value:.4g}"


def markdown(outcome: dict) -> str:
    """Return the table in Markdown, with the title above and where the checkpoints are below."""
    lines = [f"# {title(outcome)}", "", *markdown_lines(*table(outcome)), ""]
    for point in outcome["best"]:
        lines.append(f"- {name(point['settings'])}: `{point['folder']}`")
    return "\n".join([*lines, ""])


def show(outcome: dict) -> None:
    """Print the table, and the folder of the checkpoint where there is one point only.

    Args:
        outcome: what the search found, as ``search.json`` has it.
    """
    headings, rows = table(outcome)
    keys = len(outcome["best"][0]["settings"])
    print_table(Table(headings, rows, keys=keys, title=title(outcome)))
    if len(rows) == 1:
        show_labelled("its checkpoint", outcome["best"][0]["folder"])

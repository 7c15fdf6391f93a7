"""All combinations of the swept values: composed and planned one by one, before the first is
run."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig

from slim.chain.compose import expand_alias
from slim.chain.explain import explain
from slim.core.console import say
from slim.core.errors import SlimError
from slim.sweeps.names import point_name
from slim.sweeps.point import Point, describe, record_failure
from slim.sweeps.protocols import HydraSweeper
from slim.sweeps.sweep import Sweep, current

if TYPE_CHECKING:
    from hydra.core.override_parser.types import Override
    from hydra.core.utils import JobReturn


@dataclass
class Planned:
    """A combination of swept values, composed and planned.

    Attributes:
        number: of the point in its sweep.
        overrides: its settings as typed.
        config: what they compose to; None if they do not.
        name: see :func:`slim.sweeps.names.point_name`; None if it cannot run.
        error: why it cannot run, None if it can.
    """

    number: int
    overrides: list[str]
    config: DictConfig | None = None
    name: str | None = None
    error: Exception | None = None


def run_grid(sweeper: HydraSweeper, arguments: list[str]) -> list[Sequence[JobReturn]]:
    """Run every combination of the swept values that can run and is not finished.

    Args:
        sweeper: as Hydra has set it up.
        arguments: what was typed.
    """
    sweep = current()
    combinations, sweep.swept = expand(parse(sweeper, arguments))
    points = []
    for number, overrides in enumerate(combinations):
        points.append(plan_point(sweeper, sweep, number, overrides))
    refuse_at_once(sweep, points)
    if sweep.config.plan:
        show_plans(sweep, points)
        return []
    sweep.total = len(points)
    sweep.open()
    missing = []
    wrong = 0
    for point in points:
        wrong += point.error is not None
        if not finalize(sweep, point):
            missing.append(point)
    announce(len(points), wrong, len(points) - wrong - len(missing))
    return launch(sweeper, sweep, missing)


def parse(sweeper: HydraSweeper, arguments: list[str]) -> list[Override]:
    """Return the parsed overrides: those of the sweeper's ``params`` that are not typed, then what
    is typed.

    Args:
        sweeper: as Hydra has set it up.
        arguments: what was typed.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser

    params = []
    for key, value in (sweeper.params or {}).items():
        params.append(f"{key}={value}")
    typed = set(map(bare, arguments))
    # left out, not overridden: Hydra refuses two values for one key
    kept = [param for param in expand_alias(params) if bare(param) not in typed]
    parser = OverridesParser.create(config_loader=sweeper.hydra_context.config_loader)
    return parser.parse_overrides([*kept, *arguments])


def bare(override: str) -> str:
    """Return what an override sets: ``+model@x=a`` sets ``model@x``."""
    return re.split(r"[=]", override.lstrip("+~"), maxsplit=1)[0]


def expand(overrides: list[Override]) -> tuple[list[list[str]], dict[str, list[str]]]:
    """Return the overrides of every combination in the order of a nested loop, and key -> values of
    what is swept.

    Raises ``SlimError`` for an interval, which has no end of values.
    """
    choices: dict[str, list[str]] = {}
    swept: dict[str, list[str]] = {}
    for override in overrides:
        key = override.get_key_element()
        if not override.is_sweep_override():
            choices[key] = [override.input_line]
            continue
        if not override.is_discrete_sweep():
            raise SlimError(
                f"{override.input_line} is no list of values. "
                f"Give some, such as {key}=1,2,3 or {key}=range(1,4)."
            )
        values = list(override.sweep_string_iterator())
        choices[key] = [f"{key}={value}" for value in values]
        if len(values) > 1:
            swept[key.lstrip("+")] = values
    return list(map(list, itertools.product(*choices.values()))), swept


def plan_point(sweeper: HydraSweeper, sweep: Sweep, number: int, overrides: list[str]) -> Planned:
    """Compose and plan one combination, without any work; what is wrong with it is kept.

    Args:
        sweeper: as Hydra has set it up.
        sweep: that the point belongs to.
        number: of the point.
        overrides: its settings as typed.
    """
    point = Planned(number, overrides)
    loader = sweeper.hydra_context.config_loader
    try:
        from slim.chain.build import plan_chains

        point.config = loader.load_sweep_config(sweep.config, overrides)
        point.name = point_name(plan_chains(point.config), point.config)
    except Exception as error:  # also slim's own: the other points are run all the same
        point.error = error
    return point


def refuse_at_once(sweep: Sweep, points: list[Planned]) -> None:
    """Refuse what is wrong with every point, before anything is recorded: it is a mistake in the
    command.

    Args:
        sweep: whose command it is.
        points: all of them, planned.

    Raises:
        SlimError: when no point can run, for one reason, or several have one output.
    """
    reasons = set()
    outputs = []
    for point in points:
        reason = None
        if point.error is not None:
            reason = explain(point.error, sweep.command, point.overrides)
        reasons.add(reason)
        if point.config is not None and point.config.output is not None:
            outputs.append(point.config.output)
    composed = any(point.config is not None for point in points)
    # None: a point that can run, or an error of slim's own, which is recorded with its traceback
    if not composed and len(reasons) == 1 and None not in reasons:
        raise SlimError(reasons.pop())
    if len(outputs) > len(set(outputs)):
        raise SlimError(
            f"output={outputs[0]} would take the result of several points. Leave it out, "
            "or name what is swept: output='small-${quantizer.bits}'."
        )


def show_plans(sweep: Sweep, points: list[Planned]) -> None:
    """Print the plan of every point.

    Args:
        sweep: that they belong to.
        points: all of them, planned.
    """
    from slim.chain.build import build_pipeline
    from slim.report.plan import show_plan

    for point in points:
        print(f"point {point.number}: {' '.join(point.overrides)}", flush=True)
        if point.error is not None:
            reason = explain(point.error, sweep.command, point.overrides)
            print(f"cannot run: {reason or repr(point.error)}")
            continue
        pipeline = build_pipeline(point.config)
        show_plan(pipeline, pipeline.plan(), point.config.tracking.uri)


def finalize(sweep: Sweep, planned: Planned) -> bool:
    """Record a point that needs no run: it cannot be run, or is finished.

    Args:
        sweep: that the point belongs to.
        planned: the point.

    Returns:
        Whether it needs none.
    """
    point = Point(sweep.folder, planned.number, planned.overrides, sweep.header())
    if planned.error is not None:

        def reason(error: BaseException) -> str | None:
            return explain(error, sweep.command, planned.overrides)

        message, own = describe(planned.error, reason, sweep.folder.point(planned.number))
        # what does not compose is recorded where the sweep's own configuration says
        config = sweep.config if planned.config is None else planned.config
        record_failure(point, config, message)
        point.end("FAILED", message, own=own)
        return True
    run_id = sweep.tracker.finished.get((planned.name, point.name))
    if run_id:
        point.final = sweep.tracker.final_record(run_id)
    if point.final is None:
        return False
    point.run_id = run_id
    point.end("FINISHED", reused=True)
    return True


def announce(total: int, wrong: int, done: int) -> None:
    """Say what there is to do.

    Args:
        total: number of points.
        wrong: how many of them cannot run.
        done: how many are finished already.
    """
    notes = []
    if done:
        notes.append(f"{done} done before")
    if wrong:
        notes.append(f"{wrong} cannot run")
    notes.append(f"{total - wrong - done} to run")
    say(", ".join(notes), head=f"Sweep of {total} point{'s' * (total != 1)}:")


def launch(sweeper: HydraSweeper, sweep: Sweep, points: list[Planned]) -> list[Any]:
    """Hand the points to Hydra's launcher, each under its own number.

    Args:
        sweeper: as Hydra has set it up.
        sweep: that the points belong to.
        points: those that are to run.
    """
    size = sweeper.max_batch_size or max(len(points), 1)
    returns = []
    for start in range(0, len(points), size):
        batch = points[start : start + size]
        numbered = []
        for point in batch:
            # under its own number: Hydra counts what it launches, and finished points are left out
            numbered.append([*point.overrides, f"hydra.sweep.subdir={point.number}"])
        try:
            returns.append(sweeper.launcher.launch(numbered, initial_job_idx=batch[0].number))
            # a launcher may return although one of its processes was killed
            record_lost(sweep, batch, RuntimeError("its process ended without a message"))
        except Exception as error:  # a process that died takes the launcher's other points with it
            sweep.lost = True
            record_lost(sweep, batch, error)
    return returns


def record_lost(sweep: Sweep, batch: list[Planned], error: Exception) -> None:
    """Record the points of a batch that have no record of how they ended, since the process that
    ran them did.

    Args:
        sweep: that the points belong to.
        batch: points that the launcher was given.
        error: why they have none.
    """
    ended = {record["number"] for record in sweep.folder.points()}
    for planned in batch:
        if planned.number not in ended:
            point = Point(sweep.folder, planned.number, planned.overrides, sweep.header())
            message, _ = describe(error, lambda _: None, sweep.folder.point(planned.number))
            record_failure(point, planned.config, message)
            point.end("FAILED", message, own=True)

"""One point of a search: what its plan foresees, and how good the checkpoint is that it ends in."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from slim.core.errors import SlimError, did_you_mean
from slim.search.metrics import DECODE
from slim.search.settings import Search, read_search

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from slim.models.spec import ModelSpec


def planned_model(config: DictConfig) -> ModelSpec:
    """Describe the model at the end of a configuration's chain, without a look at any weights."""
    from slim.chain.build import build_pipeline

    pipeline = build_pipeline(config)
    spec = pipeline.model.describe()
    for stage in pipeline.stages:
        stage.check(spec)
        spec = stage.output_spec(spec)
    return spec


def values(config: DictConfig, metrics: dict[str, float]) -> float | list[float]:
    """Return the objectives of a finished point as Hydra's sweepers take them: a number, or a list
    of several.

    Args:
        config: of the point, with its search.
        metrics: of its last checkpoint.
    """
    measured = []
    for name in read_search(config).objectives:
        # NaN, no error: the point is finished all the same, and who asked for a metric that was
        # not measured says what is wrong
        measured.append(float(metrics.get(name, math.nan)))
    if len(measured) == 1:
        return measured[0]
    return measured


def objectives(search: Search, metrics: dict[str, float]) -> dict[str, float]:
    """Return objective -> value.

    Args:
        search: names the objectives.
        metrics: of the point's last checkpoint.

    Raises:
        SlimError: when one was not measured, such as an unknown figure of a task.
    """
    measured = {}
    for name in search.objectives:
        if metrics.get(name) is None:
            raise SlimError(
                f"search.objectives={name}: no such figure was measured. "
                f"There are: {', '.join(sorted(metrics))}.{did_you_mean(name, metrics)}"
            )
        measured[name] = float(metrics[name])
    return measured


def judge(search: Search, metrics: dict[str, float], spec: ModelSpec) -> dict:
    """Judge the last checkpoint of a point.

    Args:
        search: what is looked for.
        metrics: of the checkpoint.
        spec: the model that the plan ends in.

    Returns:
        Plain JSON values: ``objectives`` (metric -> value), ``problem`` (why it is out of the
        contest, None if it is in it), ``memory_bytes`` (as the budget counts it, with the files
        of the weights as large as they are), ``tokens_per_second`` and ``parameters``.
    """
    measured = objectives(search, metrics)
    rate = metrics.get(DECODE)
    # measured, not planned: formats add scales and headers that a plan only estimates
    memory = search.budget.memory(metrics["bytes_on_disk"], spec)
    problem = search.budget.problem(memory, rate)
    for name, value in measured.items():
        # an infinite objective would be the end of every front, whatever the budget says
        if not math.isfinite(value):
            problem = f"{name} is not finite"
            break
    return {
        "objectives": measured,
        "problem": problem,
        "memory_bytes": memory,
        "tokens_per_second": rate,
        "parameters": metrics["parameters"],
    }

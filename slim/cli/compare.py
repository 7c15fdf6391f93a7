"""``evaluate.py`` on one checkpoint or on several."""

from __future__ import annotations

from omegaconf import DictConfig, ListConfig

from slim.chain.build import build_pipeline, one_by_one
from slim.checkpoints.result import Result
from slim.cli import execute as chain
from slim.core.errors import SlimError


def execute(config: DictConfig) -> list[Result]:
    """Measure one checkpoint, or all of ``model.source=[A,B,C]`` and compare them in one table.

    Args:
        config: as Hydra composes it.

    Raises:
        SlimError: when something is asked for that takes one checkpoint only.
    """
    if not isinstance(config.model.get("source"), ListConfig):
        return chain.execute(config)
    chain.quiet_libraries()
    if config.plan or config.output is not None:
        raise SlimError(
            "plan=true and output= take one checkpoint. "
            "Leave them out, or give model.source=FOLDER."
        )
    pipelines = list(map(build_pipeline, one_by_one(config)))
    for pipeline in pipelines:
        if pipeline.stages:
            raise SlimError(
                "Several checkpoints are measured as they are. "
                "Leave out pruner, tuner, teacher and quantizer."
            )
    # all plans come before the first measurement, since a plan finds mistakes
    plans = [pipeline.plan() for pipeline in pipelines]
    for pipeline, steps in zip(pipelines, plans, strict=True):
        problem = pipeline.text_problem(steps)
        if problem is not None:
            raise SlimError(problem)
    return chain.run_tracked(pipelines, plans, config)

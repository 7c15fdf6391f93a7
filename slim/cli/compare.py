"""``evaluate.py`` on one checkpoint or on several."""

from __future__ import annotations

from omegaconf import DictConfig, ListConfig

from slim.chain.build import one_by_one
from slim.checkpoints.result import Result
from slim.core.errors import SlimError


def execute(config: DictConfig) -> list[Result]:
    """Measure one checkpoint, or all of ``model.source=[A,B,C]`` and compare them in one table."""
    from slim.cli import execute as run

    if not isinstance(config.model.get("source"), ListConfig):
        return run.execute(config)
    run.quiet_libraries()
    if config.plan or config.output is not None:
        raise SlimError(
            "plan=true and output= take one checkpoint. Leave them out, or give model.source=FOLDER."
        )
    pipelines = [run.build_pipeline(single) for single in one_by_one(config)]
    if any(pipeline.stages for pipeline in pipelines):
        raise SlimError(
            "Several checkpoints are measured as they are. Leave out pruner, tuner, teacher and quantizer."
        )
    for pipeline in pipelines:
        pipeline.plan()
    return run.run_compared(pipelines, config)

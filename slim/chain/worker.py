"""What the processes other than zero do while process zero runs the chain."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from slim.chain.pipeline import Pipeline
from slim.checkpoints.stage import Context
from slim.core import console, processes


def run_worker(build: Callable[[], Pipeline]) -> None:
    """Take part in the stages that all processes run until process zero is done, without any
    output.

    Args:
        build: Makes the pipeline, as process zero has it.
    """
    pipeline = None
    for message in processes.broadcasts():
        console.be_quiet()
        pipeline = pipeline or build()
        stage = pipeline.stages[message["stage"]]
        stage.run(Path(message["source"]), None, Context(pipeline.device, Path(message["work"])))

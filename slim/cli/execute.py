"""What the three commands share: a configuration becomes a pipeline, runs, is tracked, and ends in
one table."""

from __future__ import annotations

import logging
import os
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from omegaconf import DictConfig, OmegaConf

from slim.chain.build import build_pipeline
from slim.chain.pipeline import Pipeline
from slim.chain.worker import run_worker
from slim.checkpoints.result import Result
from slim.checkpoints.store import reraise_full_disk
from slim.core import processes
from slim.core.console import results_console
from slim.core.errors import SlimError
from slim.core.io import atomic_path
from slim.report.plan import show_plan
from slim.sweeps import point as sweeps
from slim.sweeps.names import point_name, typed

if TYPE_CHECKING:
    from slim.tracking.tracker import Tracker


def execute(config: DictConfig) -> list[Result]:
    """Plan, check, run, track and report one configuration. Of several processes, process zero does
    so, and others help."""
    quiet_libraries()
    if not processes.is_main_process():
        run_worker(lambda: build_pipeline(config))
        return []
    with processes.main_process():
        return lead(config)


def lead(config: DictConfig) -> list[Result]:
    """Do what :func:`execute` does, in the process that writes."""
    pipeline = build_pipeline(config)
    output = check_output(config.output)
    steps = pipeline.plan()
    if config.plan:
        show_plan(pipeline, steps)
        return []
    pipeline.check_limits(steps)
    return run_tracked(pipeline, config, output)


def run_tracked(pipeline: Pipeline, config: DictConfig, output: Path | None) -> list[Result]:
    """Run the pipeline inside an MLflow run and print the table."""
    return _run([pipeline], config, output)


def run_compared(pipelines: list[Pipeline], config: DictConfig) -> list[Result]:
    """Measure the sources of several pipelines inside one MLflow run and print one table with the
    best in bold."""
    return _run(pipelines, config, None)


def _run(pipelines: list[Pipeline], config: DictConfig, output: Path | None) -> list[Result]:
    from slim.evaluation.compare import compare, name_apart
    from slim.report.card import write_card
    from slim.report.side_by_side import comparison_files
    from slim.report.table import json_table, markdown_table, samples_text

    pipeline, compared, point = pipelines[0], len(pipelines) > 1, sweeps.active()
    try:
        with start_tracker(pipelines, config) as tracker:
            resolved = OmegaConf.to_container(config, resolve=True)
            tracker.log_settings(resolved, OmegaConf.to_yaml(config, resolve=True), overrides())
            results = [result for each in pipelines for result in each.run(tracker)]
            name_apart(results)
            comparison = compare(results, pipeline.evaluation, pipeline.store, pipeline.device)
            files = {
                "results.md": markdown_table(results, compared),
                "results.json": json_table(results),
            }
            if results[0].quality.get("samples"):
                files["samples.md"] = samples_text(results)
            summary = {} if compared else results[-1].metrics
            if point is not None:
                files["final.json"] = point.keep(results[-1])
            tags = {"slim.folder": str(results[-1].checkpoint.folder)}
            tracker.log_summary(
                {**summary, **comparison.metrics()},
                {**files, **comparison_files(comparison, results)},
                tags,
            )
            if not compared:
                draw_chain(results, tracker)
                write_card(results, overrides(), script())
            if output is not None:
                copy_result(results[-1], output)
            if point is None:  # a sweep ends in one table over its points
                print_results(results, tracker, output, comparison, compared)
            if comparison.error is not None:
                raise comparison.error
    except OSError as error:
        reraise_full_disk(error, pipeline.store.root)
        raise
    return results


def draw_chain(results: list[Result], tracker: Tracker) -> None:
    """Put the picture of perplexity and tasks before and after every step beside the run."""
    from slim.report.chain_plot import plot_chain

    with TemporaryDirectory() as scratch:
        if plot_chain(Path(scratch) / "chain.png", results):
            tracker.log_files(Path(scratch))


def start_tracker(pipelines: list[Pipeline], config: DictConfig) -> Tracker:
    """Return the tracker of a run: by itself, or below that of the sweep it is a point of."""
    from slim.tracking.tracker import Tracker, published_tag

    point, settings = sweeps.active(), config.tracking
    if point is not None:
        return point.tracker(
            config, point_name([pipeline.plan() for pipeline in pipelines], config)
        )
    tags = published_tag(config)
    return Tracker(
        pipelines[0].store.root,
        settings.experiment,
        settings.run_name or run_name(),
        settings.uri,
        tags,
    )


def overrides() -> list[str]:
    """Return what was typed, or an empty list outside a Hydra job."""
    from hydra.core.hydra_config import HydraConfig

    return typed(HydraConfig.get()) if HydraConfig.initialized() else []


def script() -> str:
    """Return the file of the command that runs."""
    from hydra.core.hydra_config import HydraConfig

    return f"{HydraConfig.get().job.config_name if HydraConfig.initialized() else 'compress'}.py"


def run_name() -> str | None:
    """Name a run by what was typed."""
    return " ".join(overrides())[:200] or None


def print_results(
    results: list[Result], tracker, output: Path | None, comparison, compared: bool
) -> None:
    """Print the table, what it cannot show, where the final checkpoint is, and how to browse the
    runs."""
    from slim.report.side_by_side import differences_table, notes
    from slim.report.table import terminal_table

    out = results_console(220)
    out.print(terminal_table(results, compared))
    if compared and any(comparison.differences.values()):
        out.print(differences_table(comparison, results[0].label))
    for note in notes(results, comparison):
        out.print(note, highlight=False, markup=False, soft_wrap=True)
    if not compared:
        out.print(
            f"final checkpoint: {output or results[-1].checkpoint.folder}",
            highlight=False,
            soft_wrap=True,
        )
    out.print(f"browse the runs:  {tracker.ui_command}", highlight=False, soft_wrap=True)


def check_output(output: str | None) -> Path | None:
    """Return the folder to copy the result to. Raises ``SlimError`` if it exists, before any
    work."""
    if output is None:
        return None
    path = Path(output).expanduser().absolute()
    if path.exists():
        raise SlimError(
            f"output={output} exists already. Give a folder that does not, or remove it first."
        )
    return path


def copy_result(result: Result, output: Path) -> None:
    """Copy the final checkpoint, whole or not at all."""
    with atomic_path(output) as partial:
        shutil.copytree(result.checkpoint.folder, partial)


def quiet_libraries() -> None:
    """Keep the libraries' own bars and hints out of our output, unless the user asked for them."""
    for name, value in {
        "TOKENIZERS_PARALLELISM": "false",
        "TRANSFORMERS_VERBOSITY": "error",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "MLFLOW_DISABLE_TELEMETRY": "true",
    }.items():
        os.environ.setdefault(name, value)
    # its retries; the last failure is reported by us
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)

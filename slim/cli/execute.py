"""What the three commands share: a configuration becomes a pipeline, runs, is tracked, and ends in
one table."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from omegaconf import DictConfig, OmegaConf

from slim.chain.build import build_pipeline
from slim.chain.naming import NAME_LIMIT, chain_name
from slim.chain.pipeline import Pipeline
from slim.chain.worker import run_worker
from slim.checkpoints.result import Result, Step
from slim.checkpoints.store import reraise_full_disk
from slim.core import processes
from slim.core.console import show_labelled, show_line
from slim.core.errors import SlimError
from slim.core.io import atomic_path
from slim.core.settings import cache_name
from slim.core.tables import print_table
from slim.gguf.metadata import GGUF_FILE
from slim.gguf.sources import ENDING as GGUF_ENDING
from slim.report.plan import show_plan
from slim.sweeps import point as sweeps
from slim.sweeps.names import point_name, typed
from slim.tracking.connection import server_problem

if TYPE_CHECKING:
    from slim.evaluation.compare import Comparison
    from slim.tracking.tracker import Tracker


def execute(config: DictConfig) -> list[Result]:
    """Plan, check, run, track and report one configuration. Of several processes that torchrun
    started, process zero does so, and the others help with the stages that all run.

    Args:
        config: the composed configuration.

    Returns:
        The source and the result of every stage in order; nothing where only the plan was asked
        for, and in the other processes.

    Raises:
        SlimError: when something in the configuration cannot work; before any work.
    """
    quiet_libraries()
    if not processes.is_main_process():
        run_worker(lambda: build_pipeline(config))
        return []
    with processes.main_process():
        return run_chain(config)


def run_chain(config: DictConfig) -> list[Result]:
    """Do what :func:`execute` does, in the process that writes."""
    pipeline = build_pipeline(config)
    # before hours of work, at the end of which there would be no place for the result
    output = check_output(config.output)
    steps = pipeline.plan()
    if config.plan:
        show_plan(pipeline, steps, config.tracking.uri)
        return []
    check_output_file(output, steps[-1])
    pipeline.check_limits(steps)
    problem = pipeline.text_problem(steps)
    if problem is None and sweeps.active() is None:  # a sweep's points wait for their server
        problem = server_problem(config.tracking.uri)
    if problem is not None:
        raise SlimError(problem)
    return run_tracked([pipeline], [steps], config, output)


def run_tracked(
    pipelines: list[Pipeline],
    chains: list[list[Step]],
    config: DictConfig,
    output: Path | None = None,
) -> list[Result]:
    """Run chains inside one MLflow run: run, compare, record, print.

    Args:
        pipelines: one chain, or several sources that are measured and compared in one table.
        chains: their plans.
        config: the composed configuration.
        output: folder to copy the final checkpoint to, None for no copy.

    Returns:
        All checkpoints in order.
    """
    # local: these load torch, and a mistake is answered before
    from slim.evaluation.compare import compare, name_apart
    from slim.report.card import write_card

    first = pipelines[0]
    compared = len(pipelines) > 1
    try:
        with start_tracker(first.store.root, chains, config) as tracker:
            log_settings(tracker, config)
            results = []
            for pipeline in pipelines:
                # of several sources the first is what the others are compared with
                reference = results[0] if results else None
                results.extend(pipeline.run(tracker, reference))
            name_apart(results)
            comparison = compare(results, first.evaluation, first.store, first.device)
            record_results(tracker, results, comparison, compared)
            draw_classes(results, tracker)
            if not compared:
                draw_chain(results, tracker)
                write_card(results, overrides(), script())
            if output is not None:
                copy_result(results[-1], output)
            if sweeps.active() is None:  # a sweep ends in one table over its points
                print_results(results, tracker, output, comparison, compared)
            if comparison.error is not None:  # the table comes first: it is what was asked for
                raise comparison.error
    except OSError as error:
        reraise_full_disk(error, first.store.root)
        raise
    return results


def start_tracker(root: Path, chains: list[list[Step]], config: DictConfig) -> Tracker:
    """Return the tracker of a run: by itself, or below that of the sweep it is a point of.

    Args:
        root: the store.
        chains: the plans of what is run.
        config: the composed configuration.
    """
    from slim.tracking.tracker import Tracker, published_tag  # local: MLflow

    point = sweeps.active()
    if point is not None:
        return point.tracker(config, point_name(chains, config))
    settings = config.tracking
    name = settings.run_name or run_name(chains)
    return Tracker(root, settings.experiment, name, settings.uri, published_tag(config))


def run_name(chains: list[list[Step]]) -> str:
    """Name a run by its chain, or by the checkpoints that it compares."""
    return ", ".join(chain_name(steps) for steps in chains)[:NAME_LIMIT]


def log_settings(tracker: Tracker, config: DictConfig) -> None:
    """Record the resolved settings and what was typed.

    Args:
        tracker: of the run.
        config: the composed configuration.
    """
    resolved = OmegaConf.to_container(config, resolve=True)
    tracker.log_settings(resolved, OmegaConf.to_yaml(config, resolve=True), overrides())


def record_results(
    tracker: Tracker, results: list[Result], comparison: Comparison, compared: bool
) -> None:
    """Record tables, sample answers and metrics of the whole run.

    Args:
        tracker: of the run.
        results: all checkpoints in order.
        comparison: what was found between them.
        compared: whether they are checkpoints side by side instead of a chain.
    """
    from slim.report.side_by_side import comparison_files
    from slim.report.table import json_table, markdown_table, samples_text

    final = results[-1]
    files = {"results.md": markdown_table(results, compared), "results.json": json_table(results)}
    if results[0].quality.get("samples"):
        files["samples.md"] = samples_text(results)
    point = sweeps.active()
    if point is not None:
        files["final.json"] = point.keep(final)
    files.update(comparison_files(comparison, results))
    metrics = {}
    if not compared:  # several checkpoints side by side have no last one that speaks for the run
        metrics.update(final.metrics)
    metrics.update(comparison.metrics())
    tracker.log_summary(metrics, files, {"slim.folder": str(final.checkpoint.folder)})


def draw_chain(results: list[Result], tracker: Tracker) -> None:
    """Record the picture of perplexity and tasks before and after every step.

    Args:
        results: all checkpoints in order.
        tracker: of the run.
    """
    from slim.report.chain_plot import plot_chain  # local: matplotlib

    with TemporaryDirectory() as scratch:
        if plot_chain(Path(scratch) / "chain.png", results):
            tracker.log_files(Path(scratch))


def draw_classes(results: list[Result], tracker: Tracker) -> None:
    """Record the picture of what classifiers confuse and of what their confidence is worth.

    Args:
        results: all checkpoints in order.
        tracker: of the run.
    """
    if not any("classification" in result.quality.get("records", {}) for result in results):
        return
    from slim.report.classes import plot_classes  # local: matplotlib
    from slim.report.runs import CLASSES

    with TemporaryDirectory() as scratch:
        if plot_classes(Path(scratch) / CLASSES, results):
            tracker.log_files(Path(scratch))


def overrides() -> list[str]:
    """Return what was typed, or an empty list outside a Hydra job."""
    from hydra.core.hydra_config import HydraConfig

    if not HydraConfig.initialized():
        return []
    return typed(HydraConfig.get())


def script() -> str:
    """Return the file of the command that runs."""
    from hydra.core.hydra_config import HydraConfig

    if not HydraConfig.initialized():
        return "compress.py"
    return f"{HydraConfig.get().job.config_name}.py"


def print_results(
    results: list[Result],
    tracker: Tracker,
    output: Path | None,
    comparison: Comparison,
    compared: bool,
) -> None:
    """Print the table, what it cannot show, where the final checkpoint is, and how to browse the
    runs.

    Args:
        results: all checkpoints in order.
        tracker: of the run.
        output: where the final checkpoint was copied to, None for nowhere.
        comparison: what was found between the checkpoints.
        compared: whether they are checkpoints side by side instead of a chain.
    """
    from slim.report.side_by_side import differences_table, notes
    from slim.report.table import terminal_table

    print_table(terminal_table(results, compared))
    if compared and any(comparison.differences.values()):
        # against the first: it is the one whose answers the others are compared with
        print_table(differences_table(comparison, results[0].label))
    for note in notes(results, comparison):
        show_line(note)
    if not compared:
        show_labelled("final checkpoint", str(output or results[-1].checkpoint.folder))
    for label, text in tracker.browse_lines().items():
        show_labelled(label, text)


def check_output(output: str | None) -> Path | None:
    """Return the folder, or the GGUF file, to copy the result to.

    Raises:
        SlimError: when it exists; before any work.
    """
    if output is None:
        return None
    path = Path(output).expanduser().absolute()
    if path.exists():
        raise SlimError(
            f"output={output} exists already. Give a new folder, or remove this one first."
        )
    return path


def check_output_file(output: Path | None, last: Step) -> None:
    """Refuse ``output=NAME.gguf`` for a chain whose result has no GGUF file.

    Args:
        output: where to copy the result to, or None.
        last: the chain's last step.

    Raises:
        SlimError: before any work.
    """
    if output is None or output.suffix != GGUF_ENDING:
        return
    method = (last.spec.quantization or {}).get("quant_method")
    if method != "gguf" and cache_name(last.stage) != "Gguf":
        raise SlimError(
            f"output={output.name}: the result of this chain has no GGUF file. Use "
            "quant.format=gguf or quant=gguf, or give a folder."
        )


def copy_result(result: Result, output: Path) -> None:
    """Copy the final checkpoint, or its GGUF file where ``output`` is one, whole or not at all.

    Args:
        result: whose checkpoint it is.
        output: a folder or a file that does not exist yet.
    """
    with atomic_path(output) as partial:
        if output.suffix == GGUF_ENDING:
            shutil.copyfile(result.checkpoint.folder / GGUF_FILE, partial)
        else:
            shutil.copytree(result.checkpoint.folder, partial)


def quiet_libraries() -> None:
    """Keep the libraries' own bars and hints out of our output, unless the user asked for them."""
    for name, value in {
        "TOKENIZERS_PARALLELISM": "false",
        "TRANSFORMERS_VERBOSITY": "error",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_VERBOSITY": "error",  # its retries; the last failure is reported by us
        "MLFLOW_DISABLE_TELEMETRY": "true",
    }.items():
        os.environ.setdefault(name, value)  # what the user has set stays

"""What a chain will need besides its model, asked before work begins: texts to calibrate, train
and measure on, and the server that tracks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from typing import TYPE_CHECKING

from slim.checkpoints.result import Step
from slim.checkpoints.stage import Stage
from slim.core.errors import SlimError
from slim.data.calibration import Calibration
from slim.data.corpus import Corpus
from slim.data.ready import check_data, check_file, check_length, missing_dataset
from slim.data.text import Text
from slim.evaluation import task_files
from slim.evaluation.perplexity import Perplexity

if TYPE_CHECKING:
    from slim.evaluation.evaluation import Evaluation
    from slim.evaluation.tasks import Tasks

# what to type instead of a data set of the hub, by the setting that names it
FILES = {
    "calibration.text": "calibration.text=FILE.txt",
    "data.text": "data=text data.text=FILE.txt",
    "eval.perplexity.text": "eval.perplexity.text=FILE.txt",
    "eval.documents.text": "eval.documents.text=FILE.txt",
    "eval.tasks.names": "eval.local_data=FOLDER",
}
EMBEDDED = {"calibration": "calibration=tiny", "data": "data=tiny", "eval": "eval=quick"}


def text_problem(steps: list[Step], evaluation: Evaluation | None) -> str | None:
    """Say which texts of the stages still to run cannot be had.

    Args:
        steps: the plan.
        evaluation: how every checkpoint is measured, None where nothing has to be measured.

    Returns:
        Two lines with what to type instead; None if nothing is missing.
    """
    wanted: dict[str, list[str]] = {}  # data set -> settings that name it
    try:
        for name, setting in _datasets(steps, evaluation):
            wanted.setdefault(name, []).append(setting)
    except SlimError as error:  # of a local text
        return str(error)
    reasons, settings = {}, {}
    for name in wanted:
        reason = missing_dataset(name)
        if reason is not None:
            reasons.setdefault(reason, []).append(name)
            settings |= dict.fromkeys(wanted[name])
    if not reasons:
        return None
    problem = "; ".join(f"{', '.join(names)}, and {reason}" for reason, names in reasons.items())
    files = " ".join(FILES[setting] for setting in settings)
    embedded = dict.fromkeys(EMBEDDED[setting.split(".")[0]] for setting in settings)
    return (
        f"Data of the hub are needed: {problem}.\n"
        f"With your own: {files}   For a trial: {' '.join(embedded)}"
    )


def _datasets(steps: list[Step], evaluation: Evaluation | None) -> Iterator[tuple[str, str]]:
    """Yield each data set of the hub that is needed, and the setting that names it.

    Raises:
        SlimError: when a local text cannot be read.
    """
    context = min(step.spec.context_length for step in steps)
    for step in steps:
        if not isinstance(step.stage, Stage) or step.cached or not is_dataclass(step.stage):
            continue
        for field in fields(step.stage):
            yield from _dataset(getattr(step.stage, field.name), context)
    if evaluation is None:
        return
    yield from _dataset(evaluation.perplexity, context)
    yield from _dataset(evaluation.documents, context)
    if evaluation.tasks is not None:
        for name in _task_datasets(evaluation.tasks):
            yield name, "eval.tasks.names"


def _dataset(value: object, context: int) -> Iterator[tuple[str, str]]:
    """Yield what a setting reads from the hub; check what it reads here.

    Args:
        value: of the setting.
        context: tokens that the model has room for.
    """
    if isinstance(value, Corpus):
        check_data(value)
        if value.source(value.split).path is None:
            yield value.text, "data.text"
    elif isinstance(value, Text):
        check_file(value)
        if isinstance(value, Calibration):
            check_length(value, min(value.length, context))
        elif isinstance(value, Perplexity):
            check_length(value, min(value.window, context))
        if value.path is None:
            yield value.text, value.setting("text")


def _task_datasets(tasks: Tasks) -> Iterator[str]:
    """Yield the hub's data sets of stock tasks."""
    for name in tasks.names:
        path = task_files.find_task(name)
        if task_files.is_local(path) or tasks.local_files(path):
            continue
        dataset = task_files.read_plain(path).get("dataset_path")
        if isinstance(dataset, str):
            yield dataset

"""Which figures an evaluation gives, as far as its settings tell, and which way each is better."""

from __future__ import annotations

from typing import TYPE_CHECKING

from slim.core.errors import SlimError, did_you_mean
from slim.evaluation.protocol import PARTS
from slim.report.table import FIXED, SPEED

if TYPE_CHECKING:
    from slim.evaluation.evaluation import Evaluation

DECODE = "decode_tokens_per_second"
# facts of every checkpoint, whatever is measured
ALWAYS = ("bytes_on_disk", "parameters", "macs_per_token")
TIMES = (DECODE, "prefill_tokens_per_second", "time_to_first_token")
MEMORY = (
    "weights_bytes",
    "resident_bytes",
    "peak_bytes",
    "prefill_peak_bytes",
    "decode_peak_bytes",
    "cache_bytes_per_token",
)
ENERGY = ("energy_joules_per_token", "energy_joules_per_token_estimate")
SPREADS = ("_stderr", "_iqr")  # ends of the names of what is no objective
# what a task may measure that is better low
LOSSES = ("perplexity", "bits_per_byte", "brier_score")


def offered(evaluation: Evaluation | None) -> list[str]:
    """Return the metrics that every checkpoint will have; of a task its accuracy only, though it
    may give more."""
    if evaluation is None:
        return list(ALWAYS)
    answers, tasks, speed = evaluation.answers, task_names(evaluation), evaluation.speed
    parts = {
        PARTS["perplexity"]: evaluation.perplexity,
        PARTS["documents"]: evaluation.documents,
        PARTS["answers"]: answers and answers.similarity,
        PARTS["generation"]: evaluation.prompts or answers,
        ("tasks/acc", *(f"{task}/acc" for task in tasks)): tasks,
        (*TIMES, *MEMORY): speed,
        ENERGY: speed and evaluation.energy,
    }
    return [*ALWAYS, *(name for names, measured in parts.items() if measured for name in names)]


def task_names(evaluation: Evaluation) -> list[str]:
    """Return the names under which the figures of the tasks stand."""
    from slim.evaluation.task_files import find_task, is_local, task_name

    paths = {name: find_task(name) for name in (evaluation.tasks.names if evaluation.tasks else [])}
    return [task_name(path) if is_local(path) else name for name, path in paths.items()]


def require_metric(setting: str, metric: str, evaluation: Evaluation | None) -> None:
    """Raise ``SlimError`` where the evaluation will not give ``metric``. Of a task that is
    measured, any may be meant."""
    known, tasks = offered(evaluation), task_names(evaluation) if evaluation is not None else []
    of_a_task = any(metric.startswith(f"{task}/") for task in tasks)
    if (metric in known or of_a_task) and not metric.endswith(SPREADS):
        return
    raise SlimError(
        f"{setting}: no such figure will be measured. There will be: {', '.join(known)}.{did_you_mean(metric, known)}\n"
        "What is measured is chosen with eval (docs/evaluation.md)."
    )


def is_better_high(metric: str) -> bool:
    """Whether more of a metric is better: as its column in the table says; what tasks measure is,
    unless it is a loss."""
    stated = {column.metric: column.best for column in (*FIXED, *SPEED) if column.best is not None}
    if metric in stated:
        return stated[metric] == "high"
    of_a_task = "/" in metric and not any(loss in metric.rpartition("/")[2] for loss in LOSSES)
    return of_a_task or metric.endswith("_per_second")

"""Which metrics an evaluation gives, as far as its settings tell, and which way each is better."""

from __future__ import annotations

from typing import TYPE_CHECKING

from slim.core.errors import SlimError, did_you_mean
from slim.evaluation.encoder_speed import EncoderSpeed
from slim.evaluation.metrics import METRICS, SPREADS, metric_of
from slim.evaluation.speed import Speed

if TYPE_CHECKING:
    from slim.evaluation.evaluation import Evaluation

DECODE = "decode_tokens_per_second"


def offered(evaluation: Evaluation | None) -> list[str]:
    """Return the metrics that every checkpoint will have.

    Args:
        evaluation: what is measured; None: nothing.

    Returns:
        Names; of a task its accuracy only, though it may give more.
    """
    parts = measured_parts(evaluation)
    names = []
    for metric in METRICS:
        # what belongs to no part is known without measuring, such as the size
        if metric.part is None or metric.part in parts:
            names.append(metric.name)
    if "tasks" in parts:
        for task in task_names(evaluation):
            names.append(f"{task}/acc")
    return names


def measured_parts(evaluation: Evaluation | None) -> set[str]:
    """Return the parts of metrics (see :class:`slim.evaluation.metrics.Metric`) that an evaluation
    measures."""
    if evaluation is None:
        return set()
    answers = evaluation.answers
    speed = evaluation.speed
    # part -> settings that have it measured; what counts is whether there are any
    parts = {
        "perplexity": evaluation.perplexity,
        "documents": evaluation.documents,
        "answers": answers and answers.similarity,
        "generation": evaluation.prompts or answers,
        "tasks": task_names(evaluation),
        "speed": isinstance(speed, Speed),
        "encoding": isinstance(speed, EncoderSpeed),
        "max_length": isinstance(speed, Speed) and speed.max_length,
        "energy": speed and evaluation.energy,
        **evaluation.extra,
    }
    return {part for part, measured in parts.items() if measured}


def task_names(evaluation: Evaluation) -> list[str]:
    """Return the names of the tasks as they begin those of their metrics."""
    # imported here: it takes time that --help and mistakes do without
    from slim.evaluation.task_files import find_task, is_local, task_name

    if not evaluation.tasks:
        return []
    names = []
    for name in evaluation.tasks.names:
        path = find_task(name)
        if is_local(path):  # typed as the path of a file; its metrics begin with the name inside
            name = task_name(path)
        names.append(name)
    return names


def require_metric(setting: str, metric: str, evaluation: Evaluation | None) -> None:
    """Raise ``SlimError`` where the evaluation will not give a metric.

    Args:
        setting: what the user typed it for, for the message.
        metric: its name. Of a task that is measured, any may be meant.
        evaluation: what is measured; None: nothing.
    """
    known = offered(evaluation)
    # a task's accuracy is offered, its other metrics are known once it has run; how far a metric
    # spreads is no objective
    if (metric in known or _is_of_task(metric, evaluation)) and not metric.endswith(SPREADS):
        return
    raise SlimError(
        f"{setting}: no such figure will be measured. There will be: {', '.join(known)}."
        f"{did_you_mean(metric, known)}\n"
        "What is measured is chosen with eval (docs/evaluation.md)."
    )


def _is_of_task(metric: str, evaluation: Evaluation | None) -> bool:
    """Whether a metric is one of a task that is measured."""
    if evaluation is None:
        return False
    return any(metric.startswith(f"{task}/") for task in task_names(evaluation))


def is_better_high(metric: str) -> bool:
    """Whether more of a metric is better."""
    return metric_of(metric).better == "high"

r"""Differences between two checkpoints over the same questions, with the standard error that
pairing allows.

With d_i the difference on question i, mean d and standard error s / sqrt(n), s the deviation of the
d_i. Pairing takes out how hard a question is, which the errors of the two accuracies by themselves
contain twice. For perplexities d_i is the difference of the negative log-likelihoods of a window or
document and w_i its tokens, words or bytes, so that

    r = sum_i d_i / sum_i w_i
    se = sqrt(n / (n-1) sum_i (d_i - r w_i)^2) / sum_i w_i
    PPL_2 / PPL_1 = e^r

(the ratio estimator: Cochran, Sampling Techniques, ch. 6); shown is the relative change e^r - 1
with the error e^r se.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from slim.evaluation.metrics import METRICS, Metric
from slim.evaluation.protocol import protocol_key

if TYPE_CHECKING:
    from slim.checkpoints.result import Result

# what a task records of a question besides its metrics
NO_METRICS = {"doc_id", "doc_hash", "filter", "context", "choices", "scores", "target", "answer"}
LARGEST_EXPONENT = 700  # e to the power of more exceeds a float


@dataclass(frozen=True)
class Difference:
    """How a metric of one checkpoint differs from that of another.

    Attributes:
        metric: its name.
        value: the difference of a share, or the relative change of a perplexity.
        stderr: its standard error, NaN for a single pair.
        count: number of pairs.
        relative: whether the value is a relative change and not a difference.
    """

    metric: str
    value: float
    stderr: float
    count: int
    relative: bool = False

    def text(self) -> str:
        """Show it in per cent, or in points of a hundred for a share."""
        if math.isnan(self.value):
            return "NaN"
        unit = " %" if self.relative else ""
        return f"{100 * self.value:+.1f} ± {100 * self.stderr:.1f}{unit}"


def paired(differences: list[float], weights: list[float] | None = None) -> tuple[float, float]:
    """Return the (weighted) mean of differences and its standard error.

    Args:
        differences: one per pair.
        weights: what each difference is the sum over, such as the words of a document; None: one.

    Returns:
        sum of differences / sum of weights, and its standard error: NaN for a single pair.
    """
    weights = weights or [1.0] * len(differences)
    count, total = len(differences), sum(weights)
    # the ratio of the sums: every word counts the same, however long its document is
    ratio = sum(differences) / total
    if count < 2:
        return ratio, math.nan
    # of the residuals: what the common ratio does not explain
    squares = sum((d - ratio * w) ** 2 for d, w in zip(differences, weights, strict=True))
    return ratio, math.sqrt(count / (count - 1) * squares) / total


def perplexity_records(metric: Metric, records: dict) -> tuple[list[float], list[float] | None]:
    """Return what a perplexity is computed from.

    Args:
        metric: a registered perplexity.
        records: what was measured question by question, by part of the evaluation.

    Returns:
        The negative log-likelihood of every window or document, empty where there is none, and
        what each is divided by (None: nothing).
    """
    rows = records.get(metric.part)
    if not metric.is_perplexity or not rows:
        return [], None
    if not metric.per:
        return rows["nll"], None
    return rows["nll"], rows[metric.per]


def differences(first: Result, second: Result) -> dict[str, Difference]:
    """Compare two checkpoints, pair by pair.

    Args:
        first: the one that is compared with.
        second: the other one.

    Returns:
        Metric -> how ``second`` differs from ``first``, for what both were measured on by the same
        protocol and question by question.
    """
    before = first.quality.get("records", {})
    after = second.quality.get("records", {})
    measured = [
        *_of_perplexities(before, after),
        *_of_tasks(before.get("tasks", {}), after.get("tasks", {})),
        *_of_answers(before, after),
        *_of_classes(before, after),
    ]
    comparable = {}
    for difference in measured:
        name = difference.metric
        if protocol_key(first, name) == protocol_key(second, name):
            comparable[name] = difference
    return comparable


def _of_perplexities(before: dict, after: dict) -> list[Difference]:
    changes = []
    for metric in METRICS:
        old, weights = perplexity_records(metric, before)
        new, _ = perplexity_records(metric, after)
        # other windows or documents make no pairs; the protocols say whether they are the same
        if not old or len(old) != len(new):
            continue
        ratio, error = paired(_minus(new, old), weights)
        factor = math.inf
        if ratio < LARGEST_EXPONENT:
            factor = math.exp(ratio)
        changes.append(Difference(metric.name, factor - 1, factor * error, len(old), relative=True))
    return changes


def _of_tasks(before: dict, after: dict) -> list[Difference]:
    changes = []
    for task in before.keys() & after.keys():
        old, new = before[task], after[task]
        # other questions, or the same in another order, make no pairs
        if not old or _column(old, "doc_hash") != _column(new, "doc_hash"):
            continue
        for name, example in old[0].items():
            if name in NO_METRICS or not isinstance(example, (int, float)):
                continue
            value, error = paired(_minus(_column(new, name), _column(old, name)))
            changes.append(Difference(f"{task}/{name}", value, error, len(old)))
    return changes


def _column(rows: list[dict], name: str) -> list:
    return [row[name] for row in rows]


def _minus(after: list[float], before: list[float]) -> list[float]:
    return [new - old for old, new in zip(before, after, strict=True)]


def similarity_gaps(before: dict, after: dict) -> list[float]:
    """Compare the answers of two checkpoints with their references.

    Args:
        before: records of the first checkpoint, by part of the evaluation.
        after: those of the second one.

    Returns:
        By how much each answer in ``after`` is nearer to its reference than that in ``before``.
        Empty where similarity was not measured in both, or on another number of questions.
    """
    old, new = before.get("answers", []), after.get("answers", [])
    if not old or len(old) != len(new):
        return []
    if "similarity" not in old[0] or "similarity" not in new[0]:
        return []
    return _minus(_column(new, "similarity"), _column(old, "similarity"))


def _of_answers(before: dict, after: dict) -> list[Difference]:
    gaps = similarity_gaps(before, after)
    if not gaps:
        return []
    value, error = paired(gaps)
    return [Difference("similarity/mean", value, error, len(gaps))]


def _of_classes(before: dict, after: dict) -> list[Difference]:
    """Compare the accuracy of two classifiers, text by text."""
    old, new = before.get("classification"), after.get("classification")
    # other texts make no pairs
    if not old or not new or old["class"] != new["class"]:
        return []
    value, error = paired(_minus(new["correct"], old["correct"]))
    return [Difference("accuracy", value, error, len(old["correct"]))]

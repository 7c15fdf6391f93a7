r"""Differences between two checkpoints over the same questions, with the standard error that pairing allows.

With d_i the difference on question i, mean d and standard error s / sqrt(n), s the deviation of the d_i. Pairing takes out how
hard a question is, which the errors of the two accuracies by themselves contain twice. For perplexities d_i is the difference
of the negative log-likelihoods of a window or document and w_i its tokens, words or bytes, so that

    r = sum_i d_i / sum_i w_i     se = sqrt(n / (n-1) sum_i (d_i - r w_i)^2) / sum_i w_i     PPL_2 / PPL_1 = e^r

(the ratio estimator: Cochran, Sampling Techniques, ch. 6); shown is the relative change e^r - 1 with the error e^r se.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from slim.evaluation.protocol import protocol_key

if TYPE_CHECKING:
    from slim.checkpoints.result import Result

NO_FIGURES = {"doc_id", "doc_hash", "filter", "context", "choices", "scores", "target", "answer"}


@dataclass(frozen=True)
class Difference:
    """How a figure of one checkpoint differs from that of another: ``value`` with ``stderr``, over
    ``count`` pairs.

    relative: the value is a relative change (of a perplexity) and not a difference (of a share).
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
        return f"{100 * self.value:+.1f} ± {100 * self.stderr:.1f}" + (
            " %" if self.relative else ""
        )


def paired(differences: list[float], weights: list[float] | None = None) -> tuple[float, float]:
    """Return the (weighted) mean of differences and its standard error; NaN for the error of a
    single pair."""
    weights = weights or [1.0] * len(differences)
    count, total = len(differences), sum(weights)
    ratio = sum(differences) / total
    if count < 2:
        return ratio, math.nan
    squares = sum((d - ratio * w) ** 2 for d, w in zip(differences, weights, strict=True))
    return ratio, math.sqrt(count / (count - 1) * squares) / total


def differences(first: Result, second: Result) -> dict[str, Difference]:
    """Return metric -> how ``second`` differs from ``first``, for figures of the same protocol with
    records of both."""
    one, two = first.quality.get("records", {}), second.quality.get("records", {})
    found = [
        *_of_perplexities(one, two),
        *_of_tasks(one.get("tasks", {}), two.get("tasks", {})),
        *_of_answers(one, two),
    ]
    same = {
        d.metric: protocol_key(first, d.metric) == protocol_key(second, d.metric) for d in found
    }
    return {difference.metric: difference for difference in found if same[difference.metric]}


def _of_perplexities(one: dict, two: dict) -> list[Difference]:
    found = []
    if "perplexity" in one and "perplexity" in two:
        found.append(
            _relative("perplexity", one["perplexity"]["nll"], two["perplexity"]["nll"], None)
        )
    if "documents" in one and "documents" in two:
        for metric, unit in (("word_perplexity", "words"), ("byte_perplexity", "bytes")):
            found.append(
                _relative(
                    metric, one["documents"]["nll"], two["documents"]["nll"], one["documents"][unit]
                )
            )
    return [difference for difference in found if difference is not None]


def _relative(
    metric: str, one: list[float], two: list[float], weights: list[float] | None
) -> Difference | None:
    if len(one) != len(two):
        return None
    ratio, error = paired([b - a for a, b in zip(one, two, strict=True)], weights)
    factor = math.exp(ratio) if ratio < 700 else math.inf
    return Difference(metric, factor - 1, factor * error, len(one), relative=True)


def _of_tasks(one: dict, two: dict) -> list[Difference]:
    found = []
    for task in one.keys() & two.keys():
        rows, others = one[task], two[task]
        if [row["doc_hash"] for row in rows] != [row["doc_hash"] for row in others] or not rows:
            continue
        names = [
            name
            for name in rows[0]
            if name not in NO_FIGURES and isinstance(rows[0][name], (int, float))
        ]
        for name in names:
            value, error = paired([b[name] - a[name] for a, b in zip(rows, others, strict=True)])
            found.append(Difference(f"{task}/{name}", value, error, len(rows)))
    return found


def similarity_gaps(one: dict, two: dict) -> list[float]:
    """Return by how much each answer in the records ``two`` is nearer to its reference than that in
    ``one``.

    Empty where similarity was not measured in both, or on another number of questions.
    """
    rows, others = one.get("answers", []), two.get("answers", [])
    if (
        not rows
        or len(rows) != len(others)
        or "similarity" not in rows[0]
        or "similarity" not in others[0]
    ):
        return []
    return [b["similarity"] - a["similarity"] for a, b in zip(rows, others, strict=True)]


def _of_answers(one: dict, two: dict) -> list[Difference]:
    gaps = similarity_gaps(one, two)
    return [Difference("similarity/mean", *paired(gaps), len(gaps))] if gaps else []

"""Several checkpoints side by side: differences to the first, answers, a judge's verdicts;
``evaluate.py`` on a list."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING

from slim.checkpoints.store import digest
from slim.core.errors import SlimError
from slim.evaluation.differences import Difference, differences, similarity_gaps
from slim.evaluation.verdicts import Verdicts

if TYPE_CHECKING:
    from slim.checkpoints.result import Result
    from slim.checkpoints.store import Store
    from slim.evaluation.evaluation import Evaluation

SIMILAR = 0.01  # cosine similarities that differ by less are a tie


@dataclass
class Comparison:
    """How every checkpoint but the first differs from the first; ``error`` is what ended a judge
    early.

    differences: per label, metric -> difference. judged: per label, a row per question. similar:
    per label, how often it is nearer to the reference than the first one, a tie, and further."""

    differences: dict[str, dict[str, Difference]] = field(default_factory=dict)
    judged: dict[str, list[dict]] = field(default_factory=dict)
    similar: dict[str, dict[str, int]] = field(default_factory=dict)
    error: SlimError | None = None

    def metrics(self) -> dict[str, float]:
        """Return the judge's and the similarity's counts as metrics for the tracker."""
        counts = {}
        for label, rows in self.judged.items():
            counts |= _named_counts("judge", label, tally(rows))
        for label, count in self.similar.items():
            counts |= _named_counts("similar", label, count)
        return counts


def _named_counts(kind: str, label: str, count: dict[str, int]) -> dict[str, float]:
    clean = re.sub(r"[^\w\-. ]", "_", label)  # what MLflow takes in a metric's name
    return {f"{kind}/{clean}/{name}": float(value) for name, value in count.items()}


def compare(
    results: list[Result], evaluation: Evaluation | None, store: Store, device: str
) -> Comparison:
    """Compare every checkpoint with the first. A judge that fails ends nothing: its error is in
    ``error``."""
    comparison = Comparison()
    for result in results[1:]:
        comparison.differences[result.label] = differences(results[0], result)
        count = similarity_wins(results[0], result)
        if count:
            comparison.similar[result.label] = count
    if getattr(evaluation, "judge", None) is not None and len(results) > 1:
        try:
            _judge(comparison, results, evaluation, store, device)
        except SlimError as error:
            comparison.error = error
    return comparison


def _judge(
    comparison: Comparison, results: list[Result], evaluation: Evaluation, store: Store, device: str
) -> None:
    judge = evaluation.judge
    client = judge.client(device)
    path = store.root / "verdicts" / f"{digest(judge.cache_key())}.jsonl"
    with store.lock(path):
        verdicts = Verdicts(path)
        answers = [result.quality["records"]["answers"] for result in results]
        for result, other in zip(results[1:], answers[1:], strict=True):
            comparison.judged[result.label] = judge.compare(answers[0], other, verdicts, client)


def tally(rows: list[dict]) -> dict[str, int]:
    """Count a judge's rows: ``wins`` of the other checkpoint over the first, ``ties``, ``losses``,
    ``unread``."""
    count = Counter(row["winner"] for row in rows)
    return {
        "wins": count["other"],
        "ties": count["tie"],
        "losses": count["one"],
        "unread": count[None],
    }


def similarity_wins(first: Result, second: Result) -> dict[str, int]:
    """Count on how many questions ``second`` is nearer to the reference than ``first``; empty where
    none was compared."""
    gaps = similarity_gaps(*(result.quality.get("records", {}) for result in (first, second)))
    if not gaps:
        return {}
    wins, losses = sum(gap > SIMILAR for gap in gaps), sum(gap < -SIMILAR for gap in gaps)
    return {"wins": wins, "ties": len(gaps) - wins - losses, "losses": losses}


def name_apart(results: list[Result]) -> None:
    """Give checkpoints with the same folder name labels that differ, by their parents' names, else
    by numbers."""
    for _, group in _same_label(results):
        folders = [result.checkpoint.folder.resolve() for result in group]
        parents = [f"{folder.parent.name}/{folder.name}" for folder in folders]
        apart = len(set(parents)) == len(parents)
        for number, (result, parent) in enumerate(zip(group, parents, strict=True), 1):
            result.label = parent if apart else f"{result.label} ({number})"


def _same_label(results: list[Result]) -> list[tuple[str, list[Result]]]:
    ordered = sorted(results, key=lambda result: result.label)
    twice = {first.label for first, second in pairwise(ordered) if first.label == second.label}
    return [
        (label, [result for result in results if result.label == label]) for label in sorted(twice)
    ]

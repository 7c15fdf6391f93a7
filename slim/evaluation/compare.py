"""Several checkpoints side by side: differences to the first, answers, a judge's verdicts;
``evaluate.py`` on a list."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from slim.checkpoints.store import digest
from slim.core.errors import SlimError
from slim.core.replies import Replies
from slim.evaluation.differences import Difference, differences, similarity_gaps

if TYPE_CHECKING:
    from slim.checkpoints.result import Result
    from slim.checkpoints.store import Store
    from slim.evaluation.evaluation import Evaluation

SIMILAR = 0.01  # cosine similarities that differ by less are a tie


@dataclass
class Comparison:
    """How every checkpoint but the first differs from the first.

    Attributes:
        differences: label -> metric -> difference.
        judged: label -> a row per question, as :meth:`slim.evaluation.judge.Judge.compare` returns
            them.
        similar: label -> ``wins``, ``ties`` and ``losses``: on how many questions it is nearer to
            the reference than the first one, as near, and farther.
        error: what ended a judge early; None if nothing did.
    """

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
    counts = {}
    for name, value in count.items():
        counts[f"{kind}/{clean}/{name}"] = float(value)
    return counts


def compare(
    results: list[Result], evaluation: Evaluation | None, store: Store, device: str
) -> Comparison:
    """Compare every checkpoint with the first.

    Args:
        results: the checkpoints with what was measured; their labels differ.
        evaluation: whose judge is asked; None, or one without a judge, asks nobody.
        store: keeps the verdicts, below ``verdicts/``.
        device: ``"cpu"`` or ``"cuda"``: where a judge that is a checkpoint folder runs.

    Returns:
        The differences. A judge that fails ends nothing: its error is in ``error``.
    """
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
    first = _answers(results[0])
    # two runs with the same judge would ask the same questions twice
    with store.lock(path):
        verdicts = Replies(path, "verdicts")
        for result in results[1:]:
            rows = judge.compare(first, _answers(result), verdicts, client)
            comparison.judged[result.label] = rows


def _answers(result: Result) -> list[dict]:
    return result.quality["records"]["answers"]


def tally(rows: list[dict]) -> dict[str, int]:
    """Count a judge's verdicts.

    Args:
        rows: as :meth:`slim.evaluation.judge.Judge.compare` returns them.

    Returns:
        ``wins`` of the other checkpoint over the first, ``ties``, ``losses``, and ``unread``:
        questions without a verdict that could be read.
    """
    count = Counter(row["winner"] for row in rows)
    return {
        "wins": count["other"],
        "ties": count["tie"],
        "losses": count["one"],
        "unread": count[None],
    }


def similarity_wins(first: Result, second: Result) -> dict[str, int]:
    """Count which of two checkpoints is nearer to the reference, question by question.

    Args:
        first: the one that is compared with.
        second: the other one.

    Returns:
        ``wins`` of ``second``, ``ties`` and ``losses``; empty where no answer was compared with a
        reference.
    """
    before = first.quality.get("records", {})
    after = second.quality.get("records", {})
    gaps = similarity_gaps(before, after)
    if not gaps:
        return {}
    counts = {"wins": 0, "ties": 0, "losses": 0}
    for gap in gaps:
        if gap > SIMILAR:
            counts["wins"] += 1
        elif gap < -SIMILAR:
            counts["losses"] += 1
        else:
            counts["ties"] += 1
    return counts


def name_apart(results: list[Result]) -> None:
    """Give checkpoints with the same folder name labels that differ, by their parents' names, else
    by numbers."""
    by_label: dict[str, list[Result]] = {}
    for result in results:
        by_label.setdefault(result.label, []).append(result)
    for same in by_label.values():
        if len(same) > 1:
            _rename(same)


def _rename(results: list[Result]) -> None:
    """Give checkpoints that share a label one each."""
    labels = []
    for result in results:
        folder = result.checkpoint.folder.resolve()
        labels.append(f"{folder.parent.name}/{folder.name}")
    # where the parents share their names as well, nothing short tells the folders apart
    if len(set(labels)) < len(labels):
        labels = [f"{result.label} ({number})" for number, result in enumerate(results, 1)]
    for result, label in zip(results, labels, strict=True):
        result.label = label

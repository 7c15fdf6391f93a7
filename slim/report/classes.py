"""Pictures of a classifier: which classes it takes for which, and what its confidence is worth."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

from slim.core.figures import KEPT, REMOVED, new_figure, save_figure
from slim.evaluation.classification import calibration_bins

if TYPE_CHECKING:
    from slim.checkpoints.result import Result

MOST_SHOWN = 20  # classes of a confusion matrix, the most frequent ones


def plot_classes(path: Path, results: list[Result]) -> bool:
    """Draw confusion matrix and calibration curve of every checkpoint, a row each.

    Args:
        path: The picture.
        results: The checkpoints.

    Returns:
        Whether there was anything to draw.
    """
    measured = []
    for result in results:
        records = (result.quality or {}).get("records", {}).get("classification")
        if records:
            measured.append((result.label, records))
    if not measured:
        return False
    figure = new_figure(9.0, 3.8 * len(measured))
    rows = figure.subplots(len(measured), 2, squeeze=False)
    for (label, records), (left, right) in zip(measured, rows, strict=True):
        draw_confusion(left, records, label)
        draw_calibration(right, records)
    save_figure(figure, path)
    return True


def confusion(records: dict) -> tuple[list[str], list[list[int]]]:
    """Return the classes, the most frequent ones of many, and how many texts of each (row) were
    taken for each (column).

    Args:
        records: ``class`` and ``predicted`` of every text.
    """
    counts = Counter(records["class"])
    frequent = {name for name, _ in counts.most_common(MOST_SHOWN)}
    names = sorted(frequent | {name for name in records["predicted"] if len(counts) <= MOST_SHOWN})
    pairs = Counter(zip(records["class"], records["predicted"], strict=True))
    matrix = []
    for true in names:
        matrix.append([pairs[true, guess] for guess in names])
    return names, matrix


def draw_confusion(axes, records: dict, title: str) -> None:
    """Draw a confusion matrix: shares of each class, and the numbers of texts.

    Args:
        axes: Of matplotlib.
        records: ``class`` and ``predicted`` of every text.
        title: Above it.
    """
    names, matrix = confusion(records)
    shares = []
    for row in matrix:
        total = max(1, sum(row))
        shares.append([count / total for count in row])
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    for y, row in enumerate(matrix):
        for x, count in enumerate(row):
            colour = "white" if shares[y][x] > 0.5 else "black"
            axes.text(x, y, str(count), ha="center", va="center", color=colour, fontsize="small")
    axes.set_xticks(range(len(names)), names, rotation=45 if len(names) > 4 else 0)
    axes.set_yticks(range(len(names)), names)
    axes.set(xlabel="predicted", ylabel="class", title=title)


def draw_calibration(axes, records: dict) -> None:
    """Draw accuracy over confidence, bin by bin; on the diagonal the confidence is right.

    Args:
        axes: Of matplotlib.
        records: ``confidence`` and ``correct`` of every text.
    """
    bins = calibration_bins(records["confidence"], records["correct"])
    most = max(count for count, _, _ in bins)
    confidences = [mean for _, mean, _ in bins]
    shares = [share for _, _, share in bins]
    sizes = [20 + 180 * count / most for count, _, _ in bins]
    axes.plot([0, 1], [0, 1], "--", color="grey", linewidth=1)
    axes.plot(confidences, shares, color=KEPT, linewidth=1)
    axes.scatter(confidences, shares, sizes, color=REMOVED, zorder=3)
    axes.set(xlim=(0, 1.02), ylim=(0, 1.02), xlabel="confidence", ylabel="accuracy")
    axes.set_title("calibration; area: texts")

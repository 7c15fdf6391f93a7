"""What weight pruning leaves for people: a table of the layers and a picture of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from slim.checkpoints.checkpoint import REPORT
from slim.core.figures import new_figure, save_figure

if TYPE_CHECKING:
    from slim.calibration.errors import LayerError


def write_report(
    target: Path, criterion: str, wanted: float, zeros: list[dict], errors: list[LayerError]
) -> None:
    """Write ``layer_sparsity.json`` and ``layer_sparsity.png``.

    Args:
        target: the result's folder.
        criterion: name of the method.
        wanted: share of weights that were to become zero.
        zeros: ``zeros`` and ``weights`` of every layer.
        errors: its relative output error, in the same order.
    """
    table = []
    for layer, error in zip(zeros, errors, strict=True):
        table.append(
            {
                "block": error.block,
                "layer": error.layer,
                "sparsity": layer["zeros"] / layer["weights"],
                "error": error.error,
            }
        )
    folder = target / REPORT
    folder.mkdir(exist_ok=True)
    (folder / "layer_sparsity.json").write_text(
        json.dumps(table, indent=1) + "\n", encoding="utf-8"
    )
    plot_layers(
        folder / "layer_sparsity.png", table, f"{criterion}: {wanted:.0%} of the weights are zero"
    )


def plot_layers(path: Path, table: list[dict], title: str) -> None:
    """Draw sparsity and output error of every layer over the blocks.

    Args:
        path: of the picture.
        table: ``block``, ``layer``, ``sparsity`` and ``error`` of every layer.
        title: above it.
    """
    figure = new_figure(11.0, 4.0)
    left, right = figure.subplots(1, 2)
    for axes, key, label in (
        (left, "sparsity", "share of zeros"),
        (right, "error", "relative output error"),
    ):
        _draw_lines(axes, table, key)
        axes.set(xlabel="block", ylabel=label)
        axes.set_ylim(bottom=0)
        axes.xaxis.get_major_locator().set_params(integer=True)
    figure.axes[1].legend(fontsize="x-small", frameon=False)
    figure.suptitle(title, fontsize="medium")
    save_figure(figure, path)


def _draw_lines(axes, table: list[dict], key: str) -> None:
    """Draw a column of the table over the blocks, a line per kind of layer."""
    for layer in dict.fromkeys(row["layer"] for row in table):
        rows = [row for row in table if row["layer"] == layer]
        blocks = [row["block"] for row in rows]
        values = [row[key] for row in rows]
        axes.plot(blocks, values, "o-", markersize=3, label=layer)

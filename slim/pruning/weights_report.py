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
    """Write ``layer_sparsity.json`` and ``layer_sparsity.png`` below ``target``.

    zeros: ``zeros`` and ``weights`` of every layer. errors: its relative output error, in the same
    order."""
    table = [
        {
            "block": item.block,
            "layer": item.layer,
            "sparsity": row["zeros"] / row["weights"],
            "error": item.error,
        }
        for row, item in zip(zeros, errors, strict=True)
    ]
    folder = target / REPORT
    folder.mkdir(exist_ok=True)
    (folder / "layer_sparsity.json").write_text(
        json.dumps(table, indent=1) + "\n", encoding="utf-8"
    )
    plot_layers(
        folder / "layer_sparsity.png", table, f"{criterion}: {wanted:.0%} of the weights are zero"
    )


def plot_layers(path: Path, table: list[dict], title: str) -> None:
    """Draw sparsity and output error of every layer over the blocks."""
    figure = new_figure(11.0, 4.0)
    layers = list(dict.fromkeys(row["layer"] for row in table))
    for axes, key, label in zip(
        figure.subplots(1, 2),
        ("sparsity", "error"),
        ("share of zeros", "relative output error"),
        strict=True,
    ):
        for layer in layers:
            rows = [row for row in table if row["layer"] == layer]
            axes.plot(
                [row["block"] for row in rows],
                [row[key] for row in rows],
                "o-",
                markersize=3,
                label=layer,
            )
        axes.set(xlabel="block", ylabel=label)
        axes.set_ylim(bottom=0)
        axes.xaxis.get_major_locator().set_params(integer=True)
    figure.axes[1].legend(fontsize="x-small", frameon=False)
    figure.suptitle(title, fontsize="medium")
    save_figure(figure, path)

"""The pictures of a quantisation: how much every layer's output changed, and which layers got how
many bits."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from slim.core.figures import new_figure, save_figure

if TYPE_CHECKING:
    from slim.calibration.errors import LayerError
    from slim.models.spec import ModelSpec


def plot_layer_errors(path: Path, errors: Sequence[LayerError]) -> None:
    """Draw one line per kind of layer over the blocks into ``path``."""
    figure = new_figure(7.5, 4.0)
    axes = figure.subplots()
    for layer in dict.fromkeys(item.layer for item in errors):
        own = [item for item in errors if item.layer == layer]
        axes.plot(
            [item.block for item in own],
            [item.error for item in own],
            marker="o",
            markersize=3,
            label=layer,
        )
    axes.set(xlabel="block", ylabel="relative output error", title="error per layer")
    axes.set_ylim(bottom=0)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.legend(fontsize="small", frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    save_figure(figure, path)


def write_allocation(
    folder: Path,
    spec: ModelSpec,
    errors: Mapping[str, Mapping[int, float]],
    bits: Mapping[str, int],
) -> None:
    """Write ``bits.json`` and ``bits.png`` into ``folder``: chosen bits and predicted errors of
    every layer.

    errors: full layer name -> bits -> share of its output that rounding to them changes. bits:
    layer -> chosen bits."""
    folder.mkdir(exist_ok=True)
    table = [
        {
            "layer": name,
            "bits": bits[name],
            "predicted_errors": {str(width): error for width, error in found.items()},
        }
        for name, found in errors.items()
    ]
    (folder / "bits.json").write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
    layers = list(spec.block_linears())
    grid = [
        [bits[f"{spec.family.blocks}.{block}.{layer}"] for block in range(spec.blocks)]
        for layer in layers
    ]
    figure = new_figure(max(6.0, 3.0 + 0.3 * spec.blocks), 0.4 * len(layers) + 1.6)
    axes = figure.subplots()
    axes.imshow(grid, aspect="auto", cmap="viridis", vmin=2, vmax=8)
    for row, widths in enumerate(grid):
        for block, width in enumerate(widths):
            axes.text(
                block,
                row,
                str(width),
                ha="center",
                va="center",
                color="white" if width < 6 else "black",
                fontsize=8,
            )
    axes.set(xlabel="block", title="bits per weight")
    axes.set_yticks(range(len(layers)), layers)
    axes.xaxis.get_major_locator().set_params(integer=True)
    save_figure(figure, folder / "bits.png")

"""The picture of a quantisation: how much every layer's output changed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from slim.plots import new_figure, save_figure

if TYPE_CHECKING:
    from slim.blockwise import LayerError


def plot_layer_errors(path: Path, errors: Sequence[LayerError]) -> None:
    """Draw one line per kind of layer over the blocks into ``path``."""
    figure = new_figure(7.5, 4.0)
    axes = figure.subplots()
    for layer in dict.fromkeys(item.layer for item in errors):
        own = [item for item in errors if item.layer == layer]
        axes.plot([item.block for item in own], [item.error for item in own], marker="o", markersize=3, label=layer)
    axes.set(xlabel="block", ylabel="relative output error", title="error per layer")
    axes.set_ylim(bottom=0)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.legend(fontsize="small", frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    save_figure(figure, path)

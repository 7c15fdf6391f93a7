"""Pictures of a quantization: how much each layer's output changed, and which got how many bits."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from slim.core.figures import new_figure, save_figure

if TYPE_CHECKING:
    from slim.calibration.errors import LayerError
    from slim.models.spec import ModelSpec


def write_layer_errors(folder: Path, errors: Sequence[LayerError]) -> dict[str, float]:
    """Write ``layer_errors.json`` and ``layer_errors.png``.

    Args:
        folder: where they go; it is made if it is not there.
        errors: of all layers.

    Returns:
        ``layer_error_mean`` and ``layer_error_max``.
    """
    table = [{"block": item.block, "layer": item.layer, "error": item.error} for item in errors]
    folder.mkdir(exist_ok=True)
    (folder / "layer_errors.json").write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
    plot_layer_errors(folder / "layer_errors.png", errors)
    return {
        "layer_error_mean": sum(item.error for item in errors) / len(errors),
        "layer_error_max": max(item.error for item in errors),
    }


def plot_layer_errors(path: Path, errors: Sequence[LayerError]) -> None:
    """Draw one line per kind of layer over the blocks.

    Args:
        path: of the picture.
        errors: of all layers.
    """
    figure = new_figure(7.5, 4.0)
    axes = figure.subplots()
    for layer in dict.fromkeys(item.layer for item in errors):
        points = [item for item in errors if item.layer == layer]
        axes.plot(
            [item.block for item in points],
            [item.error for item in points],
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
    """Write ``bits.json`` and ``bits.png``: chosen bits and predicted errors of every layer.

    Args:
        folder: where they go; it is made if it is not there.
        spec: the model.
        errors: full layer name -> bits -> share of its output that rounding to them changes.
        bits: full layer name -> chosen bits.
    """
    folder.mkdir(exist_ok=True)
    table = []
    for name, predicted in errors.items():
        predicted_errors = {str(width): error for width, error in predicted.items()}
        table.append({"layer": name, "bits": bits[name], "predicted_errors": predicted_errors})
    (folder / "bits.json").write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
    _plot_allocation(folder / "bits.png", spec, bits)


def _plot_allocation(path: Path, spec: ModelSpec, bits: Mapping[str, int]) -> None:
    """Draw a grid of layers by blocks with the bits of each."""
    layers = list(spec.block_linears())
    grid = []
    for layer in layers:
        names = [f"{spec.family.blocks}.{block}.{layer}" for block in range(spec.blocks)]
        grid.append([bits[name] for name in names])
    figure = new_figure(max(6.0, 3.0 + 0.3 * spec.blocks), 0.4 * len(layers) + 1.6)
    axes = figure.subplots()
    axes.imshow(grid, aspect="auto", cmap="viridis", vmin=2, vmax=8)
    for row, widths in enumerate(grid):
        for block, width in enumerate(widths):
            # the color map ends in yellow: black is readable there, white elsewhere
            color = "white" if width < 6 else "black"
            axes.text(block, row, str(width), ha="center", va="center", color=color, fontsize=8)
    axes.set(xlabel="block", title="bits per weight")
    axes.set_yticks(range(len(layers)), layers)
    axes.xaxis.get_major_locator().set_params(integer=True)
    save_figure(figure, path)

"""Whether the zeros of a model that was pruned weight by weight outlive a further stage.

Looked at by the result, layer by layer, for every stage that does not speak of zeros itself:
removing blocks or channels copies them, refitting fills those of a few layers, rounding and
adapters lose them all. So nothing relies on stages remembering it, and where a mask ends the run
says so.
"""

from __future__ import annotations

from pathlib import Path

from slim.checkpoints.checkpoint import Checkpoint, open_checkpoint
from slim.checkpoints.verify import NAMED, listed
from slim.core.console import warn
from slim.pruning.masks import UNSTRUCTURED, LayerZeros, layer_zeros, mask_of

# A layer whose share of zeros falls below this part of the source's has been filled. Removing
# channels alone moves the share, since those with many zeros go first.
FILLED = 0.5
TOLERANCE = 0.01  # by so much the share of zeros may fall without a word


def carried_mask(source: Checkpoint | None, result: Path, metadata: dict) -> dict:
    """Return what a result's manifest says of the zeros that it has from its source.

    Args:
        source: What the stage read; None for the first stage of a chain.
        result: Folder of what it wrote.
        metadata: What it says of its result itself.

    Returns:
        ``mask`` and ``sparsity``, the share of zeros in the blocks' linear layers; empty where the
        stage gives them itself, where the source is dense, and where the zeros end, which is
        printed.
    """
    mask = None if source is None else mask_of(source)
    if mask is None or "mask" in metadata:
        return {}
    before = source.manifest["facts"]["sparsity"]
    checkpoint = open_checkpoint(result)
    end = _why_it_ends(checkpoint)
    if end is None:
        layers = list(layer_zeros(checkpoint, mask))
        filled = [layer for layer in layers if layer.share < FILLED * before]
        if len(filled) < len(layers):
            _say_what_changed(source, layers, filled, before)
            if not all(layer.regular for layer in layers):
                mask = UNSTRUCTURED
            return {"mask": mask, "sparsity": total_share(layers)}
        end = f"{total_share(layers):.0%} of the result's weights are zero"
    warn(
        f"{end}. A training on this result would not keep zeros.",
        head=f"The source is pruned weight by weight ({before:.0%} zeros), and its mask ends here:",
    )
    return {}


def total_share(layers: list[LayerZeros]) -> float:
    """Return the share of zeros in several layers together."""
    return sum(layer.zeros for layer in layers) / sum(layer.weights for layer in layers)


def _why_it_ends(checkpoint: Checkpoint) -> str | None:
    """Return why the weights as they are stored do not tell about zeros; None where they do."""
    if checkpoint.spec.adapter is not None:
        return "the adapter next to the weights fills the zeros"
    if checkpoint.spec.quantization is not None:
        return "the result is quantized, and zeros are not tracked in packed weights"
    return None


def _say_what_changed(
    source: Checkpoint, layers: list[LayerZeros], filled: list[LayerZeros], before: float
) -> None:
    """Print in which layers a mask or its pattern ends, though zeros stay elsewhere."""
    irregular = [layer for layer in layers if not layer.regular and layer not in filled]
    if filled:
        warn(f"The mask of {source.folder.name} ends in {_named(filled)}; all other zeros stay.")
    elif total_share(layers) < before - TOLERANCE:
        warn(
            f"{total_share(layers):.1%} of the weights are zero, {before:.1%} were in "
            f"{source.folder.name}. These zeros stay."
        )
    if irregular:
        pattern = mask_of(source)
        warn(
            f"The {pattern['n']}:{pattern['m']} pattern of {source.folder.name} ends in "
            f"{_named(irregular)}; the zeros stay."
        )


def _named(layers: list[LayerZeros]) -> str:
    """Return the first layers' names, and how many there are where there are more."""
    names = [layer.name for layer in layers]
    if len(names) > NAMED:
        return f"{len(names)} layers ({listed(names)})"
    return listed(names)

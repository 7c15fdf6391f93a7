"""Whether the zeros of a model that was pruned weight by weight outlive a further stage.

A stage that does not speak of zeros itself (removing blocks or channels copies them, rounding and
adapters lose them) is looked at by its result: the mask is passed on where the zeros are still
there, else the run says that it ends. Nothing relies on stages remembering it.
"""

from __future__ import annotations

from pathlib import Path

from slim.checkpoints.checkpoint import Checkpoint
from slim.core.console import warn
from slim.pruning.masks import count_zeros, mask_of

TOLERANCE = 0.01  # share of the weights that may be zero no longer, where channels were removed


def carried_mask(source: Checkpoint | None, result: Path, metadata: dict) -> dict:
    """Return what a result's manifest says of the zeros that it has from its source.

    Args:
        source: What the stage read; None for the first stage of a chain.
        result: Folder of what it wrote.
        metadata: What it says of its result itself.

    Returns:
        ``mask`` and ``sparsity``; empty where the stage gives them itself, where the source is
        dense, and where the zeros end, which is printed.
    """
    mask = None if source is None else mask_of(source)
    if mask is None or "mask" in metadata:
        return {}
    checkpoint = Checkpoint(result)
    sparsity = source.manifest["facts"]["sparsity"]
    end = _why_it_ends(checkpoint)
    if end is None:
        zeros, regular = count_zeros(checkpoint, mask)
        if zeros >= sparsity - TOLERANCE:
            if not regular:
                mask = {"kind": "unstructured", "n": None, "m": None}
            return {"mask": mask, "sparsity": zeros}
        end = f"{zeros:.0%} of the result's weights are zero"
    warn(
        f"{end}. A training on this result would not keep zeros.",
        head=f"The source is pruned weight by weight ({sparsity:.0%} zeros), and its mask ends "
        "here:",
    )
    return {}


def _why_it_ends(checkpoint: Checkpoint) -> str | None:
    """Return why the weights as they are stored do not tell about zeros; None where they do."""
    if checkpoint.spec.adapter is not None:
        return "the adapter next to the weights fills the zeros"
    if checkpoint.spec.quantization is not None:
        return "the result is quantized, and zeros are not tracked in packed weights"
    return None

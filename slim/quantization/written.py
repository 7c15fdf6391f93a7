"""Whether a quantized file holds what the method meant: some rows of every layer, read back."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from slim.checkpoints.checkpoint import open_checkpoint
from slim.checkpoints.reader import TensorReader
from slim.core.errors import SlimError
from slim.quantization.formats import read_config

if TYPE_CHECKING:
    import torch

ROWS = 2  # of every layer that are compared
TOLERANCE = 1e-3  # of the largest weight: scales are multiplied in another order


def check_written(folder: Path, meant: dict[str, torch.Tensor]) -> None:
    """Compare the first rows of packed layers with what they should be.

    Args:
        folder: The checkpoint that was written.
        meant: Full layer name -> float32 [ROWS, in], the numbers the codes stand for.

    Raises:
        SlimError: A layer reads back as something else.
    """
    checkpoint = open_checkpoint(folder)
    spec, reader = checkpoint.spec, TensorReader(checkpoint)
    stored, shapes = read_config(spec.quantization, spec.name), spec.matrices()
    for layer, rows in meant.items():
        if layer not in shapes or stored.scheme(layer) is None:
            raise SlimError(f"{layer} was quantized, but the result's config does not say so.")
        weight = stored.dense_weight(reader, layer, *shapes[layer])[: len(rows)]
        limit = TOLERANCE * float(rows.abs().max())
        if float((weight - rows).abs().max()) > limit:
            raise SlimError(
                f"{layer} reads back from the result as other weights than were meant. The result "
                "is not kept. Please report this as a bug of slim."
            )
        reader.release()

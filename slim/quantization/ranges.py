"""Whether a format's scales can hold a layer's weights: float16 ends at 65504."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from slim.checkpoints.checkpoint import Checkpoint
from slim.checkpoints.reader import TensorReader
from slim.core.errors import SlimError
from slim.core.lazy import LazyModule
from slim.quantization.formats import Format
from slim.quantization.scheme import Scheme

if TYPE_CHECKING:
    import torch

    from slim.quantization.solvers.grid import Quantized
else:
    torch = LazyModule("torch")

# methods move weights before they round them (error feedback, scaled channels): so much room is
# kept
MARGIN = 4


def fitting_schemes(
    checkpoint: Checkpoint, schemes: Mapping[str, Scheme], form: Format
) -> tuple[dict[str, Scheme], list[str]]:
    """Leave out the layers whose scales the format could not hold; they stay plain.

    Weights are read only where the format stores scales in a narrower type than the model's.

    Args:
        checkpoint: The model that is to be quantized.
        schemes: Full layer name -> scheme.
        form: The format that is to be written.

    Returns:
        The schemes of the layers that fit, and a sentence for each layer that does not.

    Raises:
        SlimError: No layer fits.
    """
    if form.scale_dtype(checkpoint.spec.dtype) != "float16" or checkpoint.spec.dtype == "float16":
        return dict(schemes), []
    most = torch.finfo(torch.float16).max
    reader, fitting, notes = TensorReader(checkpoint), {}, []
    for layer, scheme in schemes.items():
        # a head that shares the embedding has no tensor of its own, and the embedding is checked
        name = f"{layer}.weight"
        largest = largest_scale(reader.read(name), scheme) if name in reader else 0.0
        if largest * MARGIN <= most:
            fitting[layer] = scheme
        else:
            notes.append(
                f"{layer} stays unquantized: its scales go up to {largest:.3g}, and "
                f"quant.format={form.name} holds them in float16, up to {most:.0f}."
            )
        reader.release()
    if schemes and not fitting:
        raise SlimError(
            f"{notes[0]} So it is with all layers.\nUse quant.format=compressed-tensors."
        )
    return fitting, notes


def layers_beyond_float16(checkpoint: Checkpoint, layers: Iterable[str]) -> dict[str, float]:
    """Return the layers with a weight that float16 does not hold, and the largest magnitude in
    each.

    Args:
        checkpoint: The model that is to be quantized.
        layers: Full names of the layers that count.
    """
    if checkpoint.spec.dtype == "float16":
        return {}
    most = torch.finfo(torch.float16).max
    reader, beyond = TensorReader(checkpoint), {}
    for layer in layers:
        largest = float(reader.read(f"{layer}.weight").abs().amax())
        if largest > most:
            beyond[layer] = largest
        reader.release()
    return beyond


def largest_scale(weight: torch.Tensor, scheme: Scheme) -> float:
    """Return the largest scale that rounding to the nearest gives a layer.

    Args:
        weight: [out, in], of any floating type.
        scheme: Its bits and group.
    """
    groups = weight.float().unflatten(1, (-1, scheme.group(weight.shape[1])))
    if scheme.symmetric:
        return float(groups.abs().amax()) / (scheme.levels / 2)
    span = groups.amax(-1).clamp(min=0) - groups.amin(-1).clamp(max=0)
    return float(span.amax()) / (scheme.levels - 1)


def require_range(name: str, layer: Quantized, form: Format) -> None:
    """Refuse scales that the format's type turned into infinity, before they are written.

    Args:
        name: The layer's name.
        layer: The layer, its scales in the type that is stored.
        form: The format.

    Raises:
        SlimError: A scale is not finite.
    """
    if not torch.isfinite(layer.scale).all():
        raise SlimError(
            f"The scales of {name} are beyond what quant.format={form.name} holds "
            "(float16: 65504). "
            f"Use quant.format=compressed-tensors, or leave it as it is: "
            f"'quant.overrides={{*{name}:{{bits:16}}}}'."
        )

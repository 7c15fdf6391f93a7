"""bitsandbytes at work: packing layers during sequential calibration."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from slim.calibration.errors import relative_error
from slim.calibration.sequential import BlockMethod, LinearGroup
from slim.core.errors import SlimError
from slim.quantization.formats.bitsandbytes import BLOCK, library

# end of the tensor's name -> tensor; the float32 weights they are
Packed = tuple[dict[str, torch.Tensor], torch.Tensor]


def pack_int8(weight: torch.Tensor) -> Packed:
    """Quantise a 16- or 32-bit weight [out, in] row by row.

    weight: int8 [out, in]. SCB: float32 [out], max |w| of each row. weight_format: uint8, 0 for "by rows". Raises
    ``SlimError`` for weights that float16 cannot hold, which the library goes through.
    """
    half = weight.to(torch.float16)
    if not torch.isfinite(half).all():
        raise SlimError(
            "quant=int8 takes weights through float16, and some are beyond 65504. Take quant=rtn quant.bits=8."
        )
    codes, scale, _ = library().functional.int8_vectorwise_quant(half)
    tensors = {"weight": codes, "SCB": scale, "weight_format": torch.zeros((), dtype=torch.uint8)}
    return tensors, codes.float() * (scale / 127).unsqueeze(-1)


def pack_nf4(weight: torch.Tensor, double_quant: bool = True) -> Packed:
    """Quantise a 16- or 32-bit weight [out, in] in blocks of 64 to NF4.

    weight: uint8 [out in / 2, 1], the first of two codes in the high half. weight.absmax: the scale
    of each block, float32, or uint8 with ``double_quant``; then also weight.nested_absmax and
    weight.nested_quant_map, float32. weight.quant_map: the 16 numbers, float32.
    weight.quant_state.bitsandbytes__nf4: a JSON text, uint8."""
    functional = library().functional
    codes, state = functional.quantize_4bit(
        weight, blocksize=BLOCK, compress_statistics=double_quant, quant_type="nf4"
    )
    tensors = {
        "weight": codes,
        **{f"weight.{key}": value for key, value in state.as_dict(packed=True).items()},
    }
    state.dtype = torch.float32  # of what it is decoded to; the text above names the model's own
    return tensors, functional.dequantize_4bit(codes, state)


class BitsAndBytesMethod(BlockMethod):
    """A method of bitsandbytes on the walk; looks at weights only.

    pack: what is done to a layer. dtype: the model's type, to which weights are brought back first,
    as the library's result depends on it."""

    needs_hessian = False
    resumable = True

    def __init__(self, pack: Callable[[torch.Tensor], Packed], dtype: str):
        self.pack, self.dtype = pack, getattr(torch, dtype)
        # of the block at hand, by the layer's name within it
        self.done: dict[str, dict[str, torch.Tensor]] = {}

    def process(self, view: LinearGroup) -> dict[str, float]:
        errors = {}
        for name, linear in view.linears.items():
            self.done[name], weight = self.pack(linear.weight.to(self.dtype))
            errors[name] = relative_error(weight - linear.weight, linear.weight, None)
            linear.weight.copy_(weight)
        return errors

    def block_tensors(self, block: int, module: nn.Module) -> dict[str, torch.Tensor]:
        tensors = {}
        for name, tensor in module.state_dict().items():
            packed = (
                self.done.get(name.removesuffix(".weight")) if name.endswith(".weight") else None
            )
            tensors.update(
                {name: tensor} if packed is None else prefixed(name.removesuffix("weight"), packed)
            )
        self.done = {}
        return tensors


def prefixed(prefix: str, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return ``tensors`` with ``prefix`` before their names."""
    return {prefix + name: tensor for name, tensor in tensors.items()}

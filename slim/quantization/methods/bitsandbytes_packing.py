"""bitsandbytes at work: packing layers during sequential calibration."""

from __future__ import annotations

from collections.abc import Callable, Collection

import torch
from torch import nn

from slim.calibration.errors import relative_error
from slim.calibration.sequential import BlockMethod, LinearGroup
from slim.quantization.formats.bitsandbytes import BLOCK, library

# end of the tensor's name -> tensor; the float32 weights they are
Packed = tuple[dict[str, torch.Tensor], torch.Tensor]


def pack_int8(weight: torch.Tensor) -> Packed:
    """Quantize a weight row by row.

    Args:
        weight: [out, in], of a 16- or 32-bit type, in the range of float16.

    Returns:
        The tensors that are stored: ``weight`` int8 [out, in]; ``SCB`` float32 [out], max |w| of
        each row; ``weight_format`` uint8, 0 for "by rows". And the weights they stand for, float32.
    """
    # layers with weights that float16 does not hold are left out before any work
    codes, scale, _ = library().functional.int8_vectorwise_quant(weight.to(torch.float16))
    tensors = {"weight": codes, "SCB": scale, "weight_format": torch.zeros((), dtype=torch.uint8)}
    return tensors, codes.float() * (scale / 127).unsqueeze(-1)


def pack_nf4(weight: torch.Tensor, double_quant: bool = True) -> Packed:
    """Quantize a weight in blocks of 64 to NF4.

    Args:
        weight: [out, in], of a 16- or 32-bit type.
        double_quant: Whether the scales are quantized too.

    Returns:
        The tensors that are stored: ``weight`` uint8 [out in / 2, 1], the first of two codes in the
        high half; ``weight.absmax``, the scale of each block, float32, or uint8 with
        ``double_quant``, then also ``weight.nested_absmax`` and ``weight.nested_quant_map``,
        float32; ``weight.quant_map`` float32 [16]; ``weight.quant_state.bitsandbytes__nf4``, a JSON
        text, uint8. And the weights they stand for, float32 [out, in].
    """
    functional = library().functional
    codes, state = functional.quantize_4bit(
        weight, blocksize=BLOCK, compress_statistics=double_quant, quant_type="nf4"
    )
    tensors = {"weight": codes, **prefixed("weight.", state.as_dict(packed=True))}
    state.dtype = torch.float32  # of what it is decoded to; the text above names the model's own
    return tensors, functional.dequantize_4bit(codes, state)


class BitsAndBytesMethod(BlockMethod):
    """A method of bitsandbytes; looks at weights only.

    Attributes:
        done: Stored tensors of the block at hand, by the layer's name within it.
    """

    needs_hessian = False
    resumable = True

    def __init__(
        self, pack: Callable[[torch.Tensor], Packed], dtype: str, plain: Collection[str] = ()
    ):
        """Take the settings.

        Args:
            pack: What is done to a layer.
            dtype: The model's type, to which weights are brought back first, as the library's
                result depends on it.
            plain: Full names of layers that stay as they are.
        """
        self.pack = pack
        self.plain = plain
        self.dtype = getattr(torch, dtype)
        self.done: dict[str, dict[str, torch.Tensor]] = {}

    def process(self, group: LinearGroup) -> dict[str, float]:
        errors = {}
        for name, linear in group.linears.items():
            if f"{group.prefix}.{name}" in self.plain:
                continue
            self.done[name], weight = self.pack(linear.weight.to(self.dtype))
            errors[name] = relative_error(weight - linear.weight, linear.weight, None)
            linear.weight.copy_(weight)
        return errors

    def block_tensors(self, block: int, module: nn.Module) -> dict[str, torch.Tensor]:
        tensors = {}
        for name, tensor in module.state_dict().items():
            layer = name.removesuffix(".weight")
            if layer == name or layer not in self.done:
                tensors[name] = tensor
            else:
                tensors.update(prefixed(f"{layer}.", self.done[layer]))
        self.done = {}
        return tensors


def prefixed(prefix: str, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return tensors under longer names.

    Args:
        prefix: What is put in front.
        tensors: Name -> tensor.
    """
    return {prefix + name: tensor for name, tensor in tensors.items()}

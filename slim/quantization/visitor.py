"""What all quantisation methods share on the walk: keeping the packed results, errors, and what is written."""

from __future__ import annotations

from typing import TYPE_CHECKING

from slim.blockwise import SegmentView, Visitor, relative_error
from slim.lazy import LazyModule
from slim.quantization.grid import Quantised
from slim.quantization.packing import pack, pack_columns

if TYPE_CHECKING:
    import torch
    from torch import nn
else:
    torch = LazyModule("torch")


class QuantVisitor(Visitor):
    """Base of the methods: subclasses turn a segment's weights into :class:`Quantised` ones.

    dtype: type in which scales are stored, that of the model.
    """

    def __init__(self, dtype: torch.dtype):
        self.dtype = dtype
        self.done: dict[str, Quantised] = {}  # of the block at hand, by name within it
        self.plain: dict[str, torch.Tensor] = {}  # its other tensors that folding has changed

    def quantise(self, view: SegmentView) -> dict[str, torch.Tensor]:
        """Fill ``self.done`` for the layers of ``view``; return the weights they stand for, on the unscaled input."""
        raise NotImplementedError

    def visit(self, view: SegmentView) -> dict[str, float]:
        errors = {}
        for name, weight in self.quantise(view).items():
            linear = view.linears[name]
            errors[name] = relative_error(weight - linear.weight, linear.weight, view.gram)
            linear.weight.copy_(weight)
        return errors

    def block_tensors(self, block: int, module: nn.Module) -> dict[str, torch.Tensor]:
        tensors = {}
        for name, tensor in module.state_dict().items():
            layer = name.removesuffix(".weight")
            if layer in self.done:
                tensors.update({f"{layer}.{key}": value for key, value in packed_tensors(self.done[layer]).items()})
            else:
                tensors[name] = self.plain.get(name, tensor)
        self.done, self.plain = {}, {}
        return tensors


def packed_tensors(layer: Quantised) -> dict[str, torch.Tensor]:
    """Return a layer as compressed-tensors' ``pack-quantized`` stores it.

    weight_packed: int32 [out, ceil(in b / 32)]. weight_scale: [out, groups]. weight_shape: int64 [2].
    weight_zero_point (asymmetric only): int32 [ceil(out b / 32), groups], packed along the rows. That library keeps
    codes and zero points in the signed range and adds 2^(b-1) to both when packing: what is packed is the same
    unsigned code and zero point as here.
    """
    bits = layer.scheme.bits
    tensors = {
        "weight_packed": pack(layer.codes, bits),
        "weight_scale": layer.scale.contiguous(),
        "weight_shape": torch.tensor(layer.codes.shape, dtype=torch.int64),
    }
    if not layer.scheme.symmetric:
        tensors["weight_zero_point"] = pack_columns(layer.zero, bits)
    return tensors

"""GGUF's block types: 32 weights of a row with their scale, and for some types an offset.

    Q4_0, Q5_0, Q8_0    w^ = d (q - middle)     d in float16; middle 8, 16, 0 (Q8_0: signed codes)
    Q4_1, Q5_1          w^ = d q + m            d and m in float16

Layouts: https://github.com/ggml-org/ggml/blob/master/src/ggml-common.h. The ``gguf`` library
rounds weights to these types and reads them back; what slim's own methods chose (codes, scales and
zero points) is put into blocks here, unchanged.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from slim.core.errors import SlimError
from slim.core.lazy import LazyModule
from slim.gguf.reader import CHUNK_ELEMENTS
from slim.quantization.scheme import Scheme

if TYPE_CHECKING:
    import torch

    from slim.quantization.solvers.grid import Quantized
else:
    torch = LazyModule("torch")

BLOCK = 32  # weights in a block of each of these types


@dataclass(frozen=True)
class BlockType:
    """A type of blocks.

    Attributes:
        bits: Bits per code.
        symmetric: Whether blocks have a scale only, no offset.
        size: Bytes of a block.
    """

    bits: int
    symmetric: bool
    size: int

    @property
    def scheme(self) -> Scheme:
        """The scheme that the type stands for."""
        return Scheme(self.bits, BLOCK, self.symmetric)


BLOCK_TYPES = {
    "Q4_0": BlockType(4, True, 18),
    "Q4_1": BlockType(4, False, 20),
    "Q5_0": BlockType(5, True, 22),
    "Q5_1": BlockType(5, False, 24),
    "Q8_0": BlockType(8, True, 34),
}
PLAIN_TYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
# (bits, symmetric) of slim's own codes -> the type that holds them
TYPES_OF_CODES = {(4, True): "Q4_0", (4, False): "Q4_1", (8, True): "Q8_0"}


def row_bytes(type_name: str, columns: int) -> int:
    """Return the bytes of a row of ``columns`` weights in blocks of a type."""
    return columns // BLOCK * BLOCK_TYPES[type_name].size


def pack_blocks(layer: Quantized) -> torch.Tensor:
    """Return a layer's codes and grids as GGUF blocks.

    Nothing is rounded but the offset m = -d zero of Q4_1, which is stored in float16: its relative
    error is at most 2^-11, so that of a weight at most 2^-11 x 15 d, below 0.8 % of a step d.

    Args:
        layer: Codes [out, in] with a scale and zero point per group of 32 n weights. Scales are
            those that float16 holds.

    Returns:
        uint8 [out, bytes of a row].

    Raises:
        SlimError: A scale is beyond float16's range.
    """
    type_name = TYPES_OF_CODES[layer.scheme.bits, layer.scheme.symmetric]
    rows, columns = layer.codes.shape
    blocks = columns // BLOCK
    repeats = blocks // layer.scale.shape[1]
    scale = layer.scale.to(torch.float16).repeat_interleave(repeats, 1)
    if not torch.isfinite(scale).all():
        raise SlimError(
            "A scale of this model is too large for float16, which GGUF stores scales in. "
            "Use quant.format=compressed-tensors."
        )
    codes = layer.codes.view(rows, blocks, BLOCK)
    parts = [_bytes(scale)]
    if type_name == "Q8_0":
        signed = codes.to(torch.int16) - layer.scheme.middle
        return torch.cat([*parts, signed.to(torch.int8).view(torch.uint8)], -1).view(rows, -1)
    if type_name == "Q4_1":
        zero = layer.zero.repeat_interleave(repeats, 1).float()
        parts.append(_bytes((scale.float() * -zero).to(torch.float16)))
    first, second = codes[..., : BLOCK // 2], codes[..., BLOCK // 2 :]
    return torch.cat([*parts, first | (second << 4)], -1).view(rows, -1)


def _bytes(values: torch.Tensor) -> torch.Tensor:
    """View float16 [rows, blocks] as uint8 [rows, blocks, 2]."""
    return values.contiguous().unsqueeze(-1).view(torch.uint8)


def round_to_blocks(weight: torch.Tensor, type_name: str) -> torch.Tensor:
    """Round a weight matrix with the ``gguf`` library's own quantizer, some rows at a time.

    Args:
        weight: [out, in], of any floating-point type.
        type_name: One of ``BLOCK_TYPES``, whose blocks divide the rows.

    Returns:
        uint8 [out, bytes of a row].
    """
    from gguf import GGMLQuantizationType, quantize

    rows, columns = weight.shape
    result = torch.empty(rows, row_bytes(type_name, columns), dtype=torch.uint8)
    for part in row_chunks(rows, columns):
        values = weight[part].float().contiguous().numpy()
        result[part] = torch.from_numpy(quantize(values, GGMLQuantizationType[type_name]))
    return result


def unpack_blocks(blocks: torch.Tensor, type_name: str, dtype: torch.dtype) -> torch.Tensor:
    """Return the weights that blocks stand for, dequantized by the ``gguf`` library.

    Args:
        blocks: uint8 [out, bytes of a row].
        type_name: One of ``BLOCK_TYPES``.
        dtype: Type of the result; weights are rounded to it once, from float32.

    Returns:
        [out, in] in ``dtype``.
    """
    from gguf import GGMLQuantizationType, dequantize

    rows = len(blocks)
    columns = blocks.shape[1] // BLOCK_TYPES[type_name].size * BLOCK
    result = torch.empty(rows, columns, dtype=dtype)
    for part in row_chunks(rows, columns):
        values = dequantize(blocks[part].contiguous().numpy(), GGMLQuantizationType[type_name])
        result[part] = torch.from_numpy(values)
    return result


def row_chunks(rows: int, columns: int) -> Iterator[slice]:
    """Yield slices of rows that together hold a few million weights."""
    step = max(1, CHUNK_ELEMENTS // columns)
    for first in range(0, rows, step):
        yield slice(first, first + step)

"""GGUF's block types: some weights of a row with their scales, and for some types offsets.

    Q4_0, Q5_0, Q8_0    w^ = d (q - middle)     32 weights; d in float16; middle 8, 16, 128
    Q4_1, Q5_1          w^ = d q + m            32 weights; d and m in float16
    Q3_K, Q6_K          w^ = d s (q - middle)   256 weights; whole s for every 16; middle 4, 32
    Q2_K, Q4_K, Q5_K    w^ = d s q - e m        256 weights; whole s and m for every 16 (Q2_K) or 32

Layouts: https://github.com/ggml-org/ggml/blob/master/ggml/src/ggml-common.h. The ``gguf`` library
reads them back. It also rounds weights to those of 32; the others' grids are slim's choice
(``slim/quantization/solvers/super_blocks.py``). What slim's own methods chose (codes, scales and
zero points) is put into blocks here, unchanged.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from slim.core.errors import SlimError
from slim.core.lazy import LazyModule
from slim.gguf.packing import pack
from slim.gguf.reader import CHUNK_ELEMENTS
from slim.quantization.scheme import Scheme
from slim.quantization.solvers.super_blocks import BlockKind, nearest

if TYPE_CHECKING:
    import torch

    from slim.quantization.solvers.grid import Quantized
else:
    torch = LazyModule("torch")

BLOCK = 32  # weights in the smallest blocks
SUPER_BLOCK = 256  # in those of the K types


@dataclass(frozen=True)
class BlockType:
    """A type of blocks.

    Attributes:
        kind: What a block can hold.
        size: Bytes of a block.
    """

    kind: BlockKind
    size: int

    @property
    def scheme(self) -> Scheme:
        """The scheme that is nearest to the type."""
        return Scheme(self.kind.bits, self.kind.group, self.kind.symmetric)


OFFSET = (1, 1)  # m of types whose blocks have an offset of their own
BLOCK_TYPES = {
    "Q4_0": BlockType(BlockKind(4), 18),
    "Q4_1": BlockType(BlockKind(4, minimums=OFFSET), 20),
    "Q5_0": BlockType(BlockKind(5), 22),
    "Q5_1": BlockType(BlockKind(5, minimums=OFFSET), 24),
    "Q8_0": BlockType(BlockKind(8), 34),
    "Q2_K": BlockType(BlockKind(2, SUPER_BLOCK, 16, (0, 15), (0, 15)), 84),
    "Q3_K": BlockType(BlockKind(3, SUPER_BLOCK, 16, (-32, 31)), 110),
    "Q4_K": BlockType(BlockKind(4, SUPER_BLOCK, 32, (0, 63), (0, 63)), 144),
    "Q5_K": BlockType(BlockKind(5, SUPER_BLOCK, 32, (0, 63), (0, 63)), 176),
    "Q6_K": BlockType(BlockKind(6, SUPER_BLOCK, 16, (-128, 127)), 210),
}
PLAIN_TYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
# (bits, symmetric) of slim's own codes -> the type that holds them
TYPES_OF_CODES = {(4, True): "Q4_0", (4, False): "Q4_1", (8, True): "Q8_0"}


def row_bytes(type_name: str, columns: int) -> int:
    """Return the bytes of a row of ``columns`` weights in blocks of a type."""
    block = BLOCK_TYPES[type_name]
    return columns // block.kind.size * block.size


def fits(type_name: str, columns: int) -> bool:
    """Whether blocks of a type divide a row of ``columns`` weights; plain types always do."""
    return type_name in PLAIN_TYPES or columns % BLOCK_TYPES[type_name].kind.size == 0


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
    """Round a weight matrix, some rows at a time, every weight by itself.

    Types of 32 weights are rounded by the ``gguf`` library's own quantizer, K types by slim's.

    Args:
        weight: [out, in], of any floating-point type.
        type_name: One of ``BLOCK_TYPES``, whose blocks divide the rows.

    Returns:
        uint8 [out, bytes of a row].
    """
    from gguf import GGMLQuantizationType, quantize

    rows, columns = weight.shape
    kind = BLOCK_TYPES[type_name].kind
    result = torch.empty(rows, row_bytes(type_name, columns), dtype=torch.uint8)
    for part in row_chunks(rows, columns):
        values = weight[part].float().contiguous()
        if kind.two_levels:
            result[part] = pack(nearest(values, kind), type_name)
        else:
            blocks = quantize(values.numpy(), GGMLQuantizationType[type_name])
            result[part] = torch.from_numpy(blocks)
    return result


def require_range(layer: str, weight: torch.Tensor) -> None:
    """Raise ``SlimError`` for weights whose scales float16 could not hold, or NaN.

    Args:
        layer: For the message.
        weight: [out, in].
    """
    if not float(weight.abs().amax()) <= torch.finfo(torch.float16).max:
        raise SlimError(
            f"{layer} has weights beyond 65504, the largest number that scales in GGUF's blocks "
            f"hold, or NaN.\nLeave it plain: 'quant.overrides={{{layer}:BF16}}'"
        )


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
    block_type = BLOCK_TYPES[type_name]
    columns = blocks.shape[1] // block_type.size * block_type.kind.size
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

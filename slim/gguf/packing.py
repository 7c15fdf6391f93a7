"""The bits of GGUF's blocks: codes and grids of super-blocks to bytes.

Where each bit goes is told by the structures in
https://github.com/ggml-org/ggml/blob/master/ggml/src/ggml-common.h and by the ``gguf`` library,
whose dequantizers read the blocks back. A super-block's codes are planes of bits: in every run of
``stride`` bytes, byte l holds a few bits each of the weights l, l + stride, l + 2 stride, ...
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from slim.core.lazy import LazyModule

if TYPE_CHECKING:
    import torch

    from slim.quantization.solvers.super_blocks import BlockQuantized
else:
    torch = LazyModule("torch")


def pack(layer: BlockQuantized, type_name: str) -> torch.Tensor:
    """Return a layer as blocks.

    Args:
        layer: Codes and grids of the type's kind.
        type_name: One of ``slim.gguf.blocks.BLOCK_TYPES``.

    Returns:
        uint8 [out, bytes of a row].
    """
    codes = layer.codes.unflatten(-1, (-1, layer.kind.size))  # [out, blocks, size]
    parts = PACKERS[type_name](codes, _Numbers(layer))
    return torch.cat(parts, -1).flatten(1)


class _Numbers:
    """The numbers of a layer's grids, rows first.

    Attributes:
        d: uint8 [out, blocks, 2], the bytes of float16 numbers.
        e: Likewise.
        scale: s, int16 [out, blocks, groups].
        minimum: m, likewise.
    """

    def __init__(self, layer: BlockQuantized):
        grids = layer.grids
        self.d, self.e = _half(grids.d), _half(grids.e)
        self.negative_e = _half(-grids.e)
        self.scale = grids.scale.permute(2, 0, 1).to(torch.int16)
        self.minimum = grids.minimum.permute(2, 0, 1).to(torch.int16)


def _half(values: torch.Tensor) -> torch.Tensor:
    """Return [blocks, out] as the bytes of float16 numbers, uint8 [out, blocks, 2]."""
    return values.T.to(torch.float16).contiguous().unsqueeze(-1).view(torch.uint8)


def _planes(codes: torch.Tensor, bits: int, stride: int) -> torch.Tensor:
    """Return the low bits of codes, ``bits`` each, in runs of ``stride`` bytes.

    Args:
        codes: uint8 [out, blocks, size].
        bits: 1, 2 or 4.
        stride: Bytes in a run.

    Returns:
        uint8 [out, blocks, size bits / 8].
    """
    runs = (codes & (2**bits - 1)).unflatten(-1, (-1, 8 // bits, stride))
    packed = torch.zeros_like(runs[..., 0, :])
    for plane in range(8 // bits):
        packed |= runs[..., plane, :] << (bits * plane)
    return packed.flatten(-2)


def _six_bit_pairs(numbers: _Numbers) -> torch.Tensor:
    """Return eight s and eight m of 6 bits each as 12 bytes."""
    s, m = numbers.scale, numbers.minimum
    low_s, high_s, low_m, high_m = s[..., :4], s[..., 4:], m[..., :4], m[..., 4:]
    first = low_s | ((high_s >> 4) << 6)
    second = low_m | ((high_m >> 4) << 6)
    third = (high_s & 15) | ((high_m & 15) << 4)
    return torch.cat([first, second, third], -1).to(torch.uint8)


def _q4_0(codes: torch.Tensor, numbers: _Numbers) -> list[torch.Tensor]:
    return [numbers.d, _planes(codes, 4, 16)]


def _q4_1(codes: torch.Tensor, numbers: _Numbers) -> list[torch.Tensor]:
    return [numbers.d, numbers.negative_e, _planes(codes, 4, 16)]


def _fifth_bits(codes: torch.Tensor) -> torch.Tensor:
    """Return the fifth bits of 32 codes as 4 bytes, those of eight neighbours in each."""
    places = torch.arange(8, dtype=torch.uint8, device=codes.device)
    bits = (codes >> 4).unflatten(-1, (-1, 8)) << places
    return bits.sum(-1, dtype=torch.uint8)


def _q5_0(codes: torch.Tensor, numbers: _Numbers) -> list[torch.Tensor]:
    return [numbers.d, _fifth_bits(codes), _planes(codes, 4, 16)]


def _q5_1(codes: torch.Tensor, numbers: _Numbers) -> list[torch.Tensor]:
    return [numbers.d, numbers.negative_e, _fifth_bits(codes), _planes(codes, 4, 16)]


def _q8_0(codes: torch.Tensor, numbers: _Numbers) -> list[torch.Tensor]:
    return [numbers.d, codes ^ 128]  # two's complement of c - 128


def _q2_k(codes: torch.Tensor, numbers: _Numbers) -> list[torch.Tensor]:
    pairs = (numbers.scale | (numbers.minimum << 4)).to(torch.uint8)
    return [pairs, _planes(codes, 2, 32), numbers.d, numbers.e]


def _q3_k(codes: torch.Tensor, numbers: _Numbers) -> list[torch.Tensor]:
    scale = numbers.scale + 32
    low = (scale[..., :8] & 15) | ((scale[..., 8:] & 15) << 4)
    high = torch.zeros_like(scale[..., :4])
    for quarter, part in enumerate((scale >> 4).split(4, -1)):
        high |= part << (2 * quarter)
    scales = torch.cat([low, high], -1).to(torch.uint8)
    return [_planes(codes >> 2, 1, 32), _planes(codes, 2, 32), scales, numbers.d]


def _q4_k(codes: torch.Tensor, numbers: _Numbers) -> list[torch.Tensor]:
    return [numbers.d, numbers.e, _six_bit_pairs(numbers), _planes(codes, 4, 32)]


def _q5_k(codes: torch.Tensor, numbers: _Numbers) -> list[torch.Tensor]:
    fifth = _planes(codes >> 4, 1, 32)
    return [numbers.d, numbers.e, _six_bit_pairs(numbers), fifth, _planes(codes, 4, 32)]


def _q6_k(codes: torch.Tensor, numbers: _Numbers) -> list[torch.Tensor]:
    scales = numbers.scale.to(torch.int8).view(torch.uint8)
    return [_planes(codes, 4, 64), _planes(codes >> 4, 2, 32), scales, numbers.d]


PACKERS = {
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q5_0": _q5_0,
    "Q5_1": _q5_1,
    "Q8_0": _q8_0,
    "Q2_K": _q2_k,
    "Q3_K": _q3_k,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
}

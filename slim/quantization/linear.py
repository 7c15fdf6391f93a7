"""A linear layer that holds packed integers and picks the fastest way to multiply with them.

- Few rows on a CPU in bfloat16, 4 bits: torch's int4 kernel, which reads a quarter of the bytes.
- 4 bits on CUDA in bfloat16: torch's tinygemm kernel.
- Everything else: weights are unpacked some rows at a time and multiplied. No dense copy of the layer ever exists.

The int4 kernels compute w = (c - 8) scale + offset with offset = (8 - zero) scale in bfloat16. On a CPU they also take
float32 and float16, but by a plain loop that is slower than unpacking, so those types unpack.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import nn

from slim.quantization.packing import lookup, unpack, unpack_as, words_per_row
from slim.quantization.scheme import Scheme

KERNEL_GROUPS = (32, 64, 128, 256)  # group sizes torch's int4 kernels take
KERNEL_ROWS = 48  # up to this many rows the CPU kernel wins; measured in docs/methods/rtn.md
TILE = 64  # output features in a tile of the CPU kernel's layout
CHUNK = 2**20  # weights that are unpacked at once
CUDA_INNER_TILES = 8


class QuantLinear(nn.Module):
    """y = x W^T + bias for W given as codes, one scale and one zero point per group of each row.

    dtype: type of activations, results and the unpacked weights. Scales have it too where that loses nothing.
    packed: int32 [out, ceil(in b / 32)], the stored stream; or in the CPU kernel's layout uint8 [out / 64, in, 32];
        or on CUDA in the layout of its kernel.
    scale: [out, groups]. zero: uint8 [out, groups]. bias: [out] or None.
    """

    def __init__(self, in_features: int, out_features: int, scheme: Scheme, dtype: torch.dtype, bias: bool = False):
        super().__init__()
        self.in_features, self.out_features, self.scheme, self.dtype = in_features, out_features, scheme, dtype
        groups = scheme.groups(in_features)
        words = words_per_row(in_features, scheme.bits)
        self.register_buffer("packed", torch.zeros(out_features, words, dtype=torch.int32))
        self.register_buffer("scale", torch.ones(out_features, groups, dtype=dtype))
        self.register_buffer("zero", torch.full((out_features, groups), scheme.middle, dtype=torch.uint8))
        self.register_buffer("bias", torch.zeros(out_features, dtype=dtype) if bias else None)
        self.kernel: str | None = None

    @property
    def group(self) -> int:
        return self.scheme.group(self.in_features)

    def take_scale(self, scale: torch.Tensor) -> None:
        """Take the stored scales [out, groups]; in the layer's type if that is exact, else as they are."""
        converted = scale.to(self.dtype)
        self.scale = converted if torch.equal(converted.to(scale.dtype), scale) else scale

    def choose_kernel(self) -> QuantLinear:
        """Bring the codes into the layout of the best kernel for this layer, device and type; call once when loaded."""
        fits = self.scheme.bits == 4 and self.group in KERNEL_GROUPS and self.in_features % self.group == 0
        if self.kernel is None and fits and self.dtype == self.scale.dtype == torch.bfloat16:
            device = self.packed.device.type
            if device == "cpu" and self.out_features % TILE == 0 and cpu_layout_known():
                codes = unpack(self.packed, 4, self.in_features).int()
                tiles = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
                self._use("cpu", tiles.view(-1, self.in_features, TILE // 2))
            elif device == "cuda" and self.out_features % 8 == 0 and self.in_features % (16 * CUDA_INNER_TILES) == 0:
                codes = unpack(self.packed, 4, self.in_features)
                pairs = codes[:, ::2] << 4 | codes[:, 1::2]
                self._use("cuda", torch.ops.aten._convert_weight_to_int4pack(pairs.contiguous(), CUDA_INNER_TILES))
        return self

    def _use(self, kernel: str, packed: torch.Tensor) -> None:
        self.kernel, self.packed = kernel, packed
        offset = (8 - self.zero.float()) * self.scale.float()
        pairs = torch.stack((self.scale, offset.to(self.dtype)), dim=-1)
        self.register_buffer("scale_and_offset", pairs.transpose(0, 1).contiguous())  # [groups, out, 2]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Multiply x [..., in] of the layer's type; returns [..., out]."""
        rows = x.reshape(-1, self.in_features)
        if self.kernel == "cuda":
            result = torch.ops.aten._weight_int4pack_mm(rows, self.packed, self.group, self.scale_and_offset)
        elif self.kernel == "cpu" and len(rows) <= KERNEL_ROWS:
            packed = self.packed.view(self.out_features, -1)
            result = torch.ops.aten._weight_int4pack_mm_for_cpu(rows, packed, self.group, self.scale_and_offset)
        else:
            result = self._unpack_and_multiply(rows)
        if self.bias is not None:
            result = result + self.bias
        return result.unflatten(0, x.shape[:-1]) if x.dim() != 2 else result

    def _unpack_and_multiply(self, rows: torch.Tensor) -> torch.Tensor:
        result = rows.new_empty(len(rows), self.out_features)
        step = max(TILE, CHUNK // self.in_features // TILE * TILE)
        for start in range(0, self.out_features, step):
            stop = min(start + step, self.out_features)
            if self.kernel == "cpu":
                result[:, start:stop] = self._multiply_tiles(rows, start, stop)
            else:
                result[:, start:stop] = rows @ self.dense_rows(start, stop, rows.dtype).T
        return result

    def _multiply_tiles(self, rows: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        """Multiply with output features ``start`` to ``stop``, whole tiles; the tiles hold W^T, so that is unpacked."""
        scale, zero = in_tiles(self.scale[start:stop]), in_tiles(self.zero[start:stop]).to(rows.dtype)
        dense = lookup(self.packed[start // TILE : stop // TILE], 4, 8, rows.dtype)
        dense = dense.view(*scale.shape[:2], -1, scale.shape[-1])
        dense = dense.sub_(zero).mul_(scale).view(len(scale), self.in_features, TILE)
        return out_of_tiles(rows @ dense.transpose(0, 1).reshape(self.in_features, -1))

    def dense_rows(self, start: int, stop: int, dtype: torch.dtype) -> torch.Tensor:
        """Return rows ``start`` to ``stop`` of the weight matrix, [stop - start, in]."""
        if self.kernel == "cpu":
            codes = codes_of_tiles(self.packed[start // TILE : -(-stop // TILE)])[: stop - start].to(dtype)
        else:
            codes = unpack_as(self.packed[start:stop], self.scheme.bits, self.in_features, dtype)
        return expand(codes, self.scale[start:stop], self.zero[start:stop], self.group)

    def dense_weight(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Return the whole weight matrix [out, in]: for tests and for merging, not for running."""
        if self.kernel == "cuda":
            raise NotImplementedError("codes in the layout of the CUDA kernel are not turned back")
        return self.dense_rows(0, self.out_features, dtype)

    def extra_repr(self) -> str:
        sizes = f"{self.in_features}, {self.out_features}"
        return f"{sizes}, bits={self.scheme.bits}, group={self.group}, kernel={self.kernel}"


def expand(codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, group: int) -> torch.Tensor:
    """Return scale (c - zero) in the type of ``codes`` [rows, in], exact but for the rounding of the product."""
    dtype, groups, width = codes.dtype, scale.shape[-1], codes.shape[-1]
    if width < groups * group:  # files of others may have a last group that is not full
        codes = nn.functional.pad(codes, (0, groups * group - width))
    steps = codes.view(len(codes), groups, group).sub_(zero.to(dtype).unsqueeze(-1))
    if scale.dtype == dtype:
        return steps.mul_(scale.unsqueeze(-1)).view(len(codes), -1)[:, :width]
    return (steps.float() * scale.float().unsqueeze(-1)).to(dtype).view(len(codes), -1)[:, :width]


def in_tiles(per_group: torch.Tensor) -> torch.Tensor:
    """Return scales or zero points [64 n, groups] as [n, groups, 1, 512], features in a tile's order 0, 32, 1, 33, ...

    The 64 features are there eight times, for as many columns: short inner loops cost more than the copies.
    """
    halves = per_group.unflatten(0, (-1, 2, TILE // 2))
    return halves.permute(0, 3, 2, 1).flatten(-2).repeat(1, 1, 8).unsqueeze(2)


def out_of_tiles(results: torch.Tensor) -> torch.Tensor:
    """Return results [rows, 64 n] with features in a tile's order with them in their own."""
    return results.unflatten(-1, (-1, TILE // 2, 2)).transpose(2, 3).flatten(1)


def codes_of_tiles(tiles: torch.Tensor) -> torch.Tensor:
    """Return codes uint8 [64 n, in] of the CPU kernel's tiles, uint8 [n, in, 32].

    A tile holds 64 rows: byte j of column k has row j in its low half and row j + 32 in its high half.
    """
    codes = torch.cat((tiles & 15, tiles >> 4), dim=-1)
    return codes.transpose(1, 2).reshape(-1, tiles.shape[1])


@cache
def cpu_layout_known() -> bool:
    """Whether this CPU's int4 kernel exists and stores its weights as :func:`codes_of_tiles` reads them.

    The layout depends on the instruction set (AVX-512 has the one read here), so it is tried out once.
    """
    codes = (
        torch.arange(TILE * 64, dtype=torch.int32).view(TILE, 64).mul_(2654435761 % 2**31).bitwise_right_shift_(7) & 15
    )
    try:
        tiles = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
    except (RuntimeError, AttributeError, NotImplementedError):
        return False
    return torch.equal(codes_of_tiles(tiles.view(-1, 64, TILE // 2)).int(), codes)

"""Layers that hold packed integers and pick the fastest way to compute with them.

- Few rows on a CPU in bfloat16: torch's int4 kernel for 4 bits, its int8 kernel for 8 bits with a
scale per row.
- 4 bits on CUDA in bfloat16: torch's tinygemm kernel.
- Everything else: weights are unpacked some rows at a time and multiplied (``multiply.py``).

The int4 kernels compute w = (c - 8) scale + offset with offset = (8 - zero) scale in bfloat16. On a
CPU they also take float32 and float16, but by a plain loop that is slower than unpacking, so those
types unpack; the int8 kernel likewise."""

from __future__ import annotations

from functools import cache

import torch
from torch import nn

from slim.quantization.formats.base import Packed
from slim.quantization.kernels.multiply import (
    CHUNK,
    INT8,
    STREAM,
    TILE,
    TILES,
    PackedWeight,
    codes_of_tiles,
    multiply_packed,
    packed_rows,
)
from slim.quantization.kernels.packing import permute_columns, unpack, words_per_row
from slim.quantization.scheme import Scheme

KERNEL_GROUPS = (32, 64, 128, 256)  # group sizes torch's int4 kernels take
KERNEL_ROWS = 48  # up to this many rows the CPU's int4 kernel wins; measured in docs/methods/rtn.md
INT8_ROWS = 16  # the same of its int8 kernel; measured in docs/formats.md
LAYOUTS = {None: STREAM, "cpu": TILES, "int8": INT8}
CUDA_INNER_TILES = 8


class QuantLinear(nn.Module):
    """y = x W^T + bias for W given as codes, one scale and one zero point per group of each row.

    dtype: type of activations, results and the unpacked weights. Scales have it too where that
        loses nothing, and where a kernel needs it.
    packed: int32 [out, ceil(in b / 32)], the stored stream, or another layout of ``multiply.py``,
        or on CUDA that of its kernel.
    scale: [out, groups]. zero: uint8 [out, groups]. bias: [out] or None.
    order: int64 [in] where columns are grouped in activation order: the inputs in the order in
        which groups are whole; ``packed`` is in it. index: int64 [in], the group of every column,
        where no order makes them whole.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        scheme: Scheme,
        dtype: torch.dtype,
        bias: bool = False,
    ):
        super().__init__()
        self.in_features, self.out_features, self.scheme, self.dtype = (
            in_features,
            out_features,
            scheme,
            dtype,
        )
        groups = scheme.groups(in_features)
        words = words_per_row(in_features, scheme.bits)
        self.register_buffer("packed", torch.zeros(out_features, words, dtype=torch.int32))
        self.register_buffer("scale", torch.ones(out_features, groups, dtype=dtype))
        self.register_buffer(
            "zero", torch.full((out_features, groups), scheme.middle, dtype=torch.uint8)
        )
        self.register_buffer("bias", torch.zeros(out_features, dtype=dtype) if bias else None)
        self.register_buffer("order", None)
        self.register_buffer("index", None)
        self.kernel: str | None = None

    @property
    def qweight(self) -> torch.Tensor:
        """The codes, by the name under which PEFT looks for the device of a quantised layer."""
        return self.packed

    @property
    def group(self) -> int:
        return self.scheme.group(self.in_features)

    def take(self, stored: Packed) -> QuantLinear:
        """Take the codes, scales and zero points of a file."""
        self.packed, self.zero = stored.packed, stored.zero
        converted = stored.scale.to(self.dtype)
        self.scale = (
            converted
            if torch.equal(converted.to(stored.scale.dtype), stored.scale)
            else stored.scale
        )
        if stored.group_index is not None:
            order = stored.group_index.argsort(stable=True)
            whole = torch.arange(self.in_features) // self.group
            if torch.equal(stored.group_index[order], whole):
                self.order, self.packed = (
                    order,
                    permute_columns(self.packed, self.scheme.bits, order),
                )
            else:
                self.index = stored.group_index
        return self

    def choose_kernel(self, mixed: bool = False) -> QuantLinear:
        """Bring the codes into the layout of the best kernel for this layer, device and type; call
        once when loaded.

        Args:
            mixed: let a layer of float32 use a kernel too: few rows are then rounded to bfloat16,
                which is all that kernels take, and multiplied by rounded scales.
        """
        suits = self.dtype == torch.bfloat16 or (mixed and self.dtype == torch.float32)
        if self.kernel is None and suits and self.index is None:
            device, bits = self.packed.device.type, self.scheme.bits
            if bits == 4 and self.group in KERNEL_GROUPS and self.in_features % self.group == 0:
                self._use_int4(device)
            elif (
                bits == 8
                and device == "cpu"
                and self.scale.shape[1] == 1
                and bool((self.zero == 128).all())
            ):
                signed = self.packed.view(torch.uint8)[:, : self.in_features] ^ 128
                self._use("int8", signed.view(torch.int8).contiguous())
        return self

    def _use_int4(self, device: str) -> None:
        if device == "cpu" and self.out_features % TILE == 0 and cpu_layout_known():
            self._use("cpu", to_tiles(self.packed, self.in_features))
        elif (
            device == "cuda"
            and self.out_features % 8 == 0
            and self.in_features % (16 * CUDA_INNER_TILES) == 0
        ):
            codes = unpack(self.packed, 4, self.in_features)
            pairs = codes[:, ::2] << 4 | codes[:, 1::2]
            self._use(
                "cuda",
                torch.ops.aten._convert_weight_to_int4pack(pairs.contiguous(), CUDA_INNER_TILES),
            )

    def _use(self, kernel: str, packed: torch.Tensor) -> None:
        self.kernel, self.packed, self.scale = kernel, packed, self.scale.to(torch.bfloat16)
        if kernel != "int8":
            offset = (8 - self.zero.float()) * self.scale.float()
            pairs = torch.stack((self.scale, offset.to(torch.bfloat16)), dim=-1)
            # [groups, out, 2]
            self.register_buffer("scale_and_offset", pairs.transpose(0, 1).contiguous())

    @property
    def packed_weight(self) -> PackedWeight:
        """The weights as they are held, columns in ``order``."""
        if self.kernel == "cuda":
            raise NotImplementedError("codes in the layout of the CUDA kernel are not turned back")
        return PackedWeight(
            self.packed,
            self.scale,
            self.zero,
            self.index,
            self.scheme.bits,
            self.group,
            self.in_features,
            LAYOUTS[self.kernel],
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Multiply x [..., in] of the layer's type; returns [..., out]."""
        rows = x.reshape(-1, self.in_features)
        if self.order is not None:
            rows = rows.index_select(1, self.order)
        result = self._multiply(rows)
        if self.bias is not None:
            result = result + self.bias
        return result.unflatten(0, x.shape[:-1]) if x.dim() != 2 else result

    def _multiply(self, rows: torch.Tensor) -> torch.Tensor:
        if self.kernel == "cuda":
            return torch.ops.aten._weight_int4pack_mm(
                rows, self.packed, self.group, self.scale_and_offset
            )
        if rows.requires_grad:  # kernels have no gradient
            return multiply_packed(rows, *self.packed_weight.parts())
        if self.kernel == "int8" and len(rows) <= INT8_ROWS:
            product = torch.ops.aten._weight_int8pack_mm(
                rows.to(torch.bfloat16), self.packed, self.scale[:, 0]
            )
            return product.to(rows.dtype)
        if self.kernel == "cpu" and len(rows) <= KERNEL_ROWS:
            packed = self.packed.view(self.out_features, -1)
            product = torch.ops.aten._weight_int4pack_mm_for_cpu(
                rows.to(torch.bfloat16), packed, self.group, self.scale_and_offset
            )
            return product.to(rows.dtype)
        if torch.compiler.is_compiling():
            return multiply_packed(rows, *self.packed_weight.parts())
        return self.packed_weight.multiply(rows)

    def rows(self, ids: torch.Tensor) -> torch.Tensor:
        """Return the rows ``ids`` (int64 [n]) of the weight matrix in the layer's type, [n, in]."""
        found = packed_rows(ids, *self.packed_weight.parts(), self.dtype)
        return found if self.order is None else found.index_select(1, self.order.argsort())

    def dense_weight(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Return the whole weight matrix [out, in]: for tests and for merging, not for running."""
        dense = self.packed_weight.dense(slice(0, self.out_features), dtype)
        return dense if self.order is None else dense.index_select(1, self.order.argsort())

    def extra_repr(self) -> str:
        sizes = f"{self.in_features}, {self.out_features}"
        return f"{sizes}, bits={self.scheme.bits}, group={self.group}, kernel={self.kernel}"


class QuantEmbedding(nn.Module):
    """An embedding whose rows are packed; only those looked up are unpacked.

    table: the packed rows; a head tied to the embedding is the same module. factor: what the family
        multiplies embeddings with inside this module (Gemma 3), or None.
    """

    def __init__(self, table: QuantLinear, factor: torch.Tensor | None = None):
        super().__init__()
        self.table = table
        self.register_buffer("factor", factor, persistent=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Return the embeddings of ids (int [...]), [..., in]."""
        found = self.table.rows(ids.reshape(-1)).view(*ids.shape, -1)
        return found if self.factor is None else found * self.factor.to(found.dtype)


def to_tiles(words: torch.Tensor, columns: int) -> torch.Tensor:
    """Return 4-bit codes, int32 words [out, columns / 8], in tiles: uint8 [out / 64, columns,
    32]."""
    tiles = torch.empty(len(words) // TILE, columns, TILE // 2, dtype=torch.uint8)
    step = max(1, CHUNK // columns // TILE)  # the codes are four bytes each on the way
    for start in range(0, len(tiles), step):
        part = tiles[start : start + step]
        codes = unpack(words[TILE * start : TILE * (start + len(part))], 4, columns).int()
        part.copy_(torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1).view_as(part))
    return tiles


@cache
def cpu_layout_known() -> bool:
    """Whether this CPU's int4 kernel exists and stores its weights as :func:`codes_of_tiles` reads
    them.

    The layout depends on the instruction set (AVX-512 has the one read here), so it is tried out
    once."""
    codes = (
        torch.arange(TILE * 64, dtype=torch.int32)
        .view(TILE, 64)
        .mul_(2654435761 % 2**31)
        .bitwise_right_shift_(7)
        & 15
    )
    try:
        tiles = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
    except (RuntimeError, AttributeError, NotImplementedError):
        return False
    return torch.equal(codes_of_tiles(tiles.view(-1, 64, TILE // 2)).int(), codes)

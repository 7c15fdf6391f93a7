"""Layers that hold packed integers and pick the fastest way to compute with them.

- Few rows on a CPU: torch's int4 kernel for 2, 3 and 4 bits (a code of 3 bits is one of 4 bits with
  the same scale), and for 8 bits as two halves of 4; its int8 kernel for 8 bits, symmetric, with a
  scale per row.
- 4 bits on CUDA in bfloat16: torch's tinygemm kernel.
- Everything else: weights are unpacked some rows at a time and multiplied (``multiply.py``).

The int4 kernels compute w = (c - 8) scale + offset with offset = (8 - zero) scale, both bfloat16,
and take activations in bfloat16. (They accept float32 and float16 too, but by a plain loop that is
slower than unpacking; the int8 kernel likewise.) So layers of other types use them only when they
are asked to round the few rows: see :meth:`QuantLinear.choose_kernel`.
"""

from __future__ import annotations

import torch
from torch import nn

from slim.quantization.formats.base import Packed
from slim.quantization.kernels.int4_layout import int4_layout
from slim.quantization.kernels.multiply import (
    HALVES,
    INT8,
    STREAM,
    TILES,
    PackedWeight,
    ScaledProduct,
    multiply_packed,
    packed_rows,
)
from slim.quantization.kernels.packing import permute_columns, unpack, words_per_row
from slim.quantization.scheme import Scheme

KERNEL_GROUPS = (256, 128, 64, 32)  # group sizes torch's int4 kernels take
# Up to this many rows the CPU's int4 kernel wins; measured in docs/methods/rtn.md. Unpacking also
# takes about a quarter of a millisecond however small the matrix.
KERNEL_ROWS = 64
SMALL_KERNEL_ROWS = 128
SMALL = 2**19  # weights
INT8_ROWS = 16  # the same of its int8 kernel; measured in docs/formats.md
LAYOUTS = {None: STREAM, "int4": TILES, "int4 halves": HALVES, "int8": INT8}
CUDA_INNER_TILES = 8


class QuantLinear(nn.Module):
    """y = x W^T + bias for W given as codes, one scale and one zero point per group of each row.

    Attributes:
        dtype: type of activations, results and the unpacked weights. Scales have it too where that
            loses nothing, and where a bfloat16 kernel needs it.
        packed: int32 [out, ceil(in b / 32)], the stored stream, or another layout of
            ``multiply.py``, or on CUDA that of its kernel.
        scale: [out, groups].
        zero: zero points, uint8 [out, groups].
        bias: [out] or None.
        group: columns in a group; smaller than the scheme's where the kernel wants that.
        order: int64 [in] where columns are grouped in activation order: the inputs in the order in
            which groups are whole; ``packed`` is in it.
        index: int64 [in], the group of every column, where no order makes them whole.
        growth: g, [out, groups], of scales that are trained; None otherwise.
        kernel: the kernel that few rows take: ``int4``, ``int4 halves``, ``int8``, ``cuda`` or
            None.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        scheme: Scheme,
        dtype: torch.dtype,
        bias: bool = False,
    ):
        """Make a layer of zeros.

        Args:
            in_features: inputs.
            out_features: outputs.
            scheme: bits, group size and symmetry.
            dtype: type of activations.
            bias: whether there is one.
        """
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.scheme = scheme
        self.dtype = dtype
        self.group = scheme.group(in_features)
        groups = scheme.groups(in_features)
        words = words_per_row(in_features, scheme.bits)
        zero = torch.full((out_features, groups), scheme.middle, dtype=torch.uint8)
        self.register_buffer("packed", torch.zeros(out_features, words, dtype=torch.int32))
        self.register_buffer("scale", torch.ones(out_features, groups, dtype=dtype))
        self.register_buffer("zero", zero)
        self.register_buffer("bias", torch.zeros(out_features, dtype=dtype) if bias else None)
        self.register_buffer("order", None)
        self.register_buffer("index", None)
        self.register_parameter("growth", None)
        self.kernel: str | None = None

    def train_scale(self) -> None:
        """Let every scale s be s e^g, with a parameter g that begins at 0."""
        self.growth = nn.Parameter(torch.zeros_like(self.scale, dtype=torch.float32))

    def settle_scale(self, dtype: torch.dtype) -> None:
        """Make s e^g the scale, rounded to the type it is stored in; g is gone."""
        grown = self.scale.float() * self.growth.detach().exp()
        self.scale = grown.to(dtype).to(self.scale.dtype)
        self.growth = None

    @property
    def qweight(self) -> torch.Tensor:
        """The codes, by the name under which PEFT looks for the device of a quantised layer."""
        return self.packed

    def take(self, stored: Packed) -> QuantLinear:
        """Take the codes, scales and zero points of a file; returns the layer."""
        self.packed, self.zero = stored.packed, stored.zero
        converted = stored.scale.to(self.dtype)
        lossless = torch.equal(converted.to(stored.scale.dtype), stored.scale)
        self.scale = converted if lossless else stored.scale
        if stored.group_index is not None:
            order = stored.group_index.argsort(stable=True)
            whole = torch.arange(self.in_features) // self.group
            if torch.equal(stored.group_index[order], whole):
                self.order = order
                self.packed = permute_columns(self.packed, self.scheme.bits, order)
            else:
                self.index = stored.group_index
        return self

    def choose_kernel(self, mixed: bool = False) -> QuantLinear:
        """Bring the codes into the layout of the best kernel for this layer, device and type.

        Call it once, when the layer is loaded. Long inputs are not affected: they always unpack.

        Args:
            mixed: on a CPU, let layers of float32 and float16 use the kernels too. Few rows are
                then rounded to bfloat16, and so are their results.

        Returns:
            The layer.
        """
        device = self.packed.device.type
        takes_kernel = self.dtype == torch.bfloat16 or (mixed and device == "cpu")
        if self.kernel is not None or not takes_kernel or self.index is not None:
            return self
        if device == "cuda":
            self._use_cuda()
        elif device == "cpu" and self._is_int8():
            signed = self.packed.view(torch.uint8)[:, : self.in_features] ^ 128
            self._use("int8", signed.view(torch.int8).contiguous())
            self.register_buffer("kernel_scale", self.scale[:, 0].to(torch.bfloat16))
        elif device == "cpu":
            self._use_int4()
        return self

    def _is_int8(self) -> bool:
        """Whether the codes are what torch's int8 kernel multiplies with."""
        per_row = self.scheme.bits == 8 and self.scale.shape[1] == 1
        return per_row and bool((self.zero == 128).all())

    def _use_int4(self) -> None:
        group = self._kernel_group()
        layout = int4_layout()
        if group is None or layout is None or not int4_kernel_is_fast():
            return
        self._repeat_scales(group)
        if self.scheme.bits == 8:
            self._use("int4 halves", layout.halves_of(self.packed, self.in_features))
            self._register_scales(self._halves_scales())
            return
        # Narrow codes go to the middle of the kernel's, whose offset then is small and rounds
        # little.
        shift = 8 - self.scheme.middle
        tiles = layout.tiles_of(self.packed, self.scheme.bits, self.in_features, shift)
        self.zero = self.zero + shift
        self._use("int4", tiles)
        scale = self.scale.float()
        self._register_scales([(scale, (8 - self.zero.float()) * scale)])

    def _kernel_group(self) -> int | None:
        """Return the largest group size that the int4 kernel takes for this layer, if any."""
        for group in KERNEL_GROUPS:
            if self.group % group == 0 and self.in_features % group == 0:
                return group
        return None

    def _repeat_scales(self, group: int) -> None:
        """Divide groups into smaller ones with the same scale and zero point."""
        times, groups = self.group // group, self.in_features // group
        self.scale = self.scale.repeat_interleave(times, dim=1)[:, :groups].contiguous()
        self.zero = self.zero.repeat_interleave(times, dim=1)[:, :groups].contiguous()
        self.group = group

    def _halves_scales(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Return scale and offset of the high and of the low four bits of codes of 8 bits.

        c - zero = 16 (high - 8) + (low - 8) + (136 - zero). The offset is many steps, so
        what rounding it to bfloat16 leaves over goes to the low half."""
        scale = self.scale.float()
        offset = (136 - self.zero.float()) * scale
        high_offset = offset.to(torch.bfloat16).float()
        return [(16 * scale, high_offset), (scale, offset - high_offset)]

    def _register_scales(self, halves: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
        """Keep scales and offsets, [out, groups], as the kernel wants them: [groups, out, 2]."""
        excess = -self.out_features % int4_layout().rows  # rows that fill up the last tile
        parts = []
        for scale, offset in halves:
            pairs = torch.stack((scale, offset), dim=-1).to(torch.bfloat16)
            parts.append(nn.functional.pad(pairs, (0, 0, 0, 0, 0, excess)))
        pairs = torch.cat(parts).transpose(0, 1).contiguous()
        self.register_buffer("scale_and_offset", pairs)

    def _use_cuda(self) -> None:
        whole = self.out_features % 8 == 0 and self.in_features % (16 * CUDA_INNER_TILES) == 0
        if self.scheme.bits != 4 or self.group not in KERNEL_GROUPS or not whole:
            return
        codes = unpack(self.packed, 4, self.in_features)
        pairs = (codes[:, ::2] << 4 | codes[:, 1::2]).contiguous()
        packed = torch.ops.aten._convert_weight_to_int4pack(pairs, CUDA_INNER_TILES)
        self._use("cuda", packed)
        offset = (8 - self.zero.float()) * self.scale.float()
        pairs = torch.stack((self.scale, offset.to(self.dtype)), dim=-1)
        self.register_buffer("scale_and_offset", pairs.transpose(0, 1).contiguous())

    def _use(self, kernel: str, packed: torch.Tensor) -> None:
        self.kernel, self.packed = kernel, packed
        if self.dtype == torch.bfloat16:
            self.scale = self.scale.to(self.dtype)

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
        one_row = x.numel() == self.in_features
        if one_row and self.kernel in ("int4", "int4 halves") and not x.requires_grad:
            return self._multiply_token(x)
        rows = x.reshape(-1, self.in_features)
        if self.order is not None:
            rows = rows.index_select(1, self.order)
        result = self._multiply(rows)
        if self.bias is not None:
            result = result + self.bias
        return result.unflatten(0, x.shape[:-1]) if x.dim() != 2 else result

    def _multiply_token(self, x: torch.Tensor) -> torch.Tensor:
        """Multiply a single row by the int4 kernel, the same as below with fewer calls.

        A small layer's kernel takes a few hundredths of a millisecond, and what stands around it
        in Python as much again, for every layer and every token that is written.
        """
        buffers = self._buffers  # the module's own look-up of attributes takes longer
        row = x.reshape(1, self.in_features)
        if buffers["order"] is not None:
            row = row.index_select(1, buffers["order"])
        if row.dtype != torch.bfloat16:
            row = row.to(torch.bfloat16)
        pairs = buffers["scale_and_offset"]
        padded = pairs.shape[1]
        result = torch._weight_int4pack_mm_for_cpu(
            row, buffers["packed"].view(padded, -1), self.group, pairs
        )
        if self.kernel == "int4 halves":
            high, low = result.float().chunk(2, dim=1)
            result = high + low
        if result.shape[1] != self.out_features:
            result = result[:, : self.out_features]
        if result.dtype != x.dtype:
            result = result.to(x.dtype)
        if buffers["bias"] is not None:
            result = result + buffers["bias"]
        return result.reshape(*x.shape[:-1], self.out_features)

    def _multiply(self, rows: torch.Tensor) -> torch.Tensor:
        if self.kernel == "cuda":
            return torch.ops.aten._weight_int4pack_mm(
                rows, self.packed, self.group, self.scale_and_offset
            )
        if self.growth is not None:
            return ScaledProduct.apply(rows, self.growth, self.packed_weight)
        if rows.requires_grad:  # kernels have no gradient
            return multiply_packed(rows, *self.packed_weight.parts())
        if self.kernel == "int8" and len(rows) <= INT8_ROWS:
            few = rows.to(torch.bfloat16)
            product = torch.ops.aten._weight_int8pack_mm(few, self.packed, self.kernel_scale)
            return product.to(rows.dtype)
        if self.kernel == "int4" and len(rows) <= self._kernel_rows():
            return self._int4_product(rows)[:, : self.out_features].to(rows.dtype)
        if self.kernel == "int4 halves" and len(rows) <= self._kernel_rows() // 2:
            high, low = self._int4_product(rows).float().chunk(2, dim=1)
            return (high + low)[:, : self.out_features].to(rows.dtype)
        if torch.compiler.is_compiling():
            return multiply_packed(rows, *self.packed_weight.parts())
        return self.packed_weight.multiply(rows)

    def _kernel_rows(self) -> int:
        small = self.in_features * self.out_features <= SMALL
        return SMALL_KERNEL_ROWS if small else KERNEL_ROWS

    def _int4_product(self, rows: torch.Tensor) -> torch.Tensor:
        """Return what the CPU's int4 kernel gives, bfloat16 [rows, out and what fills up tiles]."""
        packed = self.packed.view(self.scale_and_offset.shape[1], -1)
        return torch.ops.aten._weight_int4pack_mm_for_cpu(
            rows.to(torch.bfloat16), packed, self.group, self.scale_and_offset
        )

    def rows(self, ids: torch.Tensor) -> torch.Tensor:
        """Return the rows ``ids`` (int64 [n]) of the weight matrix in the layer's type, [n, in]."""
        rows = packed_rows(ids, *self.packed_weight.parts(), self.dtype)
        return rows if self.order is None else rows.index_select(1, self.order.argsort())

    def dense_weight(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Return all weights, [out, in] in ``dtype``: for tests and merging, not for running."""
        dense = self.packed_weight.dense(slice(0, self.out_features), dtype)
        return dense if self.order is None else dense.index_select(1, self.order.argsort())

    def extra_repr(self) -> str:
        sizes = f"{self.in_features}, {self.out_features}"
        return f"{sizes}, bits={self.scheme.bits}, group={self.group}, kernel={self.kernel}"


class QuantEmbedding(nn.Module):
    """An embedding whose rows are packed; only those looked up are unpacked."""

    def __init__(self, table: QuantLinear, factor: torch.Tensor | None = None):
        """Look rows up in a packed matrix.

        Args:
            table: the packed rows; a head tied to the embedding is the same module.
            factor: what the family multiplies embeddings with inside this module (Gemma 3), or
                None.
        """
        super().__init__()
        self.table = table
        self.register_buffer("factor", factor, persistent=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Return the embeddings of ids (int [...]), [..., in]."""
        rows = self.table.rows(ids.reshape(-1)).view(*ids.shape, -1)
        return rows if self.factor is None else rows * self.factor.to(rows.dtype)


def int4_kernel_is_fast() -> bool:
    """Whether torch's int4 kernel for this CPU uses vector instructions; its plain loop is slower
    than unpacking.

    Not found by measuring: what a busy machine measures would change the results.
    """
    return torch.backends.cpu.get_cpu_capability().startswith("AVX")

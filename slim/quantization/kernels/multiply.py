"""Multiplying with packed weights by unpacking some rows at a time, never a complete layer.

Codes are held in one of these layouts:

- ``stream``: int32 [out, ceil(in b / 32)], as stored (``packing.py``).
- ``tiles``: 4 bits as torch's int4 kernel takes them, uint8 [n, in, rows / 2] (``int4_layout.py``).
- ``halves``: 8 bits as two such sets, the high and the low halves, uint8 [2, n, in, rows / 2].
- ``int8``: 8 bits around 0, int8 [out, in], one scale per row, as torch's int8 kernel takes them.

:func:`multiply_packed` and :func:`packed_rows` are the same as custom operators, which
``torch.compile`` takes as they are, and the former has a gradient with respect to its input, for
adapters on top of packed weights.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from functools import cache

import torch
from torch import Tensor, nn

from slim.quantization.kernels.int4_layout import TILE_ROWS, int4_layout, scratch
from slim.quantization.kernels.packing import unpack_as

STREAM, TILES, HALVES, INT8 = "stream", "tiles", "halves", "int8"
LARGEST_TILE = TILE_ROWS[-1]  # rows are unpacked in multiples of it
CHUNK = 2**20  # weights that are unpacked at once
LARGEST_KEPT = 2**21  # results of more numbers do not keep their memory for the next ones


@dataclass(frozen=True)
class PackedWeight:
    """A weight matrix [out, in] as it is held.

    Attributes:
        packed: the codes in ``layout``.
        scale: [out, groups].
        zero: zero points, uint8 [out, groups].
        index: int64 [in], the group of every column; None: column // group.
        bits: of a code in the stream.
        group: columns in a group.
        columns: in.
        layout: of ``packed``.
    """

    packed: Tensor
    scale: Tensor
    zero: Tensor
    index: Tensor | None
    bits: int
    group: int
    columns: int
    layout: str

    def parts(self) -> tuple:
        """Return the fields one by one, as the operators take them."""
        return tuple(getattr(self, field.name) for field in fields(self))

    def steps(self) -> Iterator[tuple[int, int]]:
        """Cut the rows into runs (start, stop) that are unpacked at once; all start at a tile."""
        outputs = self.scale.shape[0]
        step = max(LARGEST_TILE, CHUNK // self.columns // LARGEST_TILE * LARGEST_TILE)
        for start in range(0, outputs, step):
            yield start, min(start + step, outputs)

    def multiply(self, x: Tensor) -> Tensor:
        """Return x W^T, [rows, out], for x [rows, in]; computed in the fastest type."""
        result = x.new_empty(len(x), self.scale.shape[0])
        x = x.to(multiplied_dtype(x.dtype, x.device.type))
        for start, stop in self.steps():
            if self.layout in (TILES, HALVES):
                self._multiply_tiles(x, start, stop, result[:, start:stop])
            elif self.layout == INT8:
                # scaling the result is cheaper than scaling the weights
                product = x @ self.packed[start:stop].to(x.dtype).T
                result[:, start:stop] = product * self.scale[start:stop, 0].to(x.dtype)
            else:
                result[:, start:stop] = x @ self.dense(slice(start, stop), x.dtype).T
        return result

    def multiply_back(self, x: Tensor) -> Tensor:
        """Return x W, [rows, in], for x [rows, out]: the gradient of :meth:`multiply`."""
        result = x.new_zeros(len(x), self.columns)
        for start, stop in self.steps():
            result += x[:, start:stop] @ self.dense(slice(start, stop), x.dtype)
        return result

    def dense(self, rows: slice | Tensor, dtype: torch.dtype) -> Tensor:
        """Return rows of the matrix, [n, in].

        Args:
            rows: a slice that starts at a tile, or int64 [n].
            dtype: type of the result.
        """
        scale, zero = self.scale[rows], self.zero[rows]
        if self.layout == INT8:
            return scaled(self.packed[rows].to(dtype).unsqueeze(1), scale).flatten(1)
        codes = self._codes(rows, dtype)
        if self.index is None:
            return expand(codes, scale, zero, self.group)
        return expand(codes, scale[:, self.index], zero[:, self.index], 1)

    def _codes(self, rows: slice | Tensor, dtype: torch.dtype) -> Tensor:
        if self.layout == TILES:
            return _tile_rows(self.packed, rows).to(dtype)
        if self.layout == HALVES:
            high, low = _tile_rows(self.packed[0], rows), _tile_rows(self.packed[1], rows)
            return (high << 4 | low).to(dtype)
        return unpack_as(self.packed[rows], self.bits, self.columns, dtype)

    def _multiply_tiles(self, x: Tensor, start: int, stop: int, result: Tensor) -> None:
        """Multiply with rows ``start`` to ``stop``; tiles hold W^T, so that is what is unpacked."""
        layout = int4_layout()
        scale, zero = self.scale[start:stop], self.zero[start:stop]
        excess = -(stop - start) % layout.rows  # of the last tile
        if excess:
            scale, zero = (nn.functional.pad(part, (0, 0, 0, excess)) for part in (scale, zero))
        scale = layout.to_halves(scale)
        zero = layout.to_halves(zero).to(torch.bfloat16).unsqueeze(1)
        tiles = slice(start // layout.rows, -(-stop // layout.rows))
        # whole numbers up to 256 are exact in bfloat16
        if self.layout == TILES:
            steps = layout.unpack_halves(self.packed[tiles]).unflatten(0, (len(scale), -1))
            steps = steps.sub_(zero + 128)
        else:
            # c - zero = 16 (high - 8) + (low + 128 - zero)
            high = layout.unpack_halves(self.packed[0, tiles], "high").sub_(128 + 8)
            low = layout.unpack_halves(self.packed[1, tiles]).unflatten(0, (len(scale), -1))
            steps = low.sub_(zero).add_(high.view(low.shape), alpha=16)
        if x.dtype != steps.dtype:
            steps = scratch("dense", steps.shape, x.dtype).copy_(steps)
        dense = steps.mul_(scale.unsqueeze(1)).view(self.columns, -1)
        shape = (len(x), dense.shape[1])
        product = scratch("product", shape, x.dtype) if math.prod(shape) <= LARGEST_KEPT else None
        ordered = layout.from_halves(torch.mm(x, dense, out=product))
        if excess:
            result.copy_(ordered.flatten(1)[:, : stop - start])
        else:
            result.unflatten(1, ordered.shape[1:]).copy_(ordered)


@cache
def multiplied_dtype(dtype: torch.dtype, device: str) -> torch.dtype:
    """Return the type in which long inputs are multiplied fastest: their own, or float32.

    Without instructions for it a CPU multiplies and scales 16-bit types several times slower than
    float32. So both are timed, once per process, on a product that takes about a millisecond and
    on what unpacking does to its weights.

    Args:
        dtype: of the inputs.
        device: their device's type; only CPUs are timed.
    """
    if device != "cpu" or dtype == torch.float32:
        return dtype
    seconds = {}
    for tried in (dtype, torch.float32):
        left, right = torch.ones(64, 512, dtype=tried), torch.ones(512, 512, dtype=tried)
        seconds[tried] = shortest(lambda left=left, right=right: left @ right.sub(2).mul_(2))
    # the own type saves a conversion, and a tie should not be decided by chance
    return torch.float32 if seconds[torch.float32] < 0.8 * seconds[dtype] else dtype


def shortest(call, repeats: int = 5) -> float:
    """Return the shortest time of several calls in seconds, after one that does not count.

    Args:
        call: what is timed, without arguments.
        repeats: how often.
    """
    call()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def _tile_rows(tiles: Tensor, rows: slice | Tensor) -> Tensor:
    """Return the codes of some rows, uint8 [n, in], of tiles, uint8 [m, in, rows / 2]."""
    layout = int4_layout()
    if isinstance(rows, slice):
        codes = layout.codes(tiles[rows.start // layout.rows : -(-rows.stop // layout.rows)])
        return codes[: rows.stop - rows.start]
    place = torch.tensor(layout.place, device=rows.device)[rows % layout.rows]
    octets = tiles[rows // layout.rows, :, place // 2]
    return torch.where((place % 2 == 0).unsqueeze(-1), octets & 15, octets >> 4)


@torch.library.custom_op("slim::multiply_packed", mutates_args=())
def multiply_packed(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    zero: Tensor,
    index: Tensor | None,
    bits: int,
    group: int,
    columns: int,
    layout: str,
) -> Tensor:
    """Return x W^T, [rows, out], for x [rows, in].

    packed, scale, zero, index, bits, group, columns and layout are those of :class:`PackedWeight`.
    """
    return PackedWeight(packed, scale, zero, index, bits, group, columns, layout).multiply(x)


@multiply_packed.register_fake
def _multiply_shape(x, packed, scale, *parts):
    return x.new_empty(len(x), scale.shape[0])


@torch.library.custom_op("slim::multiply_packed_back", mutates_args=())
def multiply_packed_back(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    zero: Tensor,
    index: Tensor | None,
    bits: int,
    group: int,
    columns: int,
    layout: str,
) -> Tensor:
    """Return x W, [rows, in], for x [rows, out].

    packed, scale, zero, index, bits, group, columns and layout are those of :class:`PackedWeight`.
    """
    return PackedWeight(packed, scale, zero, index, bits, group, columns, layout).multiply_back(x)


@multiply_packed_back.register_fake
def _multiply_back_shape(x, packed, scale, zero, index, bits, group, columns, layout):
    return x.new_empty(len(x), columns)


def _keep_parts(ctx, inputs, output):
    _, packed, scale, zero, index, *ctx.numbers = inputs
    ctx.save_for_backward(packed, scale, zero, index)


def _gradient(ctx, grad):
    return multiply_packed_back(grad, *ctx.saved_tensors, *ctx.numbers), *[None] * 8


multiply_packed.register_autograd(_gradient, setup_context=_keep_parts)


class ScaledProduct(torch.autograd.Function):
    """x W^T for W = s e^g (c - zero), with gradients with respect to x and to g, [out, groups].

    dW / dg is W itself, so the gradient of a group's g is the sum of W (dL / dW) over the group. As
    everywhere here only some rows are unpacked at once.
    """

    @staticmethod
    def forward(ctx, x: Tensor, growth: Tensor, weight: PackedWeight) -> Tensor:
        ctx.save_for_backward(x, growth)
        ctx.weight = weight
        return _grown(weight, growth).multiply(x)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple:
        x, growth = ctx.saved_tensors
        weight = _grown(ctx.weight, growth)
        back = weight.multiply_back(grad) if ctx.needs_input_grad[0] else None
        index = weight.index
        if index is None:
            index = torch.arange(weight.columns, device=x.device) // weight.group
        moved = torch.zeros_like(growth)
        for start, stop in weight.steps():
            rows = slice(start, stop)
            product = (grad[:, rows].T @ x) * weight.dense(rows, x.dtype)
            moved[rows].index_add_(1, index, product.to(moved.dtype))
        return back, moved, None


def _grown(weight: PackedWeight, growth: Tensor) -> PackedWeight:
    return replace(weight, scale=weight.scale.float() * growth.detach().exp())


@torch.library.custom_op("slim::packed_rows", mutates_args=())
def packed_rows(
    rows: Tensor,
    packed: Tensor,
    scale: Tensor,
    zero: Tensor,
    index: Tensor | None,
    bits: int,
    group: int,
    columns: int,
    layout: str,
    dtype: torch.dtype,
) -> Tensor:
    """Return rows of the matrix, [n, in] in ``dtype``, for int64 [n].

    packed, scale, zero, index, bits, group, columns and layout are those of :class:`PackedWeight`.
    """
    return PackedWeight(packed, scale, zero, index, bits, group, columns, layout).dense(rows, dtype)


@packed_rows.register_fake
def _rows_shape(rows, packed, scale, zero, index, bits, group, columns, layout, dtype):
    return scale.new_empty(len(rows), columns, dtype=dtype)


def expand(codes: Tensor, scale: Tensor, zero: Tensor, group: int) -> Tensor:
    """Return scale (c - zero), [rows, in], exact except for the rounding of the product.

    Args:
        codes: [rows, in], in the type of the result.
        scale: [rows, groups].
        zero: zero points, [rows, groups].
        group: columns in a group.
    """
    groups, width = scale.shape[-1], codes.shape[-1]
    if width < groups * group:  # files of others may have a last group that is not full
        codes = nn.functional.pad(codes, (0, groups * group - width))
    steps = codes.view(len(codes), groups, group).sub_(zero.to(codes.dtype).unsqueeze(-1))
    return scaled(steps, scale).flatten(1)[:, :width]


def scaled(steps: Tensor, scale: Tensor) -> Tensor:
    """Return steps times scale, in place where the types are the same.

    Args:
        steps: [rows, groups, group].
        scale: [rows, groups].
    """
    if scale.dtype == steps.dtype:
        return steps.mul_(scale.unsqueeze(-1))
    return (steps.float() * scale.float().unsqueeze(-1)).to(steps.dtype)

"""Multiplying with packed weights by unpacking some rows at a time: no dense copy of a layer ever
exists.

Codes stand in one of three layouts:

- ``stream``: int32 [out, ceil(in b / 32)], as stored (``packing.py``).
- ``tiles``: 4 bits in the layout of torch's CPU kernel, uint8 [out / 64, in, 32]: byte j of column
k has the code of row j
  in its low half and that of row j + 32 in its high half.
- ``int8``: 8 bits around 0, int8 [out, in], one scale per row, as torch's int8 kernel takes them.

:func:`multiply_packed` and :func:`packed_rows` are the same as custom operators, which
``torch.compile`` takes as they are, and the former has a gradient with respect to its input, for
adapters on top of packed weights."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields

import torch
from torch import Tensor, nn

from slim.quantization.kernels.packing import lookup, unpack_as

STREAM, TILES, INT8 = "stream", "tiles", "int8"
TILE = 64  # output features in a tile
CHUNK = 2**20  # weights that are unpacked at once


@dataclass(frozen=True)
class PackedWeight:
    """A weight matrix [out, in] as it is held.

    packed: the codes in ``layout``. scale: [out, groups]. zero: uint8 [out, groups]. index: int64
    [in], the group of every column, or None: column // group. columns: in."""

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
        """Cut the rows into runs (start, stop) that are unpacked at once; all but the last are
        whole tiles."""
        outputs = self.scale.shape[0]
        step = max(TILE, CHUNK // self.columns // TILE * TILE)
        for start in range(0, outputs, step):
            yield start, min(start + step, outputs)

    def multiply(self, x: Tensor) -> Tensor:
        """Return x W^T, [rows, out], for x [rows, in]."""
        result = x.new_empty(len(x), self.scale.shape[0])
        for start, stop in self.steps():
            if self.layout == TILES:
                result[:, start:stop] = self._multiply_tiles(x, start, stop)
            elif self.layout == INT8:
                result[:, start:stop] = (x @ self.packed[start:stop].to(x.dtype).T) * self.scale[
                    start:stop, 0
                ].to(x.dtype)
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
        """Return rows of the matrix, [n, in]; ``rows`` is a slice or int64 [n]."""
        scale, zero = self.scale[rows], self.zero[rows]
        if self.layout == INT8:
            return scaled(self.packed[rows].to(dtype).unsqueeze(1), scale).flatten(1)
        codes = (
            self._tile_rows(rows, dtype)
            if self.layout == TILES
            else unpack_as(self.packed[rows], self.bits, self.columns, dtype)
        )
        if self.index is None:
            return expand(codes, scale, zero, self.group)
        return expand(codes, scale[:, self.index], zero[:, self.index], 1)

    def _tile_rows(self, rows: slice | Tensor, dtype: torch.dtype) -> Tensor:
        if isinstance(rows, slice):
            return codes_of_tiles(self.packed[rows.start // TILE : -(-rows.stop // TILE)])[
                : rows.stop - rows.start
            ].to(dtype)
        place = rows % TILE
        octets = self.packed[rows // TILE, :, place % (TILE // 2)]
        return torch.where((place < TILE // 2).unsqueeze(-1), octets & 15, octets >> 4).to(dtype)

    def _multiply_tiles(self, x: Tensor, start: int, stop: int) -> Tensor:
        """Multiply with rows ``start`` to ``stop``, whole tiles; the tiles hold W^T, so that is
        unpacked."""
        scale, zero = in_tiles(self.scale[start:stop]), in_tiles(self.zero[start:stop]).to(x.dtype)
        dense = lookup(self.packed[start // TILE : stop // TILE], 4, 8, x.dtype)
        dense = dense.view(*scale.shape[:2], -1, scale.shape[-1])
        dense = dense.sub_(zero).mul_(scale).view(len(scale), self.columns, TILE)
        return out_of_tiles(x @ dense.transpose(0, 1).reshape(self.columns, -1))


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
    """Return x W^T, [rows, out], for x [rows, in] and the parts of a :class:`PackedWeight`."""
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
    """Return x W, [rows, in], for x [rows, out] and the parts of a :class:`PackedWeight`."""
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
    """Return rows of the matrix, [n, in] in ``dtype``, for int64 [n] and the parts of a
    :class:`PackedWeight`."""
    return PackedWeight(packed, scale, zero, index, bits, group, columns, layout).dense(rows, dtype)


@packed_rows.register_fake
def _rows_shape(rows, packed, scale, zero, index, bits, group, columns, layout, dtype):
    return scale.new_empty(len(rows), columns, dtype=dtype)


def expand(codes: Tensor, scale: Tensor, zero: Tensor, group: int) -> Tensor:
    """Return scale (c - zero) in the type of ``codes`` [rows, in], exact but for the rounding of
    the product."""
    groups, width = scale.shape[-1], codes.shape[-1]
    if width < groups * group:  # files of others may have a last group that is not full
        codes = nn.functional.pad(codes, (0, groups * group - width))
    steps = codes.view(len(codes), groups, group).sub_(zero.to(codes.dtype).unsqueeze(-1))
    return scaled(steps, scale).flatten(1)[:, :width]


def scaled(steps: Tensor, scale: Tensor) -> Tensor:
    """Return ``steps`` [rows, groups, group] times ``scale`` [rows, groups], in place where the
    types are the same."""
    if scale.dtype == steps.dtype:
        return steps.mul_(scale.unsqueeze(-1))
    return (steps.float() * scale.float().unsqueeze(-1)).to(steps.dtype)


def in_tiles(per_group: Tensor) -> Tensor:
    """Return scales or zero points [64 n, groups] as [n, groups, 1, 512], features in a tile's
    order 0, 32, 1, 33, ...

    The 64 features are there eight times, for as many columns: short inner loops cost more than the
    copies."""
    halves = per_group.unflatten(0, (-1, 2, TILE // 2))
    return halves.permute(0, 3, 2, 1).flatten(-2).repeat(1, 1, 8).unsqueeze(2)


def out_of_tiles(results: Tensor) -> Tensor:
    """Return results [rows, 64 n] with features in a tile's order with them in their own."""
    return results.unflatten(-1, (-1, TILE // 2, 2)).transpose(2, 3).flatten(1)


def codes_of_tiles(tiles: Tensor) -> Tensor:
    """Return codes uint8 [64 n, in] of tiles, uint8 [n, in, 32]."""
    codes = torch.cat((tiles & 15, tiles >> 4), dim=-1)
    return codes.transpose(1, 2).reshape(-1, tiles.shape[1])

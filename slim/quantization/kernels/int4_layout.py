"""Where torch's int4 kernel for CPUs puts the codes of a weight matrix.

``_convert_weight_to_int4pack_for_cpu`` arranges codes as the kernel of this CPU wants them: in
tiles of 64 rows under AVX-512, of 32 under AVX2, and otherwise under no vector instructions. torch
documents none of it, and to multiply long inputs the codes have to be read back. So the arrangement
is not assumed but learned, once per process: a matrix of known codes is packed, and every half byte
says which row it came from.
"""

from __future__ import annotations

import math
import threading
from dataclasses import dataclass
from functools import cache, cached_property

import torch
from torch import Tensor

from slim.quantization.kernels.packing import unpack

CHUNK = 2**20  # codes that are rearranged at once: they are four bytes each on the way
BITS_OF_128 = 0x4300  # in bfloat16, which has 7 bits after the point
TILE_ROWS = (16, 32, 64, 128)  # sizes of tiles that are recognized


@dataclass(frozen=True)
class TileLayout:
    """An arrangement in which each tile of rows is stored as uint8 [in, rows / 2].

    Attributes:
        rows: rows of the weight matrix in a tile.
        order: the row within the tile whose code is in the low half of byte 0 of each column, in
            its high half, in the low half of byte 1, ...
    """

    rows: int
    order: tuple[int, ...]

    @cached_property
    def place(self) -> tuple[int, ...]:
        """For every row of a tile its place in ``order``."""
        return tuple(sorted(range(self.rows), key=self.order.__getitem__))

    @cached_property
    def steps(self) -> tuple[int, int]:
        """Rows from a byte to the next, and from the low half of a byte to its high half."""
        return self.order[2] - self.order[0], self.order[1] - self.order[0]

    @property
    def is_regular(self) -> bool:
        """Whether the row of every half byte is a sum of these steps."""
        octet, high = self.steps
        rows = torch.arange(self.rows // 2).view(-1, 1) * octet + torch.tensor([0, high])
        return rows.flatten().tolist() == list(self.order)

    def unpack_halves(self, tiles: Tensor, name: str = "codes") -> Tensor:
        """Return 128 plus the codes of W^T in bfloat16, by few operations and simple ones.

        The code is put into the last bits of the bfloat16 number 128, so nothing is converted. The
        rows of all low halves come first, then those of all high halves.

        Args:
            tiles: uint8 [n, in, rows / 2].
            name: of the scratch memory that holds the result until the next call.

        Returns:
            bfloat16 [in, n rows]; :meth:`to_halves` and :meth:`from_halves` know the order.
        """
        count, columns, width = tiles.shape
        by_column = scratch("packed", (columns, count, width // 8), torch.int64)
        by_column.copy_(tiles.view(torch.int64).transpose(0, 1))
        octets = scratch("octets", (columns, count * width), torch.int16)
        octets.copy_(by_column.view(columns, -1).view(torch.uint8))
        codes = scratch(name, (columns, 2, count * width), torch.int16)
        torch.bitwise_and(octets, 15, out=codes[:, 0])
        torch.bitwise_right_shift(octets, 4, out=codes[:, 1])
        return codes.bitwise_or_(BITS_OF_128).view(torch.bfloat16).flatten(1)

    def to_halves(self, per_row: Tensor) -> Tensor:
        """Bring scales or zero points, [n rows, groups], into the order of :meth:`unpack_halves`.

        Returns:
            [groups, n rows].
        """
        octet, high = self.steps
        octets = self.rows // 2
        if octet < high:
            tiles = per_row.T.unflatten(-1, (-1, 2, octets)).transpose(1, 2)
        else:
            tiles = per_row.T.unflatten(-1, (-1, octets, 2)).permute(0, 3, 1, 2)
        return tiles.reshape(len(tiles), -1).contiguous()

    def from_halves(self, results: Tensor) -> Tensor:
        """Bring results [m, n rows] in the order of :meth:`unpack_halves` into that of the rows.

        Returns:
            A view that, flattened from its second dimension on, has a row's results in order.
        """
        octet, high = self.steps
        halves = results.unflatten(-1, (2, -1, self.rows // 2))
        return halves.transpose(1, 2) if octet < high else halves.permute(0, 2, 3, 1)

    def tiles_of(self, words: Tensor, bits: int, columns: int, shift: int) -> Tensor:
        """Arrange packed codes in tiles.

        Args:
            words: the stored stream, int32 [out, ceil(in b / 32)].
            bits: b, at most 4.
            columns: in.
            shift: added to every code; the result is at most 15.

        Returns:
            uint8 [ceil(out / rows), in, rows / 2]; rows that the last tile has in excess are 0.
        """
        count = -(-len(words) // self.rows)
        tiles = torch.empty(count, columns, self.rows // 2, dtype=torch.uint8)
        step = max(1, CHUNK // columns // self.rows)
        for start in range(0, count, step):
            part = words[self.rows * start : self.rows * (start + step)]
            codes = unpack(part, bits, columns).int() + shift
            tiles[start : start + step] = self._arrange(codes)
        return tiles

    def halves_of(self, words: Tensor, columns: int) -> Tensor:
        """Arrange codes of 8 bits in two sets of tiles: their high and their low four bits.

        Args:
            words: the stored stream, int32 [out, in / 4].
            columns: in.

        Returns:
            uint8 [2, ceil(out / rows), in, rows / 2].
        """
        count = -(-len(words) // self.rows)
        tiles = torch.empty(2, count, columns, self.rows // 2, dtype=torch.uint8)
        step = max(1, CHUNK // columns // self.rows)
        for start in range(0, count, step):
            part = words[self.rows * start : self.rows * (start + step)]
            codes = unpack(part, 8, columns).int()
            tiles[0, start : start + step] = self._arrange(codes >> 4)
            tiles[1, start : start + step] = self._arrange(codes & 15)
        return tiles

    def _arrange(self, codes: Tensor) -> Tensor:
        """Return int32 codes [n, in], filled up to whole tiles, in tiles."""
        excess = -len(codes) % self.rows
        codes = torch.nn.functional.pad(codes, (0, 0, 0, excess)).contiguous()
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
        return packed.view(-1, codes.shape[1], self.rows // 2)

    def codes(self, tiles: Tensor) -> Tensor:
        """Return the codes, uint8 [n rows, in], of tiles, uint8 [n, in, rows / 2]."""
        halves = torch.stack((tiles & 15, tiles >> 4), dim=-1).flatten(-2)  # rows in ``order``
        rows = halves.transpose(1, 2)[:, list(self.place)]
        return rows.reshape(-1, tiles.shape[1])


class _Scratch(threading.local):
    """Memory that is used again and again, for every thread its own.

    The system hands out larger blocks page by page, which takes as long as what is done in them.
    """

    def __init__(self) -> None:
        self.blocks: dict[str, Tensor] = {}


_scratch = _Scratch()


def scratch(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Return memory on the CPU that nobody else uses in this thread until the same name is asked
    for again; what it holds is undefined.

    Args:
        name: what for.
        shape: of the tensor.
        dtype: of the tensor.
    """
    size = math.prod(shape) * dtype.itemsize
    block = _scratch.blocks.get(name)
    if block is None or len(block) < size:
        with torch.inference_mode(False):  # usable outside of it too
            block = torch.empty(size, dtype=torch.uint8)
        _scratch.blocks[name] = block
    return block[:size].view(dtype).view(shape)


@cache
def int4_layout() -> TileLayout | None:
    """Return the arrangement that this CPU's int4 kernel takes; None if there is no kernel."""
    largest = TILE_ROWS[-1]
    rows = torch.arange(largest, dtype=torch.int32).repeat_interleave(64).view(largest, 64)
    try:
        low = _packed_halves(rows & 15)
        high = _packed_halves(rows >> 4)
    except (RuntimeError, AttributeError, NotImplementedError):
        return None
    source = low + 16 * high  # the row that each half byte comes from, in the order of storage
    for size in TILE_ROWS:
        layout = TileLayout(size, tuple(source[:size].tolist()))
        if layout.is_regular and _reads_back(layout):
            return layout
    return None


def _packed_halves(codes: Tensor) -> Tensor:
    """Pack int32 codes [rows, in]; return the half bytes in the order of storage, int64 [n]."""
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1).flatten()
    return torch.stack((packed & 15, packed >> 4), dim=-1).flatten().long()


def _reads_back(layout: TileLayout) -> bool:
    """Whether codes without any pattern, packed by torch, are read back by ``layout``."""
    rows, columns = 2 * layout.rows, 96
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 16, (rows, columns), dtype=torch.int32, generator=generator)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
    return torch.equal(layout.codes(packed.view(-1, columns, layout.rows // 2)).int(), codes)

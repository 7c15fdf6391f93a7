"""One dense bit stream, least significant bit first: integers of 1 to 8 bits in int32 words.

Along a row, code k occupies bits [k b, (k + 1) b) of the stream, whatever b; a code may straddle
two words. The last word of a row is filled with zeros. This is the layout of compressed-tensors'
``pack-quantized``, and along the other dimension that of GPTQ. Eight codes of b bits are exactly b
bytes, so both directions work on eight codes at a time.

For running, codes are wanted as floating-point numbers and fast: 8 or 12 bits of the stream, a
whole number of codes, are one index into a small table whose entries are those codes side by side
(:func:`unpack_as`).
"""

from __future__ import annotations

import math
from functools import cache
from typing import TYPE_CHECKING

from slim.core.lazy import LazyModule

if TYPE_CHECKING:
    import torch
else:
    torch = LazyModule("torch")

MAX_BITS = 8
EIGHT = 8  # codes that together fill whole bytes at every width
CHUNK = 2**20  # codes that are packed or moved at once


def words_per_row(codes: int, bits: int) -> int:
    """Return the number of int32 words that a row takes.

    Args:
        codes: integers in the row.
        bits: of each.
    """
    return math.ceil(codes * bits / 32)


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Pack unsigned codes.

    Args:
        codes: [..., n], any integer dtype, 0 <= code < 2^bits.
        bits: of each, 1 to 8.

    Returns:
        int32 [..., ceil(n bits / 32)].

    Raises:
        ValueError: for other widths.
    """
    _require_bits(bits)
    lead, count = codes.shape[:-1], codes.shape[-1]
    rows = codes.reshape(-1, count)
    words = torch.zeros(
        len(rows), words_per_row(count, bits), dtype=torch.int32, device=codes.device
    )
    step = max(1, CHUNK // max(1, count))  # the steps between take 24 bytes per code
    for start in range(0, len(rows), step):
        _pack_rows(rows[start : start + step], bits, words[start : start + step])
    return words.view(*lead, words.shape[1])


def _pack_rows(codes: torch.Tensor, bits: int, words: torch.Tensor) -> None:
    """Pack codes [rows, n] into zeroed ``words`` [rows, m]."""
    filled = words.view(torch.uint8)
    join = _bytes_of if MAX_BITS % bits == 0 else _bytes_of_eights
    octets = join(codes, bits)
    # the two differ by what fills up the last eight codes and the last word: zeros
    filled[:, : octets.shape[-1]] = octets[:, : filled.shape[-1]]


def _bytes_of(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Join codes [rows, n] to bytes for widths of which whole numbers fit into one: 1, 2, 4, 8."""
    per_byte = MAX_BITS // bits
    parts = torch.nn.functional.pad(
        codes.to(torch.uint8), (0, -codes.shape[-1] % per_byte)
    ).unflatten(-1, (-1, per_byte))
    octets = parts[..., 0].clone()
    for index in range(1, per_byte):
        octets |= parts[..., index] << (bits * index)
    return octets


def _bytes_of_eights(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Join codes [rows, n] to bytes, eight codes at a time."""
    count = codes.shape[-1]
    eights = torch.nn.functional.pad(codes.to(torch.int64), (0, -count % EIGHT)).unflatten(
        -1, (-1, EIGHT)
    )
    shifts = torch.arange(EIGHT, device=codes.device) * bits
    # bits of different codes do not overlap: a sum is an "or"
    stream = (eights << shifts).sum(-1, keepdim=True)
    return stream.view(torch.uint8)[..., :bits].flatten(-2)


def unpack(words: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    """Return the first codes of each row, uint8 [..., count].

    Args:
        words: int32 [..., m].
        bits: of each code, 1 to 8.
        count: how many.

    Raises:
        ValueError: for other widths.
    """
    _require_bits(bits)
    octets = words.contiguous().view(torch.uint8)
    if bits == MAX_BITS:
        return octets[..., :count]
    if MAX_BITS % bits == 0:
        return _unpack_bytes(octets, bits)[..., :count]
    lead = octets.shape[:-1]
    needed = bits * math.ceil(count / EIGHT)
    if octets.shape[-1] < needed:
        octets = torch.nn.functional.pad(octets, (0, needed - octets.shape[-1]))
    stream = _join_bytes(octets[..., :needed].unflatten(-1, (-1, bits)))
    codes = torch.empty(*stream.shape, EIGHT, dtype=torch.uint8, device=words.device)
    for index in range(EIGHT):
        codes[..., index] = (stream >> (bits * index)) & (2**bits - 1)
    return codes.reshape(*lead, -1)[..., :count]


def _unpack_bytes(octets: torch.Tensor, bits: int) -> torch.Tensor:
    """Unpack widths of which whole numbers fit into a byte: 1, 2, 4."""
    parts = [(octets >> shift) & (2**bits - 1) for shift in range(0, 8, bits)]
    return torch.stack(parts, dim=-1).flatten(-2)


def _join_bytes(octets: torch.Tensor) -> torch.Tensor:
    """Join bytes [..., b] to integers [...], the first byte lowest; int32 where 24 bits suffice."""
    wide = torch.int32 if octets.shape[-1] <= 3 else torch.int64
    stream = octets[..., 0].to(wide)
    for index in range(1, octets.shape[-1]):
        stream |= octets[..., index].to(wide) << (8 * index)
    return stream


def unpack_as(words: torch.Tensor, bits: int, count: int, dtype: torch.dtype) -> torch.Tensor:
    """Return what :func:`unpack` does as floating-point numbers, new [rows, count].

    Args:
        words: int32 [rows, m].
        bits: of each code.
        count: codes per row.
        dtype: of the result.
    """
    # otherwise padding would have to be cut out of every row
    if bits in (2, 4) and count * bits % 32 == 0:
        return lookup(words.contiguous().view(torch.uint8), bits, 8, dtype).view(len(words), count)
    if bits == 3 and count % EIGHT == 0:
        octets = (
            words.contiguous().view(torch.uint8)[:, : 3 * count // EIGHT].unflatten(-1, (-1, 3))
        )
        stream = _join_bytes(octets)
        fields = torch.stack((stream & 4095, stream >> 12), dim=-1)
        return lookup(fields, bits, 12, dtype).view(len(words), count)
    return unpack(words, bits, count).to(dtype)


def lookup(fields: torch.Tensor, bits: int, width: int, dtype: torch.dtype) -> torch.Tensor:
    """Return the codes in some fields of a stream as floating-point numbers, [n].

    Args:
        fields: integers of ``width`` bits, any shape; their codes follow one another.
        bits: of each code.
        width: bits of a field, a whole number of codes.
        dtype: of the result.
    """
    table = _table(bits, width, dtype, str(fields.device))
    return table.index_select(0, fields.reshape(-1).to(torch.int32)).view(dtype)


@cache
def _table(bits: int, width: int, dtype: torch.dtype, device: str) -> torch.Tensor:
    """Return all 2^width fields decoded, [2^width], for one index_select to copy several codes.

    One entry is one element of a type as wide as its codes together."""
    fields = torch.arange(2**width, device=device)
    codes = torch.stack(
        [(fields >> shift) & (2**bits - 1) for shift in range(0, width, bits)], dim=-1
    )
    element = {4: torch.int32, 8: torch.int64, 16: torch.complex128}[
        codes.shape[-1] * dtype.itemsize
    ]
    return codes.to(dtype).contiguous().view(element).view(-1)


def pack_columns(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Pack along the first dimension.

    Args:
        codes: [n, m].
        bits: of each.

    Returns:
        int32 [ceil(n bits / 32), m].
    """
    return pack(codes.T, bits).T.contiguous()


def unpack_columns(words: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    """Return what :func:`pack_columns` packed, uint8 [count, m].

    Args:
        words: int32 [ceil(count bits / 32), m].
        bits: of each code.
        count: codes per column.
    """
    return unpack(words.T, bits, count).T.contiguous()


def permute_columns(words: torch.Tensor, bits: int, order: torch.Tensor) -> torch.Tensor:
    """Return packed rows with the codes of every row in another order, int32 [rows, m].

    Args:
        words: int32 [rows, m].
        bits: of each code.
        order: int64 [in]; new code k is old code order[k].
    """
    moved = torch.empty_like(words)
    step = max(1, CHUNK // len(order))
    for start in range(0, len(words), step):
        codes = unpack(words[start : start + step], bits, len(order))
        moved[start : start + step] = pack(codes.index_select(1, order), bits)
    return moved


def _require_bits(bits: int) -> None:
    if not 1 <= bits <= MAX_BITS:
        raise ValueError(f"{bits} bits cannot be packed; 1 to {MAX_BITS} can")

"""The dense bit stream, against a reference that writes one bit after the other."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from slim.quantization.kernels.packing import (
    pack,
    pack_columns,
    permute_columns,
    unpack,
    unpack_as,
    unpack_columns,
    words_per_row,
)


def pack_bit_by_bit(codes: list[int], bits: int) -> list[int]:
    """Words of the stream as unsigned numbers: bit j of code k is bit k b + j of the stream."""
    words = [0] * -(-len(codes) * bits // 32)
    for position, code in enumerate(codes):
        for bit in range(bits):
            place = position * bits + bit
            words[place // 32] |= (code >> bit & 1) << (place % 32)
    return words


@st.composite
def code_matrices(draw):
    bits = draw(st.integers(1, 8))
    rows, columns = draw(st.integers(1, 5)), draw(st.integers(1, 150))
    seed = draw(st.integers(0, 2**31 - 1))
    generator = torch.Generator().manual_seed(seed)
    return bits, torch.randint(0, 2**bits, (rows, columns), dtype=torch.uint8, generator=generator)


@settings(max_examples=200, deadline=None)
@given(code_matrices())
def test_stream_equals_the_reference_and_comes_back(case):
    bits, codes = case
    words = pack(codes, bits)
    assert words.dtype == torch.int32
    assert words.shape == (codes.shape[0], words_per_row(codes.shape[1], bits))
    for row, packed in zip(codes.tolist(), words.tolist(), strict=True):
        assert [word % 2**32 for word in packed] == pack_bit_by_bit(row, bits)
    assert torch.equal(unpack(words, bits, codes.shape[1]), codes)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert torch.equal(unpack_as(words, bits, codes.shape[1], dtype), codes.to(dtype))


@settings(max_examples=50, deadline=None)
@given(code_matrices())
def test_columns_are_rows_of_the_transpose(case):
    bits, codes = case
    words = pack_columns(codes, bits)
    assert torch.equal(words, pack(codes.T.contiguous(), bits).T)
    assert torch.equal(unpack_columns(words, bits, codes.shape[0]), codes)


@settings(max_examples=50, deadline=None)
@given(code_matrices())
def test_compressed_tensors_packs_the_same(case):
    helpers = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    bits, codes = case
    signed = (codes.int() - 2 ** (bits - 1)).to(torch.int8)
    assert torch.equal(helpers.pack_to_int32(signed, bits), pack(codes, bits))
    assert torch.equal(helpers.pack_to_int32(signed, bits, packed_dim=0), pack_columns(codes, bits))


@settings(max_examples=50, deadline=None)
@given(code_matrices())
def test_codes_change_places_within_their_rows(case):
    bits, codes = case
    order = torch.randperm(codes.shape[1], generator=torch.Generator().manual_seed(codes.shape[1]))
    moved = permute_columns(pack(codes, bits), bits, order)
    for row, packed in zip(codes.tolist(), moved.tolist(), strict=True):
        assert [word % 2**32 for word in packed] == pack_bit_by_bit(
            [row[place] for place in order.tolist()], bits
        )


@pytest.mark.parametrize("bits", [3, 4])
def test_work_in_parts_changes_nothing(bits, monkeypatch):
    codes = torch.randint(
        0, 2**bits, (7, 45), dtype=torch.uint8, generator=torch.Generator().manual_seed(1)
    )
    order = torch.arange(45).flip(0)
    whole, moved = pack(codes, bits), permute_columns(pack(codes, bits), bits, order)
    # two rows at once, the last one alone
    monkeypatch.setattr("slim.quantization.kernels.packing.CHUNK", 100)
    assert torch.equal(pack(codes, bits), whole)
    assert torch.equal(permute_columns(whole, bits, order), moved)


def test_leading_dimensions_and_signed_input():
    codes = torch.randint(0, 8, (2, 3, 11))
    words = pack(codes, 3)
    assert words.shape == (2, 3, 2)
    assert torch.equal(unpack(words, 3, 11).long(), codes)


@pytest.mark.parametrize("bits", [0, 9])
def test_widths_outside_the_range(bits):
    with pytest.raises(ValueError, match="cannot be packed"):
        pack(torch.zeros(1, 8, dtype=torch.uint8), bits)

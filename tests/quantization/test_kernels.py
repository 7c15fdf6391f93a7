"""Kernels under every instruction set that torch can be limited to, and how layers use them."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from slim.quantization.formats.base import Packed
from slim.quantization.kernels import int4_layout, linear, multiply
from slim.quantization.kernels.linear import QuantLinear
from slim.quantization.kernels.packing import pack
from slim.quantization.scheme import Scheme
from slim.quantization.solvers.grid import minmax

PROBE = """
import torch
from slim.quantization.kernels import linear
from slim.quantization.scheme import Scheme
from tests.quantization.test_kernels import layer_of, relative

linear.int4_kernel_is_fast = lambda: True  # also without vector instructions
print(torch.backends.cpu.get_cpu_capability(), linear.int4_layout().rows)
schemes = Scheme(4, 32, False), Scheme(3, -1, True), Scheme(2, 64, False), Scheme(8, 64, False)
for scheme in schemes:
    layer, dense = layer_of(80, 192, scheme, torch.bfloat16)
    assert "int4" in layer.kernel
    assert torch.equal(layer.dense_weight(), dense)
    for count in (1, 60, 160):
        x = torch.randn(count, 192).bfloat16()
        assert relative(layer(x).double(), x.double() @ dense.double().T) < 6e-3, (scheme, count)
    ids = torch.tensor([79, 0, 33])
    assert relative(layer.rows(ids).double(), dense[ids].double()) < 4e-3
"""


def layer_of(rows, columns, scheme, dtype, **choice):
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(8))
    quantized = minmax(weight, scheme, torch.bfloat16)
    stored = Packed(pack(quantized.codes, scheme.bits), quantized.scale, quantized.zero, None)
    layer = QuantLinear(columns, rows, scheme, dtype).take(stored).choose_kernel(**choice)
    return layer, quantized.dequantize()


def relative(value, expected):
    return float((value - expected).norm() / expected.norm())


@pytest.mark.parametrize(("capability", "rows"), [("avx512", 64), ("avx2", 32), ("default", 32)])
def test_the_layout_is_learned_whatever_the_instruction_set(capability, rows):
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": capability, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [sys.executable, "-c", PROBE], env=environment, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr
    used, tile = result.stdout.split()
    if used.lower() != capability:
        pytest.skip(f"this CPU has no {capability}")
    assert int(tile) == rows


def test_an_arrangement_that_is_not_understood_is_not_used(monkeypatch):
    shuffled = torch.randperm(128 * 32, generator=torch.Generator().manual_seed(0))

    def convert(codes, tiles):
        places = shuffled[shuffled < codes.numel() // 2]
        halves = codes.flatten().view(-1, 2).to(torch.uint8)[places]
        return (halves[:, 0] | halves[:, 1] << 4).view(len(codes), -1)

    int4_layout.int4_layout.cache_clear()
    monkeypatch.setattr(int4_layout, "_packed_halves", lambda codes: convert(codes, 1).flatten())
    assert int4_layout.int4_layout() is None
    int4_layout.int4_layout.cache_clear()


def require_int4():
    if not (linear.int4_layout() and linear.int4_kernel_is_fast()):
        pytest.skip("torch's int4 kernel on this CPU is a plain loop")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("bits", [3, 8])
def test_other_types_round_few_rows_only_when_asked(bits, dtype):
    require_int4()
    scheme = Scheme(bits, 64, False)
    exact, dense = layer_of(64, 128, scheme, dtype)
    rounding, _ = layer_of(64, 128, scheme, dtype, mixed=True)
    assert exact.kernel is None and "int4" in rounding.kernel
    few, many = torch.randn(2, 128).to(dtype), torch.randn(200, 128).to(dtype)
    assert rounding(few).dtype == dtype
    assert 1e-4 < relative(rounding(few).double(), few.double() @ dense.double().T) < 6e-3
    exactness = 1e-6 if dtype == torch.float32 else 1e-3
    for x in (few, many):
        assert relative(exact(x).double(), x.double() @ dense.double().T) < exactness
    assert relative(rounding(many).double(), many.double() @ dense.double().T) < exactness


def test_long_inputs_are_multiplied_in_the_faster_type(monkeypatch):
    multiply.multiplied_dtype.cache_clear()
    seconds = iter([1.0, 0.5, 1.0, 0.9])
    monkeypatch.setattr(multiply, "shortest", lambda call: next(seconds))
    assert multiply.multiplied_dtype(torch.bfloat16, "cpu") == torch.float32
    assert multiply.multiplied_dtype(torch.float16, "cpu") == torch.float16  # nearly a tie
    assert multiply.multiplied_dtype(torch.float32, "cpu") == torch.float32
    assert multiply.multiplied_dtype(torch.bfloat16, "cuda") == torch.bfloat16
    multiply.multiplied_dtype.cache_clear()


def test_no_complete_layer_is_unpacked(monkeypatch):
    require_int4()
    monkeypatch.setattr(multiply, "CHUNK", 128 * 64)
    layer, dense = layer_of(600, 64, Scheme(4, 32, False), torch.bfloat16)
    sizes = []
    original = int4_layout.TileLayout.unpack_halves

    def unpack_halves(*args):
        codes = original(*args)
        sizes.append(codes.numel())
        return codes

    monkeypatch.setattr(int4_layout.TileLayout, "unpack_halves", unpack_halves)
    x = torch.randn(200, 64).bfloat16()
    assert relative(layer(x).double(), x.double() @ dense.double().T) < 6e-3
    assert len(sizes) == 5 and max(sizes) <= 128 * 64


def test_scratch_memory_is_used_again_and_works_outside_of_inference_mode():
    with torch.inference_mode():
        first = int4_layout.scratch("test", (4, 8), torch.float32)
    again = int4_layout.scratch("test", (8, 2), torch.int16)
    assert again.data_ptr() == first.data_ptr()
    again.add_(torch.ones(2, dtype=torch.int16))  # an inference tensor would refuse


def test_results_too_large_to_keep_their_memory_are_the_same(monkeypatch):
    require_int4()
    layer, _ = layer_of(600, 64, Scheme(4, 32, False), torch.bfloat16)
    x = torch.randn(200, 64).bfloat16()
    kept = layer(x)
    monkeypatch.setattr(multiply, "LARGEST_KEPT", 0)
    assert torch.equal(layer(x), kept)

"""Grids and losses, against direct element-by-element computations."""

from __future__ import annotations

import pytest
import torch

from slim.calibration.errors import layer_loss
from slim.quantization.methods.awq import diagonal_blocks
from slim.quantization.methods.scaling import channel_scales
from slim.quantization.scheme import Scheme
from slim.quantization.solvers.error_feedback import refit_scales
from slim.quantization.solvers.grid import (
    Quantized,
    decode,
    encode,
    group_errors,
    limits,
    minmax,
    search,
    shrink_factors,
)

GENERATOR = torch.Generator().manual_seed(0)
SCHEMES = [
    Scheme(bits, group, symmetric)
    for bits in (2, 3, 4, 8)
    for group in (16, -1)
    for symmetric in (True, False)
]


@pytest.fixture
def weight():
    return torch.randn(6, 48, generator=torch.Generator().manual_seed(3)) * torch.linspace(
        0.1, 2, 48
    )


@pytest.fixture
def hessian():
    x = torch.randn(200, 48, generator=torch.Generator().manual_seed(4)) @ torch.randn(
        48, 48, generator=GENERATOR
    )
    return x.T @ x


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_code_is_the_nearest_point_of_its_stored_grid(weight, scheme, dtype):
    layer = minmax(weight, scheme, dtype)
    assert layer.scale.dtype == dtype
    assert layer.codes.dtype == torch.uint8
    group = scheme.group(48)
    for row in range(6):
        for column in range(48):
            scale = layer.scale[row, column // group].double()
            zero = int(layer.zero[row, column // group])
            points = scale * (torch.arange(2**scheme.bits) - zero)
            distance = (points - weight[row, column]).abs()
            chosen = distance[int(layer.codes[row, column])]
            assert chosen <= distance.min() + 1e-5 * scale  # float32 decides ties
            assert layer.dequantize()[row, column].double() == pytest.approx(
                points[int(layer.codes[row, column])].item(), rel=1e-6
            )


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_minmax_error_is_at_most_a_step(weight, scheme):
    layer = minmax(weight, scheme, torch.float32)
    steps = layer.scale.repeat_interleave(scheme.group(48), dim=1)
    assert (
        (layer.dequantize() - weight).abs() <= steps * (0.5 if scheme.symmetric else 1.0) * 1.001
    ).all()
    if scheme.symmetric:
        assert (layer.zero == scheme.middle).all()


def test_zero_and_constant_groups():
    weight = torch.zeros(2, 32)
    weight[1] = 0.75
    layer = minmax(weight, Scheme(4, 32, False), torch.bfloat16)
    torch.testing.assert_close(layer.dequantize(), weight, rtol=5e-3, atol=0)
    assert torch.isfinite(layer.scale).all()


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("weighting", ["plain", "diagonal", "blocks"])
def test_search_is_never_worse_than_minmax_in_any_group(weight, hessian, scheme, weighting):
    importance = {
        "plain": None,
        "diagonal": hessian.diagonal(),
        "blocks": diagonal_blocks(hessian, scheme.group(48)),
    }[weighting]
    groups = scheme.groups(48)
    plain = minmax(weight, scheme, torch.bfloat16)
    found = search(weight, scheme, torch.bfloat16, importance, shrink_factors(10))
    before = group_errors(plain.dequantize() - weight, importance, groups)
    after = group_errors(found.dequantize() - weight, importance, groups)
    assert (after <= before * 1.0001).all()
    if scheme.bits == 2:
        assert after.sum() < 0.95 * before.sum()


def test_group_errors_by_hand(weight, hessian):
    difference, groups = weight, 3
    blocks = diagonal_blocks(hessian, 16)
    for row in range(6):
        for group in range(groups):
            inside = slice(16 * group, 16 * group + 16)
            e, g = difference[row, inside].double(), hessian[inside, inside].double()
            for importance, expected in (
                (None, e @ e),
                (hessian.diagonal(), (e * e) @ g.diagonal()),
                (blocks, e @ g @ e),
            ):
                got = group_errors(difference, importance, groups)[row, group].item()
                assert got == pytest.approx(expected.item(), rel=1e-4)


def test_layer_loss_is_the_output_error():
    x = torch.randn(100, 20, generator=GENERATOR, dtype=torch.float64)
    difference = torch.randn(7, 20, generator=GENERATOR, dtype=torch.float64)
    torch.testing.assert_close(layer_loss(difference, x.T @ x), (x @ difference.T).square().sum(0))


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_refit_solves_least_squares_row_by_row(weight, hessian, bits):
    """Against lstsq on the inputs themselves, codes fixed: wherever a row was refitted it has the
    optimum's loss."""
    scheme = Scheme(bits, 16, False)
    layer = minmax(weight, scheme, torch.float32)
    refitted = refit_scales(weight, layer, hessian)
    before = layer_loss(layer.dequantize() - weight, hessian)
    after = layer_loss(refitted.dequantize() - weight, hessian)
    assert (after <= before * 1.0001).all()
    assert torch.equal(refitted.codes, layer.codes)
    root = torch.linalg.cholesky(hessian.double() + 1e-9 * torch.eye(48)).T  # |root e|^2 = e H e
    for row in range(6):
        steps = (
            layer.codes[row].view(3, 16).double() - layer.zero[row].double().unsqueeze(1)
        ).flatten()
        columns = torch.stack(
            [root[:, 16 * g : 16 * g + 16] @ steps[16 * g : 16 * g + 16] for g in range(3)], dim=1
        )
        best = torch.linalg.lstsq(columns, (root @ weight[row].double()).unsqueeze(1)).solution
        optimum = (
            (columns @ best - (root @ weight[row].double()).unsqueeze(1)).square().sum().item()
        )
        ratio = best.squeeze(1) / layer.scale[row].double()
        if (ratio > 0.5).all() and (ratio < 2).all():
            assert after[row].item() == pytest.approx(optimum, rel=1e-2)


def test_channel_scales_are_shared_and_centred(hessian):
    channel_map = torch.arange(48) // 2
    scales = channel_scales(hessian, 200, channel_map, 0.5)
    assert scales.shape == (24,)
    assert (scales.max() * scales.min()).item() == pytest.approx(1, rel=1e-4)
    magnitude = (hessian.diagonal().view(24, 2).mean(1) / 200).sqrt()
    torch.testing.assert_close(
        scales / scales[0], (magnitude / magnitude[0]).sqrt(), rtol=1e-4, atol=0
    )
    torch.testing.assert_close(channel_scales(hessian, 200, channel_map, 0.0), torch.ones(24))


def test_scaling_rows_of_a_packed_layer_is_exact_in_powers_of_two(weight):
    layer = minmax(weight, Scheme(4, 16, False), torch.bfloat16)
    factors = 2.0 ** torch.arange(-3, 3)
    scaled = Quantized(
        layer.codes, (layer.scale.float() / factors[:, None]).bfloat16(), layer.zero, layer.scheme
    )
    assert torch.equal(scaled.dequantize(), layer.dequantize() / factors[:, None])


def test_encode_decode_are_inverse_on_the_grid():
    scale, zero = torch.full((2, 2), 0.5), torch.tensor([[0, 3], [7, 15]], dtype=torch.uint8)
    codes = torch.arange(16, dtype=torch.uint8).repeat(2, 2)
    assert torch.equal(encode(decode(codes, scale, zero), scale, zero, 16), codes)


def test_limits_contain_zero():
    weight = torch.tensor([[1.0, 2.0, -3.0, -4.0]])
    low, high = limits(weight, Scheme(4, 2, False))
    assert low.tolist() == [[0.0, -4.0]]
    assert high.tolist() == [[2.0, 0.0]]

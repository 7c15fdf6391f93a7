"""HQQ against slow, independent implementations in plain Python floats, and against round to
nearest."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from slim.chain.compose import compose
from slim.checkpoints.stage import Context
from slim.core.errors import SlimError
from slim.loading.load_model import load_model
from slim.quantization.methods import hqq
from slim.quantization.methods.hqq import HQQ, Splitting, half_quadratic, quantize, shrink
from slim.quantization.scheme import Scheme
from slim.quantization.solvers.grid import minmax

SYMMETRIES = pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])


def heavy_tailed(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    """Weights from Student's t distribution with 3 degrees of freedom, about as large as those of a
    model."""
    return (
        torch.from_numpy(np.random.default_rng(seed).standard_t(3, (rows, columns))).float() * 0.02
    )


def lp(difference: torch.Tensor, groups: int, p: float) -> torch.Tensor:
    """|.|_p^p per group, in double precision."""
    return difference.double().unflatten(-1, (groups, -1)).abs().pow(p).sum(-1)


@pytest.mark.parametrize("p", [0.3, 0.7, 0.95])
@pytest.mark.parametrize("beta", [0.5, 10.0])
def test_shrink_minimises_its_penalty(p, beta):
    """The penalty is integrated from its derivative x^(p-1) at e = x - x^(p-1) / beta, the minimum
    found by trying all e."""
    x = np.linspace(beta ** (-1 / (2 - p)), 5, 400_001)
    e = x - x ** (p - 1) / beta
    slope = x ** (p - 1)
    penalty = np.concatenate([[0], np.cumsum(np.diff(e) * (slope[1:] + slope[:-1]) / 2)])
    for value in (0.01, 0.3, 0.9, 1.7, 3.3):
        best = e[np.argmin(penalty + beta / 2 * (e - value) ** 2)]
        for sign in (1, -1):
            assert shrink(torch.tensor(sign * value), beta, p).item() == pytest.approx(
                sign * best, abs=1e-4
            )
    # near the derivative of |e|^p / p for large e
    assert slope[-1] == pytest.approx(e[-1] ** (p - 1), rel=0.3 / beta)


def test_shrink_is_the_soft_threshold_for_p_one():
    x = torch.linspace(-2, 2, 401)
    expected = [math.copysign(max(0.0, abs(value) - 0.25), value) for value in x.tolist()]
    assert torch.allclose(shrink(x, 4.0, 1.0), torch.tensor(expected), atol=1e-6)
    assert shrink(torch.zeros(3), 1e30, 0.1).tolist() == [0, 0, 0]


def slow_steps(group: list[float], scale: float, zero: float, scheme: Scheme, splitting: Splitting):
    """One group, weight by weight, as the blog writes it (but E in steps of the grid, and the scale
    fitted)."""
    beta = splitting.beta
    for _ in range(splitting.steps):
        codes = [min(max(round(w / scale + zero), 0), scheme.levels - 1) for w in group]
        errors = []
        for w, q in zip(group, codes, strict=True):
            x = w / scale - (q - zero)
            size = abs(x) - abs(x) ** (splitting.p - 1) / beta if x else 0.0
            errors.append(math.copysign(max(0.0, size), x) * scale)
        if not scheme.symmetric:
            zero = sum(
                q - (w - e) / scale for w, e, q in zip(group, errors, codes, strict=True)
            ) / len(group)
        above = sum((w - e) * (q - zero) for w, e, q in zip(group, errors, codes, strict=True))
        below = sum((q - zero) ** 2 for q in codes)
        if below > 0 and above > 0:
            scale = above / below
        beta *= splitting.kappa
        yield scale, zero


@SYMMETRIES
@pytest.mark.parametrize("bits", [2, 4])
def test_steps_equal_the_slow_ones(bits, symmetric):
    scheme, splitting = Scheme(bits, 32, symmetric), Splitting(0.6, 3.0, 1.2, 4)
    blocks = heavy_tailed(3, 64).double().unflatten(-1, (2, 32))
    low, high = blocks.amin(-1), blocks.amax(-1)
    if symmetric:
        high = torch.maximum(-low, high)
        low = -high
    scale = (high - low) / (scheme.levels - 1)
    zero = torch.full_like(scale, scheme.middle) if symmetric else -low / scale
    found = list(half_quadratic(blocks, scale, zero, scheme, splitting))
    assert len(found) == 4
    for row in range(3):
        for group in range(2):
            start = scale[row, group].item(), zero[row, group].item()
            slow = list(slow_steps(blocks[row, group].tolist(), *start, scheme, splitting))
            fast = [(s[row, group].item(), z[row, group].item()) for s, z in found]
            assert np.allclose(slow, fast, rtol=1e-9)


@SYMMETRIES
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_every_group_keeps_the_best_grid_as_stored(bits, symmetric):
    """The slow steps give candidates; the best of them and the plain grid, rounded as stored, is
    what must come out."""
    scheme, splitting, dtype = Scheme(bits, 32, symmetric), Splitting(steps=6), torch.bfloat16
    weight = heavy_tailed(4, 64, seed=3)
    plain, found = minmax(weight, scheme, dtype), quantize(weight, scheme, dtype, splitting)
    got = lp(found.dequantize() - weight, 2, splitting.p)
    for row in range(4):
        for group in range(2):
            weights = weight[row, 32 * group : 32 * (group + 1)].tolist()
            start = plain.scale[row, group].item()
            zero = scheme.middle if symmetric else -min(0.0, *weights) / start
            candidates = [
                (start, plain.zero[row, group].item()),
                *slow_steps(weights, start, zero, scheme, splitting),
            ]
            best = min(
                slow_error(weights, *candidate, scheme, splitting.p) for candidate in candidates
            )
            # steps in float32 may round a weight otherwise
            assert got[row, group].item() == pytest.approx(best, rel=1e-3)


def slow_error(group: list[float], scale: float, zero: float, scheme: Scheme, p: float) -> float:
    """l_p error with the scale in bfloat16 and the zero point an integer."""
    scale = torch.tensor(scale).bfloat16().item()
    point = min(max(round(zero), 0), scheme.levels - 1)
    codes = [min(max(round(w / scale) + point, 0), scheme.levels - 1) for w in group]
    return sum(abs(w - scale * (q - point)) ** p for w, q in zip(group, codes, strict=True))


def awkward() -> torch.Tensor:
    """Rows of zeros, one weight, one sign, equal weights, and tiny and large ones."""
    weight = heavy_tailed(8, 128, seed=5)
    weight[0] = 0
    weight[1, :64] = 0
    weight[2] = 0
    weight[2, 7] = 0.5
    weight[3] = weight[3].abs() + 0.1
    weight[4] = -0.25
    weight[5] *= 1e-6
    weight[6] *= 1e4
    return weight


@SYMMETRIES
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_no_group_is_worse_than_round_to_nearest(bits, symmetric, dtype):
    scheme, weight = Scheme(bits, 64, symmetric), awkward()
    # beta leaves the range of float32
    found = quantize(weight, scheme, dtype, Splitting(kappa=10.0, steps=60))
    assert (
        found.scale.dtype == dtype and torch.isfinite(found.scale).all() and (found.scale > 0).all()
    )
    assert int(found.codes.max()) < scheme.levels and int(found.zero.max()) < scheme.levels
    plain = lp(minmax(weight, scheme, dtype).dequantize() - weight, 2, 0.7)
    assert (lp(found.dequantize() - weight, 2, 0.7) <= plain * (1 + 1e-5)).all()
    assert not found.dequantize()[0].any()


@SYMMETRIES
def test_heavy_tails_gain_clearly(symmetric):
    """On 3 bits at least a tenth of the l_p error goes, and the squared error falls too; more at 2
    bits."""
    weight = heavy_tailed(128, 512)
    for bits, share in ((3, 0.9), (2, 0.85)):
        scheme = Scheme(bits, 128, symmetric)
        plain, found = (
            layer.dequantize() - weight
            for layer in (
                minmax(weight, scheme, torch.bfloat16),
                quantize(weight, scheme, torch.bfloat16, Splitting()),
            )
        )
        assert lp(found, 4, 0.7).sum() < share * lp(plain, 4, 0.7).sum()
        assert found.norm() < plain.norm()


def test_the_result_does_not_depend_on_how_rows_are_cut(monkeypatch):
    weight, scheme = heavy_tailed(20, 128), Scheme(3, 64, False)
    whole = quantize(weight, scheme, torch.bfloat16, Splitting())
    monkeypatch.setattr(hqq, "CHUNK", 3 * 128)
    parts = quantize(weight, scheme, torch.bfloat16, Splitting())
    assert all(
        torch.equal(getattr(whole, key), getattr(parts, key)) for key in ("codes", "scale", "zero")
    )


@SYMMETRIES
def test_the_stage_writes_what_it_measured(symmetric, small_llama, tmp_path):
    (tmp_path / "q").mkdir()
    facts = HQQ(3, 32, symmetric).run(small_llama, tmp_path / "q", Context())
    dense, packed = load_model(small_llama), load_model(tmp_path / "q")
    name = "layers.0.mlp.down_proj"
    weight = dense.model.get_submodule(name).weight
    expected = quantize(
        weight.detach(), Scheme(3, 32, symmetric), torch.float32, Splitting()
    ).dequantize()
    inputs = torch.randn(5, 128, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(packed.model.get_submodule(name)(inputs), inputs @ expected.T, atol=1e-4)
    first = ((expected - weight).norm() / weight.norm()).item()
    assert facts["layer_error_max"] >= first >= 0.5 * facts["layer_error_mean"]
    assert facts["bits"] == 3


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"p": 0}, "quant.p=0: .*from 0.1 to 1"),
        ({"p": 1.5}, "quant.p=1.5"),
        ({"beta": -1}, "quant.beta=-1"),
        ({"kappa": 0.9}, "quant.kappa=0.9"),
        ({"steps": 0}, "quant.steps=0: .*whole number"),
        ({"steps": 2.5}, "quant.steps=2.5"),
        ({"bits": 5}, "quant.bits=5"),
    ],
)
def test_wrong_settings_are_refused(settings, message):
    with pytest.raises(SlimError, match=message):
        HQQ(**settings)


def test_the_choice_has_the_defaults_of_the_class():
    from hydra.utils import instantiate

    assert instantiate(compose("compress", ["quant=hqq"]).quantizer) == HQQ()

"""GGUF's types of super-blocks: their bits, the mixes that are named after them, and what they hold
once a calibrated model is written.
"""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from slim.calibration.errors import layer_loss
from slim.checkpoints.checkpoint import open_checkpoint
from slim.core.errors import SlimError
from slim.gguf.blocks import BLOCK_TYPES, row_bytes, unpack_blocks
from slim.gguf.mixes import MIXES, fitting_type, mixed_types
from slim.gguf.packing import pack
from slim.gguf.quantizer import Gguf
from slim.gguf.reader import GgufModel, type_name
from slim.loading.load_model import load_model
from slim.models.spec import ModelSpec
from slim.quantization.solvers.error_feedback import cholesky_factor
from slim.quantization.solvers.super_block_feedback import descend, feed_errors
from slim.quantization.solvers.super_blocks import BlockQuantized, Grids, float16, nearest
from tests.gguf.test_gguf_export import SIZES, checkpoint_of, difference, imported
from tests.gguf.test_gguf_import import load
from tests.support.calibrating import random_calibration
from tests.support.stages import run

K_TYPES = [name for name in BLOCK_TYPES if name.endswith("K")]
WIDE = dict(hidden_size=256, intermediate_size=256, num_hidden_layers=1, head_dim=64)


def random_blocks(name: str) -> BlockQuantized:
    """Codes and grids of 5 rows of 3 blocks, each number anything that it may be."""
    kind = BLOCK_TYPES[name].kind
    generator = torch.Generator().manual_seed(5)

    def whole(limits: tuple[int, int]) -> torch.Tensor:
        shape = (3, kind.size // kind.group, 5)
        return torch.randint(limits[0], limits[1] + 1, shape, generator=generator).float()

    codes = torch.randint(0, kind.top + 1, (5, 3 * kind.size), generator=generator)
    d, e = (float16(torch.randn(3, 5, generator=generator) / 100) for _ in "de")
    grids = Grids(d, e, whole(kind.scales), whole(kind.minimums))
    return BlockQuantized(codes.to(torch.uint8), grids, kind)


@pytest.mark.parametrize("name", BLOCK_TYPES)
def test_the_library_reads_the_numbers_that_are_meant(name):
    layer = random_blocks(name)
    blocks = pack(layer, name)
    assert blocks.shape == (5, row_bytes(name, layer.codes.shape[1]))
    assert torch.equal(unpack_blocks(blocks, name, torch.float32), layer.dequantize())


@pytest.mark.parametrize("name", BLOCK_TYPES)
def test_sizes_are_those_of_the_library(name):
    import gguf

    kind, size = BLOCK_TYPES[name].kind, BLOCK_TYPES[name].size
    assert gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name]] == (kind.size, size)


# The solver ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def problem() -> tuple[torch.Tensor, torch.Tensor]:
    """Weights [16, 512] and the Hessian of inputs that depend on one another."""
    generator = torch.Generator().manual_seed(3)
    mixing = torch.randn(512, 512, generator=generator) * torch.logspace(0, -1, 512)
    inputs = torch.randn(2000, 512, generator=generator) @ mixing
    weight = torch.randn(16, 512, generator=generator) / 20
    return weight, inputs.T @ inputs


def loss(layer: BlockQuantized, problem: tuple[torch.Tensor, torch.Tensor]) -> float:
    weight, hessian = problem
    return float(layer_loss(layer.dequantize() - weight, hessian).sum())


@pytest.mark.parametrize("name", BLOCK_TYPES)
def test_every_step_of_the_solver_lowers_the_loss(name, problem):
    weight, hessian = problem
    kind, diagonal = BLOCK_TYPES[name].kind, hessian.diagonal()
    order = diagonal.argsort(descending=True)
    weighted = nearest(weight, kind, diagonal)
    fed = feed_errors(weight, cholesky_factor(hessian, 0.01, order), kind, diagonal)
    descended = descend(weight, fed, hessian, 2)
    assert loss(fed, problem) < 0.7 * loss(weighted, problem)
    assert loss(descended, problem) < 0.95 * loss(fed, problem)


@pytest.mark.parametrize("name", K_TYPES)
def test_an_error_costs_what_its_column_is_worth(name, problem):
    weight, _ = problem
    kind = BLOCK_TYPES[name].kind
    importance = torch.logspace(0, -4, 512)
    plain, weighted = nearest(weight, kind, torch.ones(512)), nearest(weight, kind, importance)

    def cost(layer: BlockQuantized) -> float:
        return float(((layer.dequantize() - weight).square() * importance).sum())

    assert cost(weighted) < cost(plain)


@pytest.mark.parametrize("name", K_TYPES)
def test_fewer_bits_cost_more(name, problem):
    errors = [loss(nearest(problem[0], BLOCK_TYPES[kind].kind), problem) for kind in K_TYPES]
    assert errors == sorted(errors, reverse=True)


@pytest.mark.parametrize("name", BLOCK_TYPES)
def test_zeros_and_columns_without_input(name):
    weight = torch.zeros(3, 512)
    weight[1, :256] = 1 / 3
    hessian = torch.zeros(512, 512)
    hessian[:4, :4] = torch.eye(4)
    kind = BLOCK_TYPES[name].kind
    cholesky = cholesky_factor(hessian, 0.01, torch.arange(512))
    fed = feed_errors(weight, cholesky, kind, hessian.diagonal())
    values = descend(weight, fed, hessian, 1).dequantize()
    assert torch.allclose(values, weight, atol=0.01)


# Mixes --------------------------------------------------------------------------------------------


def types_of(mix: str, **changes) -> dict[str, Counter]:
    """Part of a block -> how often it has which type, in a Llama of 32 blocks."""
    config = {**SIZES, "model_type": "llama", "num_hidden_layers": 32, **changes}
    counts: dict[str, Counter] = {}
    for layer, name in mixed_types(ModelSpec(config), mix).items():
        counts.setdefault(layer.rpartition(".")[2], Counter())[name] += 1
    return counts


@pytest.mark.parametrize(
    ("mix", "values", "down", "output"),
    [
        ("Q2_K", {"Q3_K": 32}, {"Q3_K": 32}, {"Q3_K": 32}),
        ("Q2_K_S", {"Q2_K": 32}, {"Q4_K": 4, "Q2_K": 28}, {"Q2_K": 32}),
        ("Q3_K_S", {"Q3_K": 32}, {"Q3_K": 32}, {"Q3_K": 32}),
        ("Q3_K_M", {"Q5_K": 2, "Q4_K": 30}, {"Q5_K": 2, "Q4_K": 30}, {"Q4_K": 32}),
        ("Q3_K_L", {"Q5_K": 32}, {"Q5_K": 32}, {"Q5_K": 32}),
        ("Q4_K_S", {"Q5_K": 4, "Q4_K": 28}, {"Q5_K": 4, "Q4_K": 28}, {"Q4_K": 32}),
        ("Q4_K_M", {"Q6_K": 16, "Q4_K": 16}, {"Q6_K": 16, "Q4_K": 16}, {"Q4_K": 32}),
        ("Q5_K_S", {"Q5_K": 32}, {"Q5_K": 32}, {"Q5_K": 32}),
        ("Q5_K_M", {"Q6_K": 16, "Q5_K": 16}, {"Q6_K": 16, "Q5_K": 16}, {"Q5_K": 32}),
        ("Q6_K", {"Q6_K": 32}, {"Q6_K": 32}, {"Q6_K": 32}),
    ],
)
def test_a_mix_is_that_of_llama_cpp(mix, values, down, output):
    counts = types_of(mix)
    assert counts["v_proj"] == values
    assert counts["down_proj"] == down
    assert counts["o_proj"] == output
    usual = {MIXES[mix][0]: 32}
    assert counts["q_proj"] == counts["k_proj"] == counts["up_proj"] == usual
    assert counts["lm_head"] == {"Q6_K": 1}
    assert counts["embed_tokens"] == {MIXES[mix][0]: 1}


def test_shared_values_get_more_bits():
    assert types_of("Q2_K", num_key_value_heads=1)["v_proj"] == {"Q4_K": 32}


def test_values_of_the_largest_llama_get_more_bits():
    assert types_of("Q4_K_M", num_hidden_layers=80)["v_proj"] == {"Q6_K": 40, "Q5_K": 40}


@pytest.mark.parametrize(
    ("name", "columns", "expected"),
    [
        ("Q4_K", 512, "Q4_K"),
        ("Q2_K", 576, "Q4_0"),
        ("Q3_K", 576, "Q4_0"),
        ("Q4_K", 576, "Q5_0"),
        ("Q5_K", 576, "Q5_1"),
        ("Q6_K", 576, "Q8_0"),
        ("Q4_K", 120, "F16"),
        ("Q8_0", 120, "F16"),
        ("BF16", 120, "BF16"),
    ],
)
def test_what_stands_in_where_blocks_do_not_divide(name, columns, expected):
    assert fitting_type(name, columns) == expected


# quant=gguf ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A model whose rows super-blocks divide."""
    return checkpoint_of("llama", tmp_path_factory.mktemp("wide") / "source", **WIDE)


@pytest.fixture(scope="module")
def calibration(tmp_path_factory):
    return random_calibration(tmp_path_factory.mktemp("text"), 400)


@pytest.mark.parametrize("mix", ["Q4_K_M", "Q2_K"])
def test_a_calibrated_file_holds_what_slim_chose(mix, source, calibration, tmp_path):
    metadata = run(Gguf(mix, refine=1, calibration=calibration), source, tmp_path / "result")
    file = GgufModel(tmp_path / "result" / "model.gguf")
    types = mixed_types(open_checkpoint(source).spec, mix)
    written = Counter(type_name(entry.type) for entry in file.tensors.values())
    del written["F32"]  # norms
    assert written == Counter(types.values()) == metadata["tensor_types"]
    assert file.metadata["general.file_type"] == MIXES[mix][1]
    folder = imported(file.path, tmp_path / "folder")
    assert difference(load(folder), load_model(tmp_path / "result", "float32")) < 1e-4


@torch.no_grad()
def test_calibration_brings_the_model_nearer_on_its_text(source, calibration, tmp_path):
    tokens, errors = calibration.tokens_for(open_checkpoint(source)), {}
    expected = load(source)(tokens).logits
    for calibrated in (True, False):
        stage = Gguf("Q3_K_S", calibrated=calibrated, refine=1, calibration=calibration)
        run(stage, source, tmp_path / str(calibrated))
        change = load_model(tmp_path / str(calibrated), "float32")(tokens).logits - expected
        errors[calibrated] = float(change.norm() / expected.norm())
    assert errors[True] < 0.7 * errors[False]


def test_legacy_types_may_be_calibrated(source, calibration, tmp_path):
    stage = Gguf("Q4_0", calibrated=True, refine=1, calibration=calibration)
    metadata = run(stage, source, tmp_path / "result")
    assert metadata["tensor_types"] == {"Q4_0": 7, "Q8_0": 1}
    assert 0 < metadata["layer_error_mean"] < 0.2


def test_rows_that_super_blocks_do_not_divide(calibration, tmp_path):
    changes = dict(intermediate_size=120, num_hidden_layers=1)
    source = checkpoint_of("llama", tmp_path / "source", **changes)
    metadata = run(Gguf("Q4_K_S", refine=1, calibration=calibration), source, tmp_path / "result")
    # rows of 64: stand-ins; rows of 120: nothing fits, and the model's float32 stays
    assert metadata["tensor_types"] == {"Q8_0": 1, "Q5_0": 5, "Q5_1": 1, "F32": 1}
    assert "8 layers" in metadata["notes"][0]
    assert "5 x Q5_0 for Q4_K" in metadata["notes"][0]
    folder = imported(tmp_path / "result" / "model.gguf", tmp_path / "folder")
    assert difference(load(folder), load_model(tmp_path / "result", "float32")) < 1e-4


def test_without_a_text_nothing_is_calibrated(source, tmp_path):
    metadata = run(Gguf("Q6_K", calibrated=False), source, tmp_path / "result")
    assert metadata["tensor_types"] == {"Q6_K": 8}
    assert "layer_error_mean" not in metadata


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"type": "Q4_K_M"}, r"needs a text: quant.calibration=\$\{calibration\}"),
        ({"type": "F16", "calibrated": True}, "nothing to choose in plain weights"),
        ({"type": "Q4_K"}, "Did you mean Q4_K_M"),
        ({"type": "IQ2_XS"}, "the nearest is Q2_K"),
        ({"type": "IQ4_XS"}, "the nearest is Q4_K_M"),
        ({"overrides": {"*": "Q4_K_M"}}, "the type of '\\*'=Q4_K_M"),
        ({"calibrated": "yes"}, "quant.calibrated=yes"),
        ({"damping": 2}, "quant.damping=2"),
    ],
)
def test_settings_that_do_not_fit(settings, message):
    with pytest.raises(SlimError, match=message):
        Gguf(**settings)


def test_plain_layers_keep_their_type_under_calibration(source, calibration):
    spec = open_checkpoint(source).spec
    overrides = {"*.down_proj": "BF16"}
    with pytest.raises(SlimError, match="as they are stored, F32"):
        Gguf("Q4_K_M", overrides=overrides, calibration=calibration).check(spec)
    Gguf("Q4_K_M", overrides=overrides, calibrated=False).check(spec)


def test_weights_beyond_float16(calibration, tmp_path):
    from tests.support.folders import change_tensors

    def enlarge(tensors: dict) -> dict:
        tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = 1e6
        return tensors

    source = checkpoint_of("llama", tmp_path / "source")
    change_tensors(source, enlarge)
    with pytest.raises(SlimError, match="layers.1.mlp.up_proj has weights beyond 65504"):
        run(Gguf("Q4_K_M", calibration=calibration), source, tmp_path / "result")
    with pytest.raises(SlimError, match="layers.1.mlp.up_proj has weights beyond 65504"):
        run(Gguf("Q4_0"), source, tmp_path / "other")


def test_results_without_calibration_keep_their_names(calibration):
    plain = Gguf("Q4_1").cache_key()
    assert set(plain) == {"class", "type", "embeddings", "overrides"}
    assert Gguf("Q4_1", calibration=calibration).cache_key() == plain
    assert Gguf("Q4_K_M", calibration=calibration).cache_key()["calibration"]["samples"] == 8

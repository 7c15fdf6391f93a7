"""Gemma 2, Gemma 3 and Phi-3: what slim says of them and does to them, against transformers' own
models."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from slim.calibration.sequential import LinearGroup, SequentialCalibration, transform_checkpoint
from slim.checkpoints.checkpoint import open_checkpoint
from slim.checkpoints.stage import Context
from slim.checkpoints.writer import write_config
from slim.core.errors import SlimError
from slim.core.io import read_json
from slim.data.calibration import Calibration
from slim.evaluation.perplexity import negative_log_likelihood
from slim.evaluation.run import warm_up
from slim.loading.load_model import load_model
from slim.models.families import FAMILIES, LinearGroupSpec
from slim.models.spec import ModelSpec
from slim.pruning.magnitude import Magnitude
from slim.pruning.taylor import Taylor
from slim.pruning.weights import Wanda
from slim.pruning.width_magnitude import WidthL1
from slim.quantization.methods.awq import AWQ
from slim.quantization.methods.rtn import RTN
from slim.quantization.methods.scaling import ScaledMethod, channel_scales
from slim.quantization.scheme import Scheme
from slim.quantization.solvers.grid import Quantized
from tests.calibration.test_sequential import Spy, hessians_by_hooks
from tests.conftest import build_small
from tests.quantization.test_quantization import logits, relative, run, tokens_of, unpacked_copy

# Caps and windows small enough to matter in a small model, and heads that are not hidden size /
# number of heads.
GEMMA = dict(
    num_hidden_layers=4,
    head_dim=32,
    query_pre_attn_scalar=24,
    sliding_window=9,
    attention_bias=True,
)
CAPS = dict(attn_logit_softcapping=2.0, final_logit_softcapping=3.0)
LONG = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0, 1.5] * 4,
    "long_factor": [3.0] * 8,
}
PART = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
PHI3 = dict(num_hidden_layers=4, sliding_window=9)
MODELS = {
    "gemma2 tied": ("gemma2", {**GEMMA, **CAPS}),
    "gemma2 untied": ("gemma2", {**GEMMA, **CAPS, "tie_word_embeddings": False}),
    "gemma3 tied": ("gemma3_text", {**GEMMA, "sliding_window_pattern": 3}),
    "gemma3 untied": (
        "gemma3_text",
        {**GEMMA, "sliding_window_pattern": 2, "tie_word_embeddings": False},
    ),
    "phi3 tied": ("phi3", {**PHI3, "rope_parameters": PART}),
    "phi3 untied": ("phi3", {**PHI3, "rope_parameters": LONG, "tie_word_embeddings": False}),
}
BLOCKS, TOKENS = 4, tokens_of(1024, 5, 32)


def build(model_type, folder, **changes):
    """A random model whose norms and biases are not what they are when made."""
    build_small(model_type, folder, **changes)
    tensors = load_file(folder / "model.safetensors")
    generator = torch.Generator().manual_seed(1)
    for name, tensor in tensors.items():
        noise = torch.randn(tensor.shape, generator=generator)
        if name.endswith(".bias"):
            tensors[name] = noise.to(tensor.dtype)
        elif "norm" in name:  # Gemma's multiply by 1 + w
            tensors[name] = ((noise / 2).exp() - int("gemma" in model_type)).to(tensor.dtype)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module", params=MODELS)
def folder(request, tmp_path_factory):
    model_type, changes = MODELS[request.param]
    return build(model_type, tmp_path_factory.mktemp("families") / model_type, **changes)


@pytest.fixture(scope="module")
def calibration(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "words.txt"
    path.write_text(
        " ".join(
            f"{word} {number}" for number in range(60) for word in ("old", "trees", "are", "red")
        )
    )
    return Calibration(text=str(path), samples=4, length=32)


def reloaded(folder):
    """The plain transformers model of a folder, in float32."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


# Sizes
# ----------------------------------------------------------------------------------------------------------------


def counted(config: dict) -> tuple[int, int]:
    """Parameters of transformers' own model of a config, and of its first block."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))
    return model.num_parameters(), sum(
        parameter.numel() for parameter in model.model.layers[0].parameters()
    )


@pytest.mark.parametrize("model_type", FAMILIES)
@pytest.mark.parametrize(
    "given", [{}, {"tie_word_embeddings": True}, {"tie_word_embeddings": False}], ids=str
)
@pytest.mark.parametrize("bias", [False, True], ids=["", "biases"])
def test_parameters_of_every_family(model_type, given, bias):
    """Also where config.json leaves entries out: each family's configuration class has defaults of
    its own."""
    config = dict(
        model_type=model_type, vocab_size=100, hidden_size=64, intermediate_size=96, num_hidden_layers=3,
        num_attention_heads=32, pad_token_id=0, bos_token_id=0, eos_token_id=0, **given,
    )  # fmt: skip
    if bias:
        config.update(attention_bias=True, mlp_bias=True)
    model = ModelSpec(config)
    assert (model.parameters(), model.block_parameters(0)) == counted(config)


# parameters as the hub shows them, and the entries of config.json there that say how large the
# model is
PUBLISHED = {
    "gemma-2-2b": (
        2_614_341_888,
        "gemma2",
        256000,
        2304,
        9216,
        26,
        8,
        {"num_key_value_heads": 4, "head_dim": 256},
    ),
    "gemma-2-9b": (
        9_241_705_984,
        "gemma2",
        256000,
        3584,
        14336,
        42,
        16,
        {"num_key_value_heads": 8, "head_dim": 256},
    ),
    "gemma-3-1b": (
        999_885_952,
        "gemma3_text",
        262144,
        1152,
        6912,
        26,
        4,
        {"num_key_value_heads": 1, "head_dim": 256},
    ),
    "phi-3-mini": (3_821_079_552, "phi3", 32064, 3072, 8192, 32, 32, {"num_key_value_heads": 32}),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes(name):
    expected, model_type, vocabulary, hidden, width, blocks, heads, others = PUBLISHED[name]
    sizes = dict(
        hidden_size=hidden,
        intermediate_size=width,
        num_hidden_layers=blocks,
        num_attention_heads=heads,
    )
    assert (
        ModelSpec(
            dict(model_type=model_type, vocab_size=vocabulary, **sizes, **others)
        ).parameters()
        == expected
    )


@pytest.mark.parametrize("model_type", FAMILIES)
@pytest.mark.parametrize(
    "given", [{}, {"use_sliding_window": True, "max_window_layers": 7}], ids=["", "windows"]
)
def test_pattern_of_windows_where_the_config_leaves_it_out(model_type, given):
    sizes = dict(
        vocab_size=100,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=13,
        num_attention_heads=4,
    )
    config, kept = (
        {"model_type": model_type, **sizes, "pad_token_id": 0, **given},
        [0, 2, 5, 6, 8, 11, 12],
    )
    types = getattr(AutoConfig.for_model(**config), "layer_types", None) or []
    found = ModelSpec(config).with_blocks(kept).config.get("layer_types")
    assert found == ([types[block] for block in kept] if "sliding_attention" in types else None)


# Sequential calibration
# -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cache_bytes", [2**30, 0], ids=["inputs kept", "inputs computed twice"])
def test_calibration_sees_and_writes_what_the_model_is(folder, cache_bytes, tmp_path, monkeypatch):
    # batches of 2, 2 and 1 samples
    monkeypatch.setattr("slim.calibration.capture.BATCH_BYTES", 64 * 4 * 128)
    source = open_checkpoint(folder)
    expected, last = hessians_by_hooks(reloaded(folder), TOKENS)
    spy = Spy()
    calibration = SequentialCalibration(source, spy, None, TOKENS, cache_bytes=cache_bytes)
    calibration.run()
    assert spy.hessians.keys() == expected.keys()
    for name, hessian in expected.items():
        assert relative(spy.hessians[name].double(), hessian) < 1e-4, name
    torch.testing.assert_close(torch.cat(calibration.captured.hidden), last, rtol=1e-4, atol=1e-4)
    (tmp_path / "copy").mkdir()
    transform_checkpoint(source, tmp_path / "copy", Spy(), source.config, Context(), TOKENS)
    before, after = (
        load_file(folder / "model.safetensors"),
        load_file(tmp_path / "copy" / "model.safetensors"),
    )
    assert before.keys() == after.keys()
    assert all(
        torch.equal(before[name], after[name]) and before[name].dtype == after[name].dtype
        for name in before
    )


# Quantisation
# ---------------------------------------------------------------------------------------------------------


class Unrounded(ScaledMethod):
    """Scales and folds with a fixed alpha and rounds nothing: the function has to stay what it
    was."""

    def __init__(self, model, dtype="float32"):
        linears = [
            f"model.layers.{block}.{name}"
            for block in range(model.blocks)
            for name in model.block_linears(block)
        ]
        super().__init__(dict.fromkeys(linears, Scheme(8, 32, False)), dtype)
        self.alphas, self.folds = [0.7, 0.7], {}

    def solve(self, problem):
        return {name: exact(weight) for name, weight in problem.weights.items()}

    def _store_fold(self, group, scales):
        self.folds[group.block, group.scale_into] = scales
        super()._store_fold(group, scales)

    def block_tensors(self, block, module):
        dense = {f"{name}.weight": layer.dequantize() for name, layer in self.done.items()}
        tensors = {**module.state_dict(), **self.plain, **dense}
        self.done, self.plain = {}, {}
        return tensors


def exact(weight):
    """``weight`` as codes with the scale 1 and the zero point 0."""
    ones = torch.ones(len(weight), 1)
    return Quantized(weight.clone(), ones, torch.zeros_like(ones), Scheme(8, -1, False))


def test_folding_leaves_the_function_unchanged(folder, tmp_path):
    source = open_checkpoint(folder)
    method = Unrounded(source.spec)
    transform_checkpoint(source, tmp_path, method, source.config, Context(), TOKENS)
    assert len(method.folds) == BLOCKS * 4
    for scales in method.folds.values():
        assert scales.max() / scales.min() > 1.2
    expected = logits(reloaded(folder), TOKENS)
    assert relative(logits(reloaded(tmp_path), TOKENS), expected) < 1e-5


def test_rows_that_feed_nothing_stay(tmp_path):
    """Phi-3's values are the last rows of qkv_proj, its up projection those of gate_up_proj: only
    they take scales."""
    model_type, changes = MODELS["phi3 tied"]
    source = open_checkpoint(build(model_type, tmp_path / "source", **changes))
    method = Unrounded(source.spec)
    (tmp_path / "folded").mkdir()
    transform_checkpoint(source, tmp_path / "folded", method, source.config, Context(), TOKENS)
    queries_and_keys = (4 + 2) * 16
    for block in range(BLOCKS):
        for name, untouched in (
            ("self_attn.qkv_proj", queries_and_keys),
            ("mlp.gate_up_proj", 128),
        ):
            scales = method.folds[block, name]
            assert torch.equal(scales[:untouched], torch.ones(untouched))
            assert (scales[untouched:] != 1).float().mean() > 0.9


def test_scales_of_channels_in_the_middle():
    """A feeder whose feeding rows are neither the first nor the last."""
    hessian, channel_map = torch.diag(torch.tensor([4.0, 9.0, 1.0])), torch.tensor([2, 4, 4])
    scales = channel_scales(hessian, 1, channel_map, 1.0)
    root = (2 * 5**0.5) ** 0.5
    torch.testing.assert_close(scales, torch.tensor([1, 1, 2 / root, 1, 5**0.5 / root]))
    scale_module, method = nn.Linear(3, 7), ScaledMethod({}, "float32")
    method.done["up"] = exact(scale_module.weight.detach())
    group = LinearGroup(
        0, "model.layers.0", LinearGroupSpec(("down",), "up"), {}, scale_module, channel_map
    )
    torch.testing.assert_close(
        method._rounded_fold(group, scales), torch.cat([scales, torch.ones(2)])
    )


def test_norms_that_store_one_less_are_rounded_before_weights_are(tmp_path):
    """With Gemma's norms in bfloat16 the fold still costs nothing: weights are scaled by what was
    really stored."""
    model_type, changes = MODELS["gemma2 tied"]
    folder = build(model_type, tmp_path, **changes)
    config = {**read_json(folder / "config.json"), "dtype": "bfloat16"}
    rounded = {
        name: tensor.bfloat16() for name, tensor in load_file(folder / "model.safetensors").items()
    }
    save_file(rounded, folder / "model.safetensors", metadata={"format": "pt"})
    write_config(config, folder)
    method, stored = Unrounded(ModelSpec(config), "bfloat16"), {}
    tensors_of = method.block_tensors
    method.block_tensors = lambda block, module: (
        stored.update({block: dict(method.plain)}) or tensors_of(block, module)
    )
    (tmp_path / "q").mkdir()
    transform_checkpoint(open_checkpoint(folder), tmp_path / "q", method, config, Context(), TOKENS)
    for block in range(BLOCKS):
        for norm in ("input_layernorm", "pre_feedforward_layernorm"):
            after = stored[block][f"{norm}.weight"]
            before = 1 + rounded[f"model.layers.{block}.{norm}.weight"].float()
            assert after.dtype == torch.bfloat16
            torch.testing.assert_close(
                (1 + after.float()) * method.folds[block, norm], before, rtol=1e-5, atol=1e-6
            )


@pytest.mark.parametrize("method", [RTN, AWQ])
def test_packed_checkpoints_reload(method, folder, calibration, tmp_path):
    settings = (
        {"calibration": calibration, "grid": 3, "clip": 2, "refit": False} if method is AWQ else {}
    )
    stage = method(4, 32, **settings)
    run(stage, folder, tmp_path / "q")
    plain = unpacked_copy(tmp_path / "q", folder, tmp_path / "plain")
    model = load_model(tmp_path / "q")
    assert relative(logits(model, TOKENS), logits(reloaded(plain), TOKENS)) < 1e-5
    assert relative(logits(model, TOKENS), logits(reloaded(folder), TOKENS)) > 1e-3
    weights = {name: shape for name, (_, _, shape) in open_checkpoint(folder).tensors.items()}
    linears = open_checkpoint(folder).spec.block_linears(0)
    assert {name: weights[f"model.layers.0.{name}.weight"] for name in linears} == linears
    assert model.generate(TOKENS[:1, :8], max_new_tokens=4, do_sample=False).shape[1] > 8


@pytest.mark.parametrize("folder", ["gemma2 tied", "gemma3 untied"], indirect=True)
def test_packed_embeddings_are_scaled_as_the_plain_ones(folder, tmp_path):
    run(RTN(8, 32, embeddings=True), folder, tmp_path / "q")
    model, plain = load_model(tmp_path / "q"), reloaded(folder)
    assert not isinstance(model.get_input_embeddings(), nn.Embedding)
    assert (
        relative(model.get_input_embeddings()(TOKENS), plain.get_input_embeddings()(TOKENS)) < 0.01
    )
    assert relative(logits(model, TOKENS), logits(plain, TOKENS)) < 0.05


# Pruning
# --------------------------------------------------------------------------------------------------------------


def scores_by_autograd(model, tokens):
    """Sum of |w dL/dw| per block, w what a norm multiplies by, from one backward of the whole
    model."""
    model(tokens, labels=tokens).loss.backward()
    return [
        sum(
            ((weight + int("Gemma" in type(module).__name__)) * weight.grad).abs().sum().item()
            for module in block.modules()
            if (weight := module._parameters.get("weight")) is not None
        )
        for block in model.model.layers
    ]


def test_taylor_scores_equal_autograd(folder, calibration, tmp_path):
    stage = Taylor(blocks=1, protect=[], samples=3, length=20, calibration=calibration)
    facts = run(stage, folder, tmp_path / "pruned")
    from slim.checkpoints.tokenizer import load_tokenizer

    tokens = stage.windows.tokens(load_tokenizer(folder), 256)
    assert facts["scores"] == pytest.approx(scores_by_autograd(reloaded(folder), tokens), rel=1e-3)


def test_magnitude_scores_count_what_norms_multiply_by(folder, tmp_path):
    facts = run(Magnitude(blocks=2, protect=[]), folder, tmp_path / "pruned")
    tensors, gemma = load_file(folder / "model.safetensors"), "gemma" in str(folder)
    expected = [
        sum(
            (tensor.double() + int(gemma and tensor.dim() == 1)).abs().sum().item()
            for name, tensor in tensors.items()
            if name.startswith(f"model.layers.{block}.") and name.endswith("weight")
        )
        for block in range(BLOCKS)
    ]
    assert facts["scores"] == pytest.approx(expected, rel=1e-5)
    assert open_checkpoint(tmp_path / "pruned").spec.blocks == 2


def test_gaps_of_phi3_are_bridged(calibration, tmp_path):
    model_type, changes = MODELS["phi3 tied"]
    source = build(model_type, tmp_path / "source", **changes)
    facts = run(
        Magnitude(remove=[1, 2], reconstruct=True, calibration=calibration),
        source,
        tmp_path / "pruned",
    )
    assert facts["gaps"][0]["error_bridged"] < 0.9 * facts["gaps"][0]["error_cut"]
    before, after = (
        load_file(source / "model.safetensors"),
        load_file(tmp_path / "pruned" / "model.safetensors"),
    )
    moved = [
        name
        for name in after
        if name.startswith("model.layers.0.") and not torch.equal(after[name], before[name])
    ]
    assert moved == ["model.layers.0.mlp.down_proj.weight"]


QWEN = dict(num_hidden_layers=4, use_sliding_window=True, sliding_window=9, max_window_layers=2)


@pytest.mark.parametrize("name", [*MODELS, "qwen2", "qwen3"])
@pytest.mark.parametrize("listed", [True, False], ids=["listed", "by number"])
def test_blocks_keep_what_they_attend_to(name, listed, tmp_path):
    """Configs on the hub often say by a block's number which ones see a window; after pruning the
    numbers are others."""
    model_type, changes = MODELS.get(name, (name, QWEN))
    source = build(model_type, tmp_path / "source", **changes)
    config = read_json(source / "config.json")
    if not listed:
        config.pop("layer_types", None)
        if "sliding_window_pattern" in changes:
            config["sliding_window_pattern"] = changes["sliding_window_pattern"]
    write_config(config, source)
    run(Magnitude(remove=[0, 2]), source, tmp_path / "pruned")
    expected = reloaded(source)
    types = getattr(expected.config, "layer_types", None)
    expected.model.layers = nn.ModuleList([expected.model.layers[1], expected.model.layers[3]])
    # a cache would go by the old numbers
    expected.config.num_hidden_layers, expected.config.use_cache = 2, False
    if types:
        expected.config.layer_types = [types[1], types[3]]
    assert relative(logits(reloaded(tmp_path / "pruned"), TOKENS), logits(expected, TOKENS)) < 1e-6


def test_weight_pruning(folder, calibration, tmp_path):
    facts = run(Wanda(n=2, m=4, calibration=calibration), folder, tmp_path / "pruned")
    assert facts["sparsity"] == 0.5
    assert torch.isfinite(logits(reloaded(tmp_path / "pruned"), TOKENS)).all()


@pytest.mark.parametrize("name", ["gemma2 tied", "gemma3 untied"])
def test_width_pruning_of_gemma_computes_what_zeroed_units_would(name, calibration, tmp_path):
    model_type, changes = MODELS[name]
    source = build(model_type, tmp_path / "source", **changes)
    run(WidthL1(ratio=0.5, uniform=True, calibration=calibration), source, tmp_path / "pruned")
    expected, pruned = reloaded(source), reloaded(tmp_path / "pruned")
    for whole, cut in zip(expected.model.layers, pruned.model.layers, strict=True):
        for layer, small in (
            (whole.self_attn.o_proj, cut.self_attn.o_proj),
            (whole.mlp.down_proj, cut.mlp.down_proj),
        ):
            gone = ~(layer.weight.T[:, None] == small.weight.T[None]).all(-1).any(-1)
            assert gone.sum() == layer.in_features // 2
            layer.weight.data[:, gone] = 0
    assert relative(logits(pruned, TOKENS), logits(expected, TOKENS)) < 1e-5


def test_width_pruning_of_some_blocks_of_gemma(calibration, tmp_path):
    """MLPs may differ from block to block; heads may not, and the message says what can be done."""
    model_type, changes = MODELS["gemma2 tied"]
    source = build(model_type, tmp_path / "source", **{**changes, "num_key_value_heads": 1})
    run(
        WidthL1(ratio=0.5, first_block=1, last_block=2, calibration=calibration),
        source,
        tmp_path / "pruned",
    )
    assert [
        block.mlp.down_proj.in_features for block in reloaded(tmp_path / "pruned").model.layers
    ] == [128, 64, 64, 128]
    with pytest.raises(
        SlimError, match=r"gemma2 takes one number of heads.*hidden size 64.*pruner\.uniform=true"
    ):
        model = open_checkpoint(source).spec.with_config(num_key_value_heads=2)
        WidthL1(ratio=0.5, first_block=1, last_block=2, calibration=calibration).check(model)


# Evaluation
# -----------------------------------------------------------------------------------------------------------


def test_perplexity_is_that_of_the_models_own_logits(folder):
    """The head runs on some tokens at a time; Gemma 2's soft cap belongs to it."""
    model = reloaded(folder)
    own = logits(model, TOKENS)[:, :-1].flatten(0, 1).double()
    expected = nn.functional.cross_entropy(own, TOKENS[:, 1:].flatten(), reduction="sum").item()
    assert negative_log_likelihood(model, TOKENS, 2) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("folder", ["gemma2 tied", "gemma3 untied", "phi3 tied"], indirect=True)
def test_warm_up(folder):
    warm_up(folder, "cpu")


# What is refused
# ------------------------------------------------------------------------------------------------------


def test_refusals(calibration, tmp_path):
    sizes = dict(
        vocab_size=100,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=8,
        num_attention_heads=4,
    )
    phi3, gemma, unknown = (
        ModelSpec({"model_type": name, **sizes}) for name in ("phi3", "gemma2", "gpt_neox")
    )
    with pytest.raises(
        SlimError,
        match=r"self_attn\.qkv_proj.*It works for llama, .*, gemma3_text\. Depth and weight",
    ):
        WidthL1(calibration=calibration).check(phi3)
    with pytest.raises(
        SlimError, match=r"reconstruct=true cannot fold.*it works for llama, .*qwen3, phi3\."
    ):
        Magnitude(reconstruct=True, calibration=calibration).check(gemma)
    Magnitude(reconstruct=True, calibration=calibration).check(phi3)
    with pytest.raises(
        SlimError,
        match=r"(?s)'gpt_neox' of the model\. Known: llama.*Family\('gpt_neox', \.\.\.\).*says how",
    ):
        RTN(4, 32).check(unknown)


def test_models_of_several_parts_are_named(tmp_path, folder):
    shutil.copytree(folder, tmp_path / "both")
    config = {
        "model_type": "gemma3",
        "text_config": json.loads((folder / "config.json").read_text()),
    }
    (tmp_path / "both" / "config.json").write_text(json.dumps(config))
    with pytest.raises(SlimError, match=r"several parts \(model_type 'gemma3'\)"):
        open_checkpoint(tmp_path / "both").spec  # noqa: B018

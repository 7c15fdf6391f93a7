"""Quantisation stages end to end: losses, folding, files, loading, perplexity; and everything that
is refused."""

from __future__ import annotations

import json
import shutil
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from slim.calibration.errors import layer_loss
from slim.calibration.sequential import SequentialCalibration
from slim.checkpoints.checkpoint import Checkpoint, open_checkpoint
from slim.checkpoints.stage import Context
from slim.checkpoints.tokenizer import load_tokenizer
from slim.core.errors import SlimError
from slim.data.calibration import Calibration
from slim.loading.load_model import load_model
from slim.loading.packed import load_quantized
from slim.models.spec import ModelSpec
from slim.quantization.kernels.int4_layout import int4_layout
from slim.quantization.kernels.linear import (
    KERNEL_ROWS,
    SMALL_KERNEL_ROWS,
    QuantLinear,
    int4_kernel_is_fast,
)
from slim.quantization.kernels.multiply import LARGEST_TILE
from slim.quantization.kernels.packing import unpack, unpack_columns
from slim.quantization.methods.awq import AWQ, ActivationAware
from slim.quantization.methods.rtn import RTN
from slim.quantization.scheme import Scheme
from slim.quantization.solvers.grid import decode, minmax
from slim.quantization.storage import packed_bits, weight_bytes
from tests.conftest import build_small
from tests.support.calibrating import random_calibration

FAMILIES = {"llama": {}, "mistral": {"sliding_window": 12}, "qwen2": {}, "qwen3": {"head_dim": 32}}


def tokens_of(vocabulary: int, samples: int = 4, length: int = 40) -> torch.Tensor:
    return torch.randint(
        3, vocabulary, (samples, length), generator=torch.Generator().manual_seed(5)
    )


def small(model_type, folder, **changes):
    """A random model whose sizes divide into groups of 32, with biases and norms that are not all 0
    and 1."""
    build_small(model_type, folder, **{"num_hidden_layers": 2, **FAMILIES[model_type], **changes})
    tensors = load_file(folder / "model.safetensors")
    generator = torch.Generator().manual_seed(1)
    for name, tensor in tensors.items():
        if name.endswith(".bias"):
            tensors[name] = torch.randn(tensor.shape, generator=generator).to(tensor.dtype)
        elif "norm" in name:
            tensors[name] = torch.exp(torch.randn(tensor.shape, generator=generator)).to(
                tensor.dtype
            )
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def calibration(tmp_path_factory):
    """Calibration on a text of random words."""
    return random_calibration(tmp_path_factory.mktemp("text"), 4000)


def run(stage, source, target):
    target.mkdir(parents=True)
    return stage.run(source, target, Context())


def unpacked_copy(quantized, source, target):
    """Write plain float32 weights for a packed checkpoint, decoded here by the layout's
    definition."""
    shutil.copytree(source, target)
    packed = load_file(quantized / "model.safetensors")
    weights = json.loads((quantized / "config.json").read_text())["quantization_config"][
        "config_groups"
    ]["group_0"]["weights"]
    bits, plain = weights["num_bits"], {}
    for name, tensor in packed.items():
        layer, _, kind = name.rpartition(".")
        if kind == "weight_packed":
            shape = packed[f"{layer}.weight_shape"].tolist()
            codes, scale = unpack(tensor, bits, shape[1]), packed[f"{layer}.weight_scale"]
            zero = torch.full_like(scale, 2 ** (bits - 1), dtype=torch.uint8)
            if not weights["symmetric"]:
                zero = unpack_columns(packed[f"{layer}.weight_zero_point"], bits, shape[0])
            plain[f"{layer}.weight"] = decode(codes, scale, zero)
        elif kind in ("weight", "bias"):
            plain[name] = tensor.float()
    save_file(plain, target / "model.safetensors", metadata={"format": "pt"})
    return target


def logits(model, tokens):
    with torch.no_grad():
        return model(tokens).logits.float()


def relative(got, expected):
    return ((got - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("model_type", FAMILIES)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
def test_loaded_logits_equal_those_of_the_unpacked_model(
    model_type, bits, symmetric, calibration, tmp_path
):
    source = small(model_type, tmp_path / "source", dtype="float32")
    method = AWQ if model_type in ("llama", "qwen2") else RTN
    settings = {"calibration": calibration, "grid": 4, "clip": 4} if method is AWQ else {}
    run(method(bits, 32, symmetric, **settings), source, tmp_path / "q")
    plain = unpacked_copy(tmp_path / "q", source, tmp_path / "plain")
    tokens = tokens_of(1024)
    expected = logits(AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32), tokens)
    model = load_model(tmp_path / "q")
    assert sum(isinstance(module, QuantLinear) for module in model.modules()) == 2 * 7
    assert relative(logits(model, tokens), expected) < 1e-5
    half = load_model(tmp_path / "q", "float16")
    assert half.dtype == torch.float16
    dense = AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float16)
    # Packed layers may multiply in a type that rounds less, so both are compared with float32.
    rounding = relative(logits(dense, tokens), expected)
    assert relative(logits(half, tokens), expected) < 1.25 * rounding


@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize(
    ("bits", "group_size"), [(2, 64), (3, 32), (4, 32), (8, 64), (4, -1), (3, -1)]
)
def test_plain_transformers_reads_the_files(bits, group_size, symmetric, small_llama, tmp_path):
    pytest.importorskip("compressed_tensors")
    from transformers import CompressedTensorsConfig

    run(RTN(bits, group_size, symmetric), small_llama, tmp_path / "q")
    tokens = tokens_of(1024)
    expected = logits(load_model(tmp_path / "q"), tokens)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if symmetric:
            theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "q", dtype=torch.float32)
        else:
            config = CompressedTensorsConfig(dequantize=True)
            theirs = AutoModelForCausalLM.from_pretrained(
                tmp_path / "q", dtype=torch.float32, quantization_config=config
            )
    assert relative(logits(theirs, tokens), expected) < 1e-4


@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
def test_files_of_others_are_read(symmetric, small_llama, tmp_path):
    """Codes made and packed by compressed-tensors itself, with its config and a pattern on the
    ignore list."""
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
    from compressed_tensors.quantization import (
        QuantizationArgs,
        QuantizationScheme,
        QuantizationStrategy,
    )

    args = QuantizationArgs(
        num_bits=4, symmetric=symmetric, strategy=QuantizationStrategy.GROUP, group_size=32
    )
    theirs = QuantizationScheme(targets=["Linear"], weights=args)
    folder, plain = tmp_path / "theirs", tmp_path / "plain"
    shutil.copytree(small_llama, folder)
    shutil.copytree(small_llama, plain)
    packed, dense = {}, {}
    for name, tensor in load_file(small_llama / "model.safetensors").items():
        packed[name] = dense[name] = tensor
        if "_proj" in name and ".0." not in name:
            layer = name.removesuffix(".weight")
            ours = minmax(tensor, Scheme(4, 32, symmetric), torch.float32)
            state = {
                "weight": tensor,
                "weight_scale": ours.scale,
                "weight_zero_point": (ours.zero.int() - 8).to(torch.int8),
            }
            del packed[name]
            compressed = PackedQuantizationCompressor.compress(state, theirs)
            packed.update(
                {f"{layer}.{key}": value.contiguous() for key, value in compressed.items()}
            )
            dense[name] = PackedQuantizationCompressor.decompress(compressed, theirs)["weight"]
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {"group_0": theirs.model_dump(mode="json")},
        "ignore": ["lm_head", "re:model[.]layers[.]0[.].*"],
    }
    (folder / "config.json").write_text(json.dumps(config))
    save_file(packed, folder / "model.safetensors", metadata={"format": "pt"})
    save_file(dense, plain / "model.safetensors", metadata={"format": "pt"})
    tokens = tokens_of(1024)
    model = load_model(folder)
    assert sum(isinstance(module, QuantLinear) for module in model.modules()) == 5 * 7
    assert relative(logits(model, tokens), logits(load_model(plain), tokens)) < 1e-5


@pytest.mark.parametrize("tied", [True, False])
def test_generation_heads_and_embeddings(tied, tmp_path):
    source = small("llama", tmp_path / "source", tie_word_embeddings=tied)
    run(RTN(8, 32), source, tmp_path / "q")
    model, plain = load_model(tmp_path / "q"), load_model(source)
    shared = (
        model.get_output_embeddings().weight.data_ptr()
        == model.get_input_embeddings().weight.data_ptr()
    )
    assert shared == tied
    prompt = tokens_of(1024, 1, 8)
    settings = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 2}
    generated = model.generate(prompt, **settings)
    assert generated.shape[1] > 8
    for length in range(8, generated.shape[1]):  # the cache and the whole sequence agree
        assert logits(model, generated[:, :length])[0, -1].argmax() == generated[0, length]
    assert relative(logits(model, prompt), logits(plain, prompt)) < 0.05


def test_no_dense_copy_is_held(tmp_path):
    source = small(
        "llama", tmp_path / "source", hidden_size=256, intermediate_size=512, dtype="bfloat16"
    )
    run(RTN(4, 64), source, tmp_path / "q")
    for dtype in ("bfloat16", "float32"):
        model = load_model(tmp_path / "q", dtype)
        logits(model, tokens_of(1024))
        for layer in (module for module in model.modules() if isinstance(module, QuantLinear)):
            held_bytes = 0
            for tensor in [*layer.buffers(), *layer.parameters()]:
                held_bytes += tensor.numel() * tensor.element_size()
            # The kernel's last tile of rows is filled up: it shows in layers this narrow only.
            rows = -(-layer.out_features // LARGEST_TILE) * LARGEST_TILE
            assert held_bytes < 0.5 * layer.in_features * rows * (1 + 0.6), layer


# AWQ
# ------------------------------------------------------------------------------------------------


class Recording(ActivationAware):
    """AWQ that remembers, per layer, its loss and that of round to nearest under the same
    Hessian."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.losses, self.folds = {}, set()

    def quantize(self, group):
        before = {name: linear.weight.clone() for name, linear in group.linears.items()}
        result = super().quantize(group)
        for name, weight in before.items():
            rounded = minmax(weight, self.scheme(group, name), self.scale_dtype).dequantize()
            pair = [
                layer_loss(item - weight, group.hessian).sum().item()
                for item in (result[name], rounded)
            ]
            self.losses[f"{group.prefix}.{name}"] = pair
        return result

    def _store_fold(self, group, scales):
        self.folds.add(group.scale_into)
        super()._store_fold(group, scales)


@pytest.mark.parametrize("model_type", FAMILIES)
@pytest.mark.parametrize("bits", [2, 4])
def test_loss_of_no_layer_is_above_that_of_rtn(model_type, bits, tmp_path):
    source = open_checkpoint(small(model_type, tmp_path / "source"))
    method = Recording(RTN(bits, 32).schemes(source.spec), "float32")
    SequentialCalibration(source, method, None, tokens_of(1024)).run()
    assert len(method.losses) == 14
    for name, (awq, rtn) in method.losses.items():
        assert awq <= rtn * (1 + 1e-4), name
    total = [sum(column) for column in zip(*method.losses.values(), strict=True)]
    assert total[0] < 0.9 * total[1]


class FoldOnly(ActivationAware):
    """Scales and folds with a fixed alpha but rounds to 8 bits, so that what is left is (nearly)
    the same function."""

    def __init__(self, model):
        super().__init__(RTN(8, 32).schemes(model), model.dtype, clip=1, refit=False)
        self.folds = []

    def _search_alpha(self, *args):
        return 0.7

    def unscaled_if_better(self, *args):
        return None

    def _store_fold(self, group, scales):
        self.folds.append(scales.max().item() / scales.min().item())
        super()._store_fold(group, scales)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_folding_leaves_the_function_unchanged(model_type, tmp_path):
    """All four folds (two norms, values under grouped-query attention, up projection), biases
    included."""
    from slim.checkpoints.shards import ShardWriter
    from slim.checkpoints.writer import copy_companions, write_config

    source = open_checkpoint(small(model_type, tmp_path / "source"))
    target = tmp_path / "q"
    target.mkdir()
    method, writer = FoldOnly(source.spec), ShardWriter(target)
    SequentialCalibration(source, method, writer, tokens_of(1024)).run()
    writer.close()
    write_config(RTN(8, 32).output_spec(source.spec).config, target)
    copy_companions(source.folder, target)
    run(RTN(8, 32), source.folder, tmp_path / "unscaled")
    assert len(method.folds) == 8
    assert min(method.folds) > 1.1
    before, after = (
        load_file(source.folder / "model.safetensors"),
        load_file(target / "model.safetensors"),
    )
    norm = "model.layers.0.input_layernorm.weight"
    assert relative(after[norm], before[norm]) > 0.05
    tokens = tokens_of(1024)
    expected = logits(load_model(source.folder), tokens)
    error = relative(logits(load_model(target), tokens), expected)
    unscaled = relative(logits(load_model(tmp_path / "unscaled"), tokens), expected)
    assert error < 2 * unscaled + 1e-3


def test_norms_are_rounded_before_weights_are_quantised(tmp_path):
    """With norms stored in bfloat16 the fold still costs nothing: weights compensate for the
    rounding."""
    source = open_checkpoint(small("llama", tmp_path / "source"))
    method = FoldOnly(source.spec.with_config(dtype="bfloat16"))
    original, checked = method._rounded_fold, []

    def fold(group, scales):
        exact = original(group, scales)
        if "norm" in group.scale_into:
            stored = (group.scale_module.weight / scales).to(torch.bfloat16).float()
            torch.testing.assert_close(stored * exact, group.scale_module.weight, rtol=1e-6, atol=0)
            checked.append(group.scale_into)
        return exact

    method._rounded_fold = fold
    SequentialCalibration(source, method, None, tokens_of(1024)).run()
    assert len(checked) == 4


def test_same_call_twice_gives_the_same_file(small_llama, calibration, tmp_path):
    stage = AWQ(3, 32, calibration=calibration)
    run(stage, small_llama, tmp_path / "a")
    run(stage, small_llama, tmp_path / "b")
    assert (tmp_path / "a" / "model.safetensors").read_bytes() == (
        tmp_path / "b" / "model.safetensors"
    ).read_bytes()


# A trained model
# ------------------------------------------------------------------------------------------------


def perplexity(folder, tokens):
    model = load_model(folder)
    with torch.no_grad():
        found = [model(batch, labels=batch).loss.double() for batch in tokens.split(8)]
    return torch.stack(found).mean().exp().item()


@pytest.mark.slow
def test_perplexity_of_a_trained_model(ref_llama, shared, tmp_path):
    data = shared / "data"
    calibration = Calibration(text=str(data / "wikitext2_tok_valid.txt"), samples=12, length=256)
    text = (data / "wikitext2_raw_test.txt").read_text(encoding="utf-8")[:40_000]
    ids = load_tokenizer(ref_llama)(text, verbose=False)["input_ids"]
    tokens = torch.tensor(ids[: 24 * 256]).view(24, 256)
    found = {"plain": perplexity(ref_llama, tokens)}
    for bits in (4, 2):
        for name, stage in (("rtn", RTN(bits)), ("awq", AWQ(bits, calibration=calibration))):
            run(stage, ref_llama, tmp_path / f"{name}{bits}")
            found[f"{name}{bits}"] = perplexity(tmp_path / f"{name}{bits}", tokens)
    assert found["awq4"] <= found["rtn4"] * 1.005
    assert found["awq4"] < found["plain"] * 1.02
    assert found["rtn2"] > found["plain"] * 1.15
    assert found["awq2"] < found["rtn2"] * 0.93


# Files and facts
# ------------------------------------------------------------------------------------------------


def test_facts_report_and_expected_size(small_llama, calibration, tmp_path):
    curve = []
    (tmp_path / "q").mkdir()
    stage = AWQ(4, 32, calibration=calibration)
    facts = stage.run(
        small_llama, tmp_path / "q", Context(metric=lambda *entry: curve.append(entry))
    )
    source = open_checkpoint(small_llama).spec
    result = open_checkpoint(tmp_path / "q")
    table = json.loads((tmp_path / "q" / "report" / "layer_errors.json").read_text())
    assert len(table) == 6 * 7
    assert facts["layer_error_max"] == max(row["error"] for row in table)
    assert 0 < facts["layer_error_mean"] < 0.2
    assert (tmp_path / "q" / "report" / "layer_errors.png").stat().st_size > 5000
    assert [entry[2] for entry in curve] == list(range(6))
    # float32 scales, 4-bit zero points
    assert facts["bits_per_weight"] == pytest.approx(4 + 32 / 32 + 4 / 32)
    sizes = {name: shape for name, (_, _, shape) in result.tensors.items()}
    assert sizes["model.layers.0.mlp.down_proj.weight_packed"] == (64, 16)
    assert sizes["model.layers.0.mlp.down_proj.weight_zero_point"] == (8, 4)
    header = 16 * 7 * 6 + 2000 + 400 * len(sizes)
    assert abs(result.bytes_on_disk - weight_bytes(stage.output_spec(source))) < header
    assert result.spec.quantization == stage.output_spec(source).quantization
    assert stage.peak_bytes(source, "cpu") > 0


def test_group_sizes_count_in_bits_per_weight():
    sizes = dict(
        hidden_size=512, intermediate_size=1024, num_attention_heads=8, num_key_value_heads=8
    )
    config = dict(
        model_type="llama", num_hidden_layers=2, vocab_size=100, dtype="bfloat16", **sizes
    )
    model = ModelSpec(config)
    assert packed_bits(RTN(4, 128).output_spec(model)) == pytest.approx(4 + 20 / 128)
    assert packed_bits(RTN(3, 64, True).output_spec(model)) == pytest.approx(3 + 16 / 64)
    assert 3 < packed_bits(RTN(3, -1, True).output_spec(model)) < 3.04


def test_refusals(small_llama, tmp_path):
    spec = open_checkpoint(small_llama).spec
    with pytest.raises(SlimError, match=r"quant\.bits=5: must be one of 2, 3, 4, 8"):
        RTN(5)
    with pytest.raises(SlimError, match=r"quant\.group_size=48"):
        RTN(4, 48)
    with pytest.raises(SlimError, match=r"symmetric"):
        RTN(4, 128, "yes")
    with pytest.raises(
        SlimError,
        match=r"group_size=128 does not divide the 64 inputs of model\.layers\.0\.self_attn\.q_proj"
        r".*\nUse quant\.group_size=64; these fit all layers, too: 32, -1",
    ):
        RTN(4, 128).check(spec)
    with pytest.raises(SlimError, match="already quantized"):
        RTN(4, 32).check(RTN(4, 32).output_spec(spec))
    with pytest.raises(SlimError, match="does not know the model family 'gpt2'"):
        RTN(4, 32).check(spec.with_config(model_type="gpt2"))
    with pytest.raises(SlimError, match=r"quant\.grid"):
        AWQ(grid=0)


@pytest.mark.parametrize(
    "change",
    [
        {"quant_method": "gptq"},
        {"format": "int-quantized"},
        {"config_groups": {}},
        {
            "config_groups": {
                "group_0": {
                    "weights": {
                        "num_bits": 4,
                        "type": "float",
                        "strategy": "group",
                        "group_size": 32,
                    }
                }
            }
        },
    ],
)
def test_unknown_formats_are_refused(change, small_llama, tmp_path):
    run(RTN(4, 32), small_llama, tmp_path / "q")
    config = json.loads((tmp_path / "q" / "config.json").read_text())
    config["quantization_config"].update(change)
    (tmp_path / "q" / "config.json").write_text(json.dumps(config))
    with pytest.raises(SlimError, match="slim reads"):
        load_model(tmp_path / "q")


@pytest.mark.parametrize("lost", ["model.layers.1.mlp.up_proj.weight_packed", "model.norm.weight"])
def test_lost_tensors_are_named(lost, small_llama, tmp_path):
    run(RTN(4, 32), small_llama, tmp_path / "q")
    tensors = load_file(tmp_path / "q" / "model.safetensors")
    del tensors[lost]
    save_file(tensors, tmp_path / "q" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(SlimError, match=lost.replace(".", r"\.")):
        load_quantized(Checkpoint(tmp_path / "q"), "float32")


# QuantLinear
# ------------------------------------------------------------------------------------------------


def layer_of(rows, columns, scheme, dtype, bias=False):
    from slim.quantization.kernels.packing import pack

    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(8))
    quantized = minmax(weight, scheme, dtype)
    layer = QuantLinear(columns, rows, scheme, dtype, bias)
    layer.packed, layer.scale, layer.zero = (
        pack(quantized.codes, scheme.bits),
        quantized.scale,
        quantized.zero,
    )
    if bias:
        layer.bias = torch.randn(rows, generator=torch.Generator().manual_seed(9)).to(dtype)
    return layer.choose_kernel(), quantized.dequantize()


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group_size", [32, -1])
@pytest.mark.parametrize("count", [1, 5, 100])
@pytest.mark.parametrize("bias", [True, False])
def test_float32_is_exact(bits, group_size, count, bias, monkeypatch):
    # several steps, the last one short
    monkeypatch.setattr("slim.quantization.kernels.multiply.CHUNK", 96 * 64)
    layer, dense = layer_of(208, 96, Scheme(bits, group_size, False), torch.float32, bias)
    x = torch.randn(2, count, 96)
    expected = x.double() @ dense.double().T + (layer.bias.double() if bias else 0)
    assert layer(x).shape == (2, count, 208)
    assert relative(layer(x).double(), expected) < 1e-6


@pytest.mark.parametrize("group_size", [32, 64, 128, 256])
@pytest.mark.parametrize("symmetric", [True, False])
def test_cpu_kernel_and_unpacking_agree(group_size, symmetric):
    require_int4()
    layer, dense = layer_of(192, 512, Scheme(4, group_size, symmetric), torch.bfloat16, bias=True)
    assert layer.kernel == "int4"
    torch.testing.assert_close(layer.dense_weight(), dense)
    for count in (1, 3, SMALL_KERNEL_ROWS, SMALL_KERNEL_ROWS + 1):
        x = torch.randn(count, 512, generator=torch.Generator().manual_seed(count)).bfloat16()
        expected = x.double() @ dense.double().T + layer.bias.double()
        assert relative(layer(x).double(), expected) < 4e-3  # bfloat16 has 8 bits
    assert layer(torch.zeros(0, 512, dtype=torch.bfloat16)).shape == (0, 192)


def test_layers_the_kernel_does_not_take_unpack():
    for columns, scheme in ((512 + 8, Scheme(4, -1, True)), (48, Scheme(3, 48, True))):
        layer, dense = layer_of(64, columns, scheme, torch.bfloat16)
        assert layer.kernel is None
        x = torch.randn(2, columns).bfloat16()
        assert relative(layer(x).double(), x.double() @ dense.double().T) < 6e-3


@pytest.mark.parametrize("count", [1, KERNEL_ROWS // 2, KERNEL_ROWS, 200])
@pytest.mark.parametrize(
    ("rows", "columns", "scheme"),
    [
        (80, 512, Scheme(4, 128, True)),  # rows that do not fill the last tile
        (64, 96, Scheme(4, -1, True)),  # groups that the kernel does not take
        (64, 128, Scheme(3, 32, True)),  # narrower codes
        (64, 256, Scheme(2, 256, False)),
        (72, 256, Scheme(8, 128, False)),  # wider ones
        (72, 256, Scheme(8, 64, True)),
    ],
    ids=str,
)
def test_layers_that_are_rearranged_for_the_kernel(rows, columns, scheme, count):
    require_int4()
    layer, dense = layer_of(rows, columns, scheme, torch.bfloat16, bias=True)
    assert layer.kernel == ("int4 halves" if scheme.bits == 8 else "int4")
    torch.testing.assert_close(layer.dense_weight(), dense)
    x = torch.randn(count, columns, generator=torch.Generator().manual_seed(count)).bfloat16()
    expected = x.double() @ dense.double().T + layer.bias.double()
    assert relative(layer(x).double(), expected) < 5e-3


def require_int4():
    if not (int4_layout() and int4_kernel_is_fast()):
        pytest.skip("torch's int4 kernel on this CPU is a plain loop")

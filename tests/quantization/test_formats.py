"""Checkpoint formats: layouts bit by bit, files of slim and of others read back, and everything
that is refused."""

from __future__ import annotations

import json
import shutil
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from slim.checkpoints.checkpoint import open_checkpoint
from slim.core.errors import SlimError
from slim.loading.load_model import load_model
from slim.models.spec import ModelSpec
from slim.quantization.formats import get_format, read_config
from slim.quantization.formats.base import Packed
from slim.quantization.kernels.int4_layout import int4_layout
from slim.quantization.kernels.linear import (
    INT8_ROWS,
    QuantEmbedding,
    QuantLinear,
    int4_kernel_is_fast,
)
from slim.quantization.kernels.packing import pack
from slim.quantization.scheme import Scheme
from slim.quantization.solvers.grid import Quantized, minmax
from slim.quantization.storage import packed_bits, packed_schemes, weight_bytes
from tests.conftest import build_small

# formats of integers with scales and zero points; GGUF's blocks are tested in tests/gguf
INTEGERS = ("compressed-tensors", "gptq", "awq")
AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]


# Reference: one bit after the other
# ------------------------------------------------------------------------------------


def bit_stream(codes: list[int], bits: int) -> list[int]:
    """Words as signed numbers: bit j of code k is bit k b + j of the stream."""
    words = [0] * -(-len(codes) * bits // 32)
    for place, code in enumerate(codes):
        for bit in range(bits):
            at = place * bits + bit
            words[at // 32] |= (code >> bit & 1) << (at % 32)
    return [word - 2**32 if word >= 2**31 else word for word in words]


def awq_words(codes: list[int]) -> list[int]:
    """Words of eight codes each: 4-bit field i of word c is code 8 c + AWQ_ORDER[i]."""
    words = [
        sum(codes[8 * c + AWQ_ORDER[i]] << 4 * i for i in range(8)) for c in range(len(codes) // 8)
    ]
    return [word - 2**32 if word >= 2**31 else word for word in words]


def int32(rows: list[list[int]]) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.int32)


def slow_gptq(codes, zero, scale, index, bits, version=2) -> dict[str, torch.Tensor]:
    """GPTQ's tensors for codes [out, in], zero and scale [out, groups], index [in]."""
    shift = 1 if version == 1 else 0
    stored = [[(z - shift) % 2**bits for z in column] for column in zero.T.tolist()]
    return {
        "qweight": int32([bit_stream(row, bits) for row in codes.tolist()]).T.contiguous(),
        "qzeros": int32([bit_stream(row, bits) for row in stored]),
        "scales": scale.T.contiguous(),
        "g_idx": index.to(torch.int32),
    }


def slow_awq(codes, zero, scale) -> dict[str, torch.Tensor]:
    return {
        "qweight": int32([awq_words(column) for column in codes.T.tolist()]),
        "qzeros": int32([awq_words(column) for column in zero.T.tolist()]),
        "scales": scale.T.contiguous(),
    }


def slow_compressed(codes, zero, scale, bits, symmetric) -> dict[str, torch.Tensor]:
    tensors = {
        "weight_packed": int32([bit_stream(row, bits) for row in codes.tolist()]),
        "weight_scale": scale,
        "weight_shape": torch.tensor(codes.shape),
    }
    if not symmetric:
        tensors["weight_zero_point"] = int32(
            [bit_stream(column, bits) for column in zero.T.tolist()]
        ).T.contiguous()
    return tensors


def random_layer(bits, rows, columns, group, symmetric, seed=0, dtype=torch.float16):
    """Codes, zero points and scales, and the weights they stand for by definition, float32."""
    generator = torch.Generator().manual_seed(seed)
    groups = -(-columns // group)
    codes = torch.randint(0, 2**bits, (rows, columns), generator=generator, dtype=torch.uint8)
    zero = torch.randint(0, 2**bits, (rows, groups), generator=generator, dtype=torch.uint8)
    if symmetric:
        zero = torch.full_like(zero, 2 ** (bits - 1))
    scale = ((torch.rand(rows, groups, generator=generator) + 0.5) / 2**bits / 8).to(dtype)
    return codes, zero, scale


def meaning(codes, zero, scale, index) -> torch.Tensor:
    return scale.float()[:, index] * (codes.float() - zero.float()[:, index])


class Tensors(dict):
    """Stands in for a reader: a dict of tensors."""

    class checkpoint:
        folder = "the file"

    def read(self, name, device="cpu"):
        if name not in self:
            raise SlimError(f"the file has no tensor '{name}'.")
        return self[name]


@st.composite
def layers(draw, widths=(1, 8), multiple=1):
    bits, symmetric = draw(st.integers(*widths)), draw(st.booleans())
    rows, columns = multiple * draw(st.integers(1, 40 // multiple)), draw(st.integers(1, 70))
    group = draw(st.sampled_from([1, 5, 16, 32, columns]))
    return bits, rows, columns, min(group, columns), symmetric, draw(st.integers(0, 2**31))


def scheme_of(bits, columns, group, symmetric) -> Scheme:
    return Scheme(bits, -1 if group == columns else group, symmetric)


def returns(form, tensors, config, scheme, codes, zero, scale, index):
    """Require that reading the tensors gives the layer back."""
    stored = read_config(config)
    named = Tensors({f"layer.{key}": value for key, value in tensors.items()})
    packed = form.read(named, "layer", codes.shape[1], codes.shape[0], scheme, stored)
    assert torch.equal(packed.packed, pack(codes, scheme.bits))
    assert torch.equal(packed.zero, zero) and torch.equal(packed.scale, scale)
    plain = torch.arange(codes.shape[1]) // scheme.group(codes.shape[1])
    assert torch.equal(plain if packed.group_index is None else packed.group_index, index)


def equal(found: dict, expected: dict) -> None:
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        assert found[key].dtype == tensor.dtype and torch.equal(found[key], tensor), key


@settings(max_examples=40, deadline=None)
@given(layers())
def test_gptq_is_a_stream_down_the_columns(case):
    bits, rows, columns, group, symmetric, seed = case
    codes, zero, scale = random_layer(bits, rows, columns, group, symmetric, seed)
    index = torch.arange(columns) // group
    scheme, form = scheme_of(bits, columns, group, symmetric), get_format("gptq")
    tensors = form.tensors(Quantized(codes, scale, zero, scheme))
    equal(tensors, slow_gptq(codes, zero, scale, index, bits, version=1 if symmetric else 2))
    config = form.config({"layer": scheme}, ["layer"])
    assert config["checkpoint_format"] == ("gptq" if symmetric else "gptq_v2")
    returns(form, tensors, config, scheme, codes, zero, scale, index)
    version_1 = slow_gptq(codes, zero, scale, index, bits, version=1)
    returns(
        form, version_1, {**config, "checkpoint_format": "gptq"}, scheme, codes, zero, scale, index
    )


@settings(max_examples=30, deadline=None)
@given(layers(widths=(4, 4), multiple=8))
def test_awq_interleaves_eight_outputs(case):
    bits, rows, columns, group, symmetric, seed = case
    codes, zero, scale = random_layer(bits, rows, columns, group, symmetric, seed)
    scheme, form = scheme_of(bits, columns, group, symmetric), get_format("awq")
    tensors = form.tensors(Quantized(codes, scale, zero, scheme))
    equal(tensors, slow_awq(codes, zero, scale))
    returns(
        form,
        tensors,
        form.config({"layer": scheme}, []),
        scheme,
        codes,
        zero,
        scale,
        torch.arange(columns) // group,
    )


@settings(max_examples=30, deadline=None)
@given(layers())
def test_compressed_tensors_is_a_stream_along_the_rows(case):
    bits, rows, columns, group, symmetric, seed = case
    codes, zero, scale = random_layer(bits, rows, columns, group, symmetric, seed, torch.bfloat16)
    scheme, form = scheme_of(bits, columns, group, symmetric), get_format("compressed-tensors")
    tensors = form.tensors(Quantized(codes, scale, zero, scheme))
    equal(tensors, slow_compressed(codes, zero, scale, bits, symmetric))
    config = form.config({"layer": scheme}, ["layer"])
    returns(form, tensors, config, scheme, codes, zero, scale, torch.arange(columns) // group)


@pytest.mark.parametrize("name", ["compressed-tensors", "gptq"])
def test_groups_in_activation_order_come_back(name):
    codes, zero, scale = random_layer(3, 8, 64, 16, False)
    index = torch.arange(64)[torch.randperm(64, generator=torch.Generator().manual_seed(2))] // 16
    form, scheme = get_format(name), Scheme(3, 16, False)
    tensors = form.tensors(Quantized(codes, scale, zero, scheme, index))
    key = "g_idx" if name == "gptq" else "weight_g_idx"
    assert tensors[key].dtype == torch.int32 and tensors[key].tolist() == index.tolist()
    config = form.config({"layer": scheme}, ["layer"], ordered=True)
    returns(form, tensors, config, scheme, codes, zero, scale, index)


# Whole checkpoints
# -----------------------------------------------------------------------------------------------------


class Source:
    """A small plain checkpoint, its tensors, and the logits of the same model with other
    weights."""

    def __init__(self, folder, **changes):
        sizes = dict(
            vocab_size=192, num_hidden_layers=2, tie_word_embeddings=False, dtype="float16"
        )
        self.folder = build_small(changes.pop("family", "llama"), folder, **{**sizes, **changes})
        self.tensors = load_file(self.folder / "model.safetensors")
        self.config = json.loads((self.folder / "config.json").read_text())
        self.linears = [
            name.removesuffix(".weight") for name in self.tensors if "_proj.weight" in name
        ]
        self.model = AutoModelForCausalLM.from_pretrained(self.folder, dtype=torch.float32).eval()
        self.tokens = torch.randint(3, 192, (2, 24), generator=torch.Generator().manual_seed(5))

    def logits(self, dense, dtype=torch.float32):
        """Logits with the weights ``dense``, all in ``dtype``."""
        weights = {name: tensor.to(dtype) for name, tensor in dense.items()}
        # buffers stay as exact as they are
        self.model.load_state_dict(weights, strict=False, assign=True)
        self.model.tie_weights()
        return logits(self.model, self.tokens)

    def quantize(self, folder, name, schemes, ordered=False, **changes):
        """Write ``folder`` in a format by round to nearest; return the dense weights that it stands
        for."""
        form = get_format(name)
        dtype = getattr(torch, form.scale_dtype(self.config["dtype"]))
        stored, dense = {}, {}
        for key, tensor in self.tensors.items():
            layer = key.removesuffix(".weight")
            stored[key] = dense[key] = tensor
            if layer in schemes:
                quantized = rounded(tensor.float(), schemes[layer], dtype, ordered)
                dense[key] = quantized.dequantize()
                del stored[key]
                stored.update(
                    {f"{layer}.{end}": value for end, value in form.tensors(quantized).items()}
                )
        config = form.config(schemes, [*self.linears, "lm_head"], ordered)
        self.write(folder, stored, config, **changes)
        return dense

    def write(self, folder, tensors, quantization, **changes):
        folder.mkdir(parents=True)
        for path in self.folder.iterdir():
            if path.name != "model.safetensors":
                shutil.copyfile(path, folder / path.name)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        config = {**self.config, "quantization_config": quantization, **changes}
        (folder / "config.json").write_text(json.dumps(config))


def rounded(weight, scheme, dtype, ordered=False) -> Quantized:
    """Round to nearest; where ``ordered``, in groups of columns drawn at random."""
    if not ordered:
        return minmax(weight, scheme, dtype)
    columns = weight.shape[1]
    order = torch.randperm(columns, generator=torch.Generator().manual_seed(columns))
    inside = minmax(weight[:, order], scheme, dtype)
    place = order.argsort()
    return Quantized(
        inside.codes[:, place], inside.scale, inside.zero, scheme, place // scheme.group(columns)
    )


def logits(model, tokens):
    with torch.no_grad():
        return model(tokens).logits.float()


def relative(found, expected):
    return ((found - expected).norm() / expected.norm()).item()


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return Source(tmp_path_factory.mktemp("plain") / "llama")


@pytest.fixture(scope="module")
def tied(tmp_path_factory):
    return Source(
        tmp_path_factory.mktemp("plain") / "tied", tie_word_embeddings=True, num_hidden_layers=1
    )


CASES = [
    (name, bits, symmetric, ordered)
    for name in INTEGERS
    for bits in (2, 3, 4, 8)
    for symmetric in (True, False)
    for ordered in (False, True)
    if name != "awq" or (bits == 4 and not ordered)
]


@pytest.mark.parametrize(("name", "bits", "symmetric", "ordered"), CASES)
def test_reloaded_logits_equal_those_of_the_rounded_weights(
    name, bits, symmetric, ordered, source, tmp_path
):
    schemes = dict.fromkeys(source.linears, Scheme(bits, 32, symmetric))
    get_format(name).check(schemes, ordered)
    dense = source.quantize(tmp_path / "q", name, schemes, ordered)
    model = load_model(tmp_path / "q", "float32")
    assert sum(isinstance(module, QuantLinear) for module in model.modules()) == 14
    assert relative(logits(model, source.tokens), source.logits(dense)) < 1e-5
    half = load_model(tmp_path / "q", "float16")
    assert relative(logits(half, source.tokens), source.logits(dense, torch.float16)) < 2e-3
    checkpoint = open_checkpoint(tmp_path / "q")
    assert {packed_schemes(checkpoint.spec)[layer].bits for layer in schemes} == {bits}
    require_expected_bytes(checkpoint)


def require_expected_bytes(checkpoint):
    """The description foretells the tensors' bytes, but for the notes of shapes."""
    widths = {"F32": 4, "F16": 2, "BF16": 2, "I32": 4, "I64": 8}
    held = 0
    for name, (_, dtype, shape) in checkpoint.tensors.items():
        if not name.endswith("weight_shape"):
            held += widths[dtype] * torch.Size(shape).numel()
    assert weight_bytes(checkpoint.spec) == held


@pytest.mark.parametrize("name", ["compressed-tensors", "gptq"])
def test_layers_may_differ_and_stay_plain(name, source, tmp_path):
    schemes = {
        layer: Scheme(3 if "mlp" in layer else 8, 64 if ".0." in layer else -1, True)
        for layer in source.linears
        if "v_proj" not in layer
    }
    dense = source.quantize(tmp_path / "q", name, schemes)
    stored = read_config(open_checkpoint(tmp_path / "q").spec.quantization)
    assert {layer: stored.scheme(layer) for layer in [*source.linears, "lm_head"]} == {
        **dict.fromkeys([*source.linears, "lm_head"]),
        **schemes,
    }
    model = load_model(tmp_path / "q", "float32")
    assert relative(logits(model, source.tokens), source.logits(dense)) < 1e-5
    require_expected_bytes(open_checkpoint(tmp_path / "q"))


def test_awq_leaves_layers_plain(source, tmp_path):
    """Named where AutoAWQ and transformers look, and again where GPTQModel does."""
    schemes = {layer: Scheme(4, 32, False) for layer in source.linears if "k_proj" not in layer}
    dense = source.quantize(tmp_path / "q", "awq", schemes)
    config = open_checkpoint(tmp_path / "q").spec.quantization
    plain = [layer for layer in source.linears if "k_proj" in layer]
    assert config["modules_to_not_convert"] == [*plain, "lm_head"]
    for part in ("modules_to_not_convert", "dynamic"):
        stored = read_config({key: value for key, value in config.items() if key != part})
        assert [stored.scheme(layer) for layer in plain] == [None, None]
        assert all(stored.scheme(layer) for layer in schemes)
    model = load_model(tmp_path / "q", "float32")
    assert relative(logits(model, source.tokens), source.logits(dense)) < 1e-5
    require_expected_bytes(open_checkpoint(tmp_path / "q"))


# Embedding and head
# ----------------------------------------------------------------------------------------------------

ENDS = {"lm_head": Scheme(8, -1, True), "model.embed_tokens": Scheme(8, -1, True)}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_quantised_embedding_and_head(dtype, source, tmp_path):
    schemes = {**dict.fromkeys(source.linears, Scheme(4, 32, False)), **ENDS}
    dense = source.quantize(tmp_path / "q", "compressed-tensors", schemes)
    model = load_model(tmp_path / "q", dtype)
    assert isinstance(model.get_input_embeddings(), QuantEmbedding)
    assert isinstance(model.get_output_embeddings(), QuantLinear)
    tolerance = 1e-5 if dtype == "float32" else 2e-2
    assert (
        relative(logits(model, source.tokens), source.logits(dense, getattr(torch, dtype)))
        < tolerance
    )
    require_expected_bytes(open_checkpoint(tmp_path / "q"))


@pytest.mark.parametrize(
    "scheme", [Scheme(8, -1, True), Scheme(4, 32, False), Scheme(3, 64, False)], ids=str
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_tied_model_holds_its_packed_embedding_once(scheme, dtype, tied, tmp_path):
    schemes = {
        **dict.fromkeys(tied.linears, Scheme(4, 32, False)),
        "model.embed_tokens": scheme,
        "lm_head": scheme,
    }
    dense = tied.quantize(tmp_path / "q", "compressed-tensors", schemes)
    assert not any(name.startswith("lm_head") for name in open_checkpoint(tmp_path / "q").tensors)
    require_expected_bytes(open_checkpoint(tmp_path / "q"))
    model = load_model(tmp_path / "q", dtype)
    assert model.get_output_embeddings() is model.get_input_embeddings().table
    tolerance = 1e-5 if dtype == "float32" else 2e-2
    assert (
        relative(logits(model, tied.tokens), tied.logits(dense, getattr(torch, dtype))) < tolerance
    )
    generated = model.generate(tied.tokens[:1], max_new_tokens=4, do_sample=False, pad_token_id=1)
    assert generated.shape[1] > tied.tokens.shape[1]


@pytest.mark.parametrize("name", ["compressed-tensors", "gptq"])
def test_a_tied_model_with_only_its_head_quantised_is_untied(name, tied, tmp_path):
    tied.tensors["lm_head.weight"] = tied.tensors["model.embed_tokens.weight"].clone()
    try:
        schemes = dict.fromkeys([*tied.linears, "lm_head"], Scheme(4, 32, True))
        dense = tied.quantize(tmp_path / "q", name, schemes, tie_word_embeddings=False)
    finally:
        del tied.tensors["lm_head.weight"]
    model = load_model(tmp_path / "q", "float32")
    assert isinstance(model.get_output_embeddings(), QuantLinear)
    assert torch.equal(
        model.get_input_embeddings().weight, dense["model.embed_tokens.weight"].float()
    )
    untied = AutoModelForCausalLM.from_config(model.config, dtype=torch.float32).eval()
    untied.load_state_dict(dense)
    assert relative(logits(model, tied.tokens), logits(untied, tied.tokens)) < 1e-5
    require_expected_bytes(open_checkpoint(tmp_path / "q"))


def test_an_embedding_keeps_the_factor_of_its_family(tmp_path):
    gemma = Source(
        tmp_path / "plain", family="gemma3_text", num_hidden_layers=1, tie_word_embeddings=True
    )
    schemes = dict.fromkeys([*gemma.linears, "model.embed_tokens", "lm_head"], Scheme(4, 32, False))
    dense = gemma.quantize(tmp_path / "q", "compressed-tensors", schemes)
    assert (
        relative(logits(load_model(tmp_path / "q", "float32"), gemma.tokens), gemma.logits(dense))
        < 1e-5
    )


# Plain transformers
# ----------------------------------------------------------------------------------------------------


def theirs(folder, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
def test_transformers_reads_compressed_tensors(bits, symmetric, source, tmp_path):
    pytest.importorskip("compressed_tensors")
    from transformers import CompressedTensorsConfig

    schemes = dict.fromkeys(source.linears, Scheme(bits, 32, symmetric))
    dense = source.quantize(tmp_path / "q", "compressed-tensors", schemes)
    options = {} if symmetric else {"quantization_config": CompressedTensorsConfig(dequantize=True)}
    assert (
        relative(logits(theirs(tmp_path / "q", **options), source.tokens), source.logits(dense))
        < 1e-3
    )


def test_transformers_reads_layers_that_differ_where_they_are_symmetric(source, tmp_path):
    pytest.importorskip("compressed_tensors")
    schemes = {
        layer: Scheme(3 if "mlp" in layer else 4, 32, True)
        for layer in source.linears
        if "v_proj" not in layer
    }
    dense = source.quantize(
        tmp_path / "q", "compressed-tensors", {**schemes, "lm_head": Scheme(8, -1, True)}
    )
    assert relative(logits(theirs(tmp_path / "q"), source.tokens), source.logits(dense)) < 1e-3


# Files of others
# -------------------------------------------------------------------------------------------------------


def foreign(
    source, folder, quantization, make, group=32, bits=4, symmetric=False, plain=(), index=None
):
    """Write a file with random packed layers made by ``make(layer's codes, zero, scale, index)``;
    return its weights."""
    stored, dense = {}, {}
    for number, (key, tensor) in enumerate(source.tensors.items()):
        layer = key.removesuffix(".weight")
        stored[key] = dense[key] = tensor
        if layer in source.linears and layer not in plain:
            rows, columns = tensor.shape
            codes, zero, scale = random_layer(bits, rows, columns, group, symmetric, number)
            order = torch.arange(columns) // group if index is None else index(columns)
            dense[key] = meaning(codes, zero, scale, order)
            del stored[key]
            stored.update(
                {f"{layer}.{end}": value for end, value in make(codes, zero, scale, order).items()}
            )
    source.write(folder, stored, quantization)
    return dense


@pytest.fixture(scope="module")
def one_block(tmp_path_factory):
    sizes = dict(num_hidden_layers=1, intermediate_size=64, family="qwen2")
    return Source(tmp_path_factory.mktemp("plain") / "qwen2", **sizes)


def shuffled_groups(columns):
    return (torch.randperm(columns, generator=torch.Generator().manual_seed(columns)) // 32).long()


def uneven_groups(columns):
    """Groups of different sizes, which no order of the columns makes whole."""
    return torch.tensor([0] * 40 + [1] * (columns - 40))


@pytest.mark.parametrize(
    ("change", "version", "index"),
    [
        # zero points stored minus one, no version named, as AutoGPTQ's older files
        ({"sym": False}, 1, None),
        ({"sym": False, "desc_act": True, "checkpoint_format": "gptq"}, 1, shuffled_groups),
        (
            {
                "sym": True,
                "desc_act": True,
                "checkpoint_format": "gptq_v2",
                "is_marlin_format": False,
            },
            2,
            uneven_groups,
        ),
        (
            {
                "sym": False,
                "checkpoint_format": "gptq",
                "dynamic": {"-:.*down_proj": {}},
                "meta": {},
            },
            1,
            "missing",
        ),
        (
            {"sym": False, "modules_in_block_to_quantize": [["self_attn.q_proj"], ["mlp.up_proj"]]},
            1,
            None,
        ),
    ],
    ids=["v1", "desc_act", "uneven", "no g_idx, a plain layer", "listed layers"],
)
@pytest.mark.parametrize("bits", [4, 3])
def test_gptq_files_of_others(change, version, index, bits, one_block, tmp_path):
    def make(codes, zero, scale, order):
        tensors = slow_gptq(codes, zero, scale, order, bits, version)
        return {
            key: value for key, value in tensors.items() if index != "missing" or key != "g_idx"
        }

    plain = [
        layer for layer in one_block.linears if "dynamic" in change and layer.endswith("down_proj")
    ]
    if "modules_in_block_to_quantize" in change:
        plain = [layer for layer in one_block.linears if not layer.endswith(("q_proj", "up_proj"))]
    config = {"quant_method": "gptq", "bits": bits, "group_size": 32, "damp_percent": 0.1, **change}
    function = index if callable(index) else None
    dense = foreign(one_block, tmp_path / "q", config, make, bits=bits, plain=plain, index=function)
    model = load_model(tmp_path / "q", "float32")
    assert sum(isinstance(module, QuantLinear) for module in model.modules()) == 7 - len(plain)
    assert relative(logits(model, one_block.tokens), one_block.logits(dense)) < 1e-5


@pytest.mark.parametrize("zero_point", [True, False])
@pytest.mark.parametrize("names", ["transformers", "autoawq"])
def test_awq_files_of_others(zero_point, names, one_block, tmp_path):
    plain = [layer for layer in one_block.linears if "k_proj" in layer]
    sizes = (
        {"bits": 4, "group_size": 16}
        if names == "transformers"
        else {"w_bit": 4, "q_group_size": 16}
    )
    config = {"quant_method": "awq", "version": "GEMM", "zero_point": zero_point, **sizes}
    config["modules_to_not_convert"] = ["k_proj"]

    def make(codes, zero, scale, order):
        tensors = slow_awq(codes, zero, scale)
        return (
            tensors
            if zero_point
            else {key: value for key, value in tensors.items() if key != "qzeros"}
        )

    dense = foreign(
        one_block, tmp_path / "q", config, make, group=16, symmetric=not zero_point, plain=plain
    )
    model = load_model(tmp_path / "q", "float32")
    assert sum(isinstance(module, QuantLinear) for module in model.modules()) == 6
    assert relative(logits(model, one_block.tokens), one_block.logits(dense)) < 1e-5


def test_compressed_tensors_files_of_others(one_block, tmp_path):
    """Several groups by pattern, class and name, 8 and 4 bits, and patterns on the ignore list."""

    def group(bits, targets, **more):
        weights = {
            "num_bits": bits,
            "type": "int",
            "symmetric": False,
            "strategy": "group",
            "group_size": 32,
            **more,
        }
        return {"targets": targets, "weights": weights, "format": "pack-quantized"}

    config = {
        "quant_method": "compressed-tensors",
        "format": "mixed-precision",
        "config_groups": {
            "a": group(4, ["Linear"]),
            "b": group(8, ["re:.*mlp[.].*"], actorder="static"),
            "c": group(3, ["model.layers.0.mlp.up_proj"]),
        },
        "ignore": ["re:.*[.]k_proj$", "lm_head"],
    }
    stored, dense = dict(one_block.tensors), dict(one_block.tensors)
    for number, layer in enumerate(one_block.linears):
        if layer.endswith("k_proj"):
            continue
        bits = 3 if layer.endswith("up_proj") else 8 if "mlp" in layer else 4
        rows, columns = stored.pop(f"{layer}.weight").shape
        codes, zero, scale = random_layer(bits, rows, columns, 32, False, number)
        dense[f"{layer}.weight"] = meaning(codes, zero, scale, torch.arange(columns) // 32)
        stored.update(
            {f"{layer}.{k}": v for k, v in slow_compressed(codes, zero, scale, bits, False).items()}
        )
    one_block.write(tmp_path / "q", stored, config)
    model = load_model(tmp_path / "q", "float32")
    assert sum(isinstance(module, QuantLinear) for module in model.modules()) == 6
    assert relative(logits(model, one_block.tokens), one_block.logits(dense)) < 1e-5


def test_targets_hold_as_in_the_library():
    """Names, patterns and classes in several groups, against compressed-tensors' own choice of a
    group."""
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config

    groups = [
        ["re:.*[.]1[.].*", "Linear"],
        ["layers.0.up", "Embedding"],
        ["re:.*up$", "layers.1.down"],
        ["layers.0.up"],
    ]
    config = {**compressed(), "ignore": ["layers.2.up", "re:.*0.down"]}
    weights = config["config_groups"]["group_0"]["weights"]
    config["config_groups"] = {
        f"group_{number}": {"targets": targets, "weights": {**weights, "num_bits": number + 1}}
        for number, targets in enumerate(groups)
    }
    blocks = [
        torch.nn.ModuleDict({"up": torch.nn.Linear(32, 32), "down": torch.nn.Linear(32, 32)})
        for _ in range(4)
    ]
    model = torch.nn.ModuleDict(
        {
            "layers": torch.nn.ModuleList(blocks),
            "model": torch.nn.ModuleDict({"embed_tokens": torch.nn.Embedding(8, 32)}),
        }
    )
    apply_quantization_config(
        model,
        QuantizationConfig(**{**config, "quantization_status": "frozen"}),
        show_progress=False,
    )
    stored = read_config(config)
    for name, module in model.named_modules():
        if isinstance(module, (torch.nn.Linear, torch.nn.Embedding)):
            own, library = stored.scheme(name), getattr(module, "quantization_scheme", None)
            assert (own and own.bits) == (library and library.weights.num_bits), name


# What is refused
# -------------------------------------------------------------------------------------------------------

LAYER = "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("name", "schemes", "ordered", "message"),
    [
        ("awq", {LAYER: Scheme(3, 32, False)}, False, "awq holds 4 bits only, not 3.*quant.bits=4"),
        (
            "awq",
            {LAYER: Scheme(4, 32, False), "x": Scheme(4, 64, False)},
            False,
            "one scheme for all layers",
        ),
        ("awq", {LAYER: Scheme(4, 32, False)}, True, "activation order"),
        ("awq", {"lm_head": Scheme(4, 32, False)}, False, "leaves the head plain"),
        (
            "awq",
            {"model.embed_tokens": Scheme(4, 32, False)},
            False,
            "linear layers only.*compressed-tensors",
        ),
        (
            "gptq",
            {"model.embed_tokens": Scheme(4, 32, False)},
            False,
            "linear layers only.*compressed-tensors",
        ),
        (
            "gptq",
            {LAYER: Scheme(4, 32, False), "x": Scheme(4, 32, True)},
            False,
            "symmetric or asymmetric together",
        ),
    ],
)
def test_what_a_format_cannot_hold(name, schemes, ordered, message):
    with pytest.raises(SlimError, match=message):
        get_format(name).check(schemes, ordered)


def test_awq_wants_outputs_in_eights():
    with pytest.raises(SlimError, match="12 outputs of .*q_proj are no multiple of 8"):
        get_format("awq").check({LAYER: Scheme(4, 32, False)}, False, {LAYER: (12, 64)})


def test_unknown_format():
    with pytest.raises(
        SlimError,
        match=r"quant\.format=gpt: must be one of compressed-tensors, gptq, awq, gguf\..*gptq",
    ):
        get_format("gpt")


GPTQ_CONFIG = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True}
AWQ_CONFIG = {
    "quant_method": "awq",
    "bits": 4,
    "group_size": 32,
    "zero_point": True,
    "version": "gemm",
}


def compressed(**weights):
    weights = {
        "num_bits": 4,
        "type": "int",
        "symmetric": True,
        "strategy": "group",
        "group_size": 32,
        **weights,
    }
    group = {"targets": ["Linear"], "weights": weights}
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {"group_0": group},
    }


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"quant_method": "aqlm"},
            "quant_method=aqlm. slim reads compressed-tensors, gptq, awq, bitsandbytes",
        ),
        ({"quant_method": "bitsandbytes"}, "neither load_in_4bit nor load_in_8bit"),
        ({}, "quant_method=None"),
        (
            {**GPTQ_CONFIG, "checkpoint_format": "marlin"},
            "format marlin. slim reads gptq and gptq_v2",
        ),
        ({**GPTQ_CONFIG, "is_marlin_format": True}, "slim reads gptq and gptq_v2"),
        ({**GPTQ_CONFIG, "pack_dtype": "int64"}, "into int64"),
        ({**GPTQ_CONFIG, "bits": "four"}, "has bits=four"),
        ({**GPTQ_CONFIG, "bits": 16}, "says 16 bits"),
        ({**GPTQ_CONFIG, "group_size": 0}, "group_size=0"),
        ({"quant_method": "gptq", "bits": 4}, "has no group_size"),
        ({**GPTQ_CONFIG, "dynamic": {"+:.*": {"bits": 12}}}, "says 12 bits"),
        ({**AWQ_CONFIG, "version": "gemv"}, "version gemv. slim reads the version gemm"),
        ({**AWQ_CONFIG, "bits": 8}, "awq with 8 bits"),
        ({**AWQ_CONFIG, "group_size": None}, "group_size=None"),
        ({**compressed(), "format": "float-quantized"}, "float-quantized.*pack-quantized"),
        ({**compressed(), "config_groups": {}}, "no config_groups"),
        (
            {**compressed(), "config_groups": {"group_0": {"targets": ["Linear"]}}},
            "group_0: slim reads integer weights",
        ),
        (compressed(type="float"), "integer weights of 1 to 8 bits"),
        (compressed(num_bits=16), "integer weights of 1 to 8 bits"),
        (compressed(strategy="tensor"), "not per tensor"),
        (compressed(group_size=None), "group_size=None"),
        (
            {**compressed(), "transform_config": {"config_groups": {"R1": {}}}},
            "rotates activations",
        ),
        (compressed(dynamic=True), "plain activations only"),
    ],
)
def test_configs_that_cannot_be_read(config, message):
    with pytest.raises(SlimError, match=f"some model.*{message}"):
        read_config(config, "some model")


@pytest.fixture(scope="module")
def gptq_file(source, tmp_path_factory):
    folder = tmp_path_factory.mktemp("packed") / "gptq"
    source.quantize(folder, "gptq", dict.fromkeys(source.linears, Scheme(4, 32, False)))
    return folder


def damaged(folder, target, tensor=None, value=None, **config):
    """Copy a checkpoint with one tensor replaced (None: left out) and entries of its
    quantization_config changed."""
    shutil.copytree(folder, target)
    if tensor:
        tensors = load_file(folder / "model.safetensors")
        tensors.pop(tensor)
        if value is not None:
            tensors[tensor] = value
        save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    whole = json.loads((target / "config.json").read_text())
    whole["quantization_config"].update(config)
    (target / "config.json").write_text(json.dumps(whole))
    return target


@pytest.mark.parametrize(
    ("tensor", "value", "config", "message"),
    [
        ("qweight", None, {}, "has no tensor '{}.qweight'.*gptq"),
        ("qzeros", None, {}, "has no tensor '{}.qzeros'"),
        (
            "scales",
            torch.full((2, 64), float("nan"), dtype=torch.float16),
            {},
            "{}.scales .* contains NaN or infinity",
        ),
        (
            "scales",
            torch.ones(4, 64).half(),
            {},
            "{}.scales .* is 4 x 64, but the config asks for 2 x 64",
        ),
        (
            "qweight",
            torch.zeros(9, 64, dtype=torch.int32),
            {},
            "{}.qweight .* is 9 x 64, but the config asks for 8 x 64",
        ),
        (
            "qweight",
            torch.zeros(8, 64),
            {},
            "{}.qweight .* is torch.float32; packed codes are torch.int32",
        ),
        (
            "g_idx",
            torch.full((64,), 2, dtype=torch.int32),
            {},
            "{}.g_idx .* groups 2 to 2; the layer has groups 0 to 1",
        ),
        ("g_idx", None, {"desc_act": True}, "has no tensor '{}.g_idx'"),
        (None, None, {"bits": 8}, "{}.qweight .* is 8 x 64, but the config asks for 16 x 64"),
        (None, None, {"group_size": 64}, "{}.scales .* is 2 x 64, but the config asks for 1 x 64"),
        (None, None, AWQ_CONFIG, "{}.qweight .* is 8 x 64, but the config asks for 64 x 8"),
        (None, None, compressed(), "has no tensor '{}.weight_packed'.*compressed-tensors"),
        (
            None,
            None,
            {"dynamic": {"-:.*q_proj": {}}},
            "holds '{}.qweight', but its quantization_config says .* plain",
        ),
    ],
)
def test_damaged_files_and_wrong_configs(tensor, value, config, message, gptq_file, tmp_path):
    folder = damaged(gptq_file, tmp_path / "bad", tensor and f"{LAYER}.{tensor}", value, **config)
    with pytest.raises(SlimError, match=message.format(LAYER.replace(".", r"\."))):
        load_model(folder, "float32")


@pytest.mark.parametrize("name", INTEGERS)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_scales_that_are_not_finite(name, value):
    codes, zero, scale = random_layer(4, 8, 32, 16, False)
    scale[3, 1] = value
    form, scheme = get_format(name), Scheme(4, 16, False)
    tensors = form.tensors(Quantized(codes, scale, zero, scheme))
    stored = read_config(form.config({"layer": scheme}, []))
    with pytest.raises(SlimError, match="contains NaN or infinity"):
        form.read(
            Tensors({f"layer.{key}": tensor for key, tensor in tensors.items()}),
            "layer",
            32,
            8,
            scheme,
            stored,
        )


def test_a_wrong_note_of_the_shape_is_found(source, tmp_path):
    source.quantize(
        tmp_path / "q", "compressed-tensors", dict.fromkeys(source.linears, Scheme(4, 32, True))
    )
    folder = damaged(
        tmp_path / "q", tmp_path / "bad", f"{LAYER}.weight_shape", torch.tensor([64, 128])
    )
    with pytest.raises(SlimError, match="says 64 x 128 where config.json asks for 64 x 64"):
        load_model(folder, "float32")


# Description and layers
# ------------------------------------------------------------------------------------------------


def test_stored_bits_per_weight():
    config = dict(
        model_type="llama", hidden_size=512, intermediate_size=512, num_attention_heads=8, num_hidden_layers=1,
        vocab_size=512, dtype="bfloat16",
    )  # fmt: skip
    model = ModelSpec(config)
    linears = [name for name in model.matrices() if "_proj" in name]

    def bits(name, scheme, ordered=False):
        quantization = get_format(name).config(
            dict.fromkeys(linears, scheme), [*linears, "lm_head"], ordered
        )
        return packed_bits(model.with_config(quantization_config=quantization))

    assert bits("compressed-tensors", Scheme(4, 128, False)) == pytest.approx(4 + 20 / 128)
    assert bits("compressed-tensors", Scheme(4, 128, True)) == pytest.approx(4 + 16 / 128)
    assert bits("compressed-tensors", Scheme(3, 64, True), ordered=True) == pytest.approx(
        3 + 16 / 64 + 32 / 512
    )
    assert bits("gptq", Scheme(3, 64, True)) == pytest.approx(3 + 19 / 64 + 32 / 512)
    assert bits("awq", Scheme(4, 128, False)) == pytest.approx(4 + 20 / 128)


def packed_layer(rows, columns, scheme, dtype, index=None):
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(8))
    quantized = minmax(weight, scheme, dtype)
    stored = Packed(pack(quantized.codes, scheme.bits), quantized.scale, quantized.zero, index)
    return QuantLinear(columns, rows, scheme, dtype).take(
        stored
    ).choose_kernel(), quantized.dequantize()


LAYERS = [
    (Scheme(4, 32, False), torch.bfloat16, "int4"),
    (Scheme(3, 32, False), torch.bfloat16, "int4"),
    (Scheme(2, -1, True), torch.bfloat16, "int4"),
    (Scheme(8, -1, True), torch.bfloat16, "int8"),
    (Scheme(8, -1, False), torch.bfloat16, "int4 halves"),
    (Scheme(3, 32, False), torch.float32, None),
]


def require_int4(kernel):
    if "int4" in str(kernel) and not (int4_layout() and int4_kernel_is_fast()):
        pytest.skip("torch's int4 kernel on this CPU is a plain loop")


@pytest.mark.parametrize(("scheme", "dtype", "kernel"), LAYERS, ids=str)
def test_every_way_of_computing_gives_the_same(scheme, dtype, kernel):
    """Few rows, many rows, with a gradient, single rows of the matrix: all against the dense
    product in float64."""
    require_int4(kernel)
    layer, dense = packed_layer(192, 96, scheme, dtype)
    assert layer.kernel == kernel
    torch.testing.assert_close(layer.dense_weight(), dense)
    tolerance = 6e-3 if dtype == torch.bfloat16 else 1e-6
    for count in (1, INT8_ROWS, INT8_ROWS + 1, 100):
        x = torch.randn(count, 96, generator=torch.Generator().manual_seed(count)).to(dtype)
        expected = x.double() @ dense.double().T
        assert relative(layer(x).double(), expected) < tolerance
        leaf = x.clone().requires_grad_()
        output = layer(leaf)
        assert relative(output.detach().double(), expected) < tolerance
        output.double().square().sum().backward()
        assert relative(leaf.grad.double(), 2 * expected @ dense.double()) < 2 * tolerance
    ids = torch.tensor([[0, 191, 33], [32, 64, 5]])
    found = QuantEmbedding(layer)(ids)
    assert found.shape == (2, 3, 96) and relative(found.double(), dense[ids].double()) < tolerance


@pytest.mark.parametrize(("scheme", "dtype", "kernel"), LAYERS, ids=str)
@pytest.mark.filterwarnings("ignore")
def test_layers_compile_without_a_break_in_the_graph(scheme, dtype, kernel):
    require_int4(kernel)
    layer, _ = packed_layer(64, 96, scheme, dtype, torch.arange(96).flip(0) // scheme.group(96))
    torch.compiler.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    for count in (1, 60):
        x = torch.randn(count, 96, generator=torch.Generator().manual_seed(count)).to(dtype)
        assert torch.equal(compiled(x), layer(x))
    table, ids = QuantEmbedding(layer), torch.tensor([3, 60, 3])
    assert torch.equal(torch.compile(table, fullgraph=True, backend="eager")(ids), table(ids))


def test_the_operators_keep_torchs_rules():
    """torch's own checks of shapes, mutation and gradients of custom operators."""
    layer, _ = packed_layer(64, 96, Scheme(3, 32, False), torch.float32)
    parts = layer.packed_weight.parts()
    x = torch.randn(4, 96, requires_grad=True)
    torch.library.opcheck(torch.ops.slim.multiply_packed.default, (x, *parts))
    torch.library.opcheck(
        torch.ops.slim.packed_rows.default, (torch.tensor([1, 2]), *parts, torch.float32)
    )

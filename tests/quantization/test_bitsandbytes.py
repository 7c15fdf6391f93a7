"""int8 and nf4: files equal to transformers' own, decoded here from their bytes, loaded, trained,
measured, refused."""

from __future__ import annotations

import importlib.util
import json
import math
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from slim.chain.compose import compose
from slim.checkpoints.checkpoint import open_checkpoint
from slim.checkpoints.stage import Context
from slim.core.errors import SlimError
from slim.evaluation.memory import weights_bytes
from slim.loading.bitsandbytes import use_fast_kernels
from slim.loading.load_model import load_model
from slim.models.spec import ModelSpec
from slim.quantization.methods.bitsandbytes import NF4, Int8
from slim.quantization.storage import weight_bytes
from tests.conftest import build_small

bnb = pytest.importorskip("bitsandbytes")

STAGES = {"int8": Int8(), "nf4": NF4(), "nf4 single": NF4(double_quant=False)}
# The 16 numbers of NF4, as the QLoRA paper prints them (appendix E).
NF4_VALUES = [
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
]  # fmt: skip


def sixteen_bit(folder, model_type="llama", dtype="bfloat16", **changes):
    """Write a small random model in a 16-bit type, with biases that are not 0, a row of zeros and
    one of equal weights."""
    build_small(model_type, folder, **{"num_hidden_layers": 2, "intermediate_size": 192, **changes})
    tensors = load_file(folder / "model.safetensors")
    generator = torch.Generator().manual_seed(1)
    for name, tensor in tensors.items():
        if name.endswith("bias"):
            tensors[name] = torch.randn(tensor.shape, generator=generator)
        if name.endswith("1.mlp.up_proj.weight"):
            tensor[3], tensor[4] = 0, -0.5
    kept = {name: tensor.to(getattr(torch, dtype)) for name, tensor in tensors.items()}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "dtype": dtype}))
    return folder


def run(stage, source, target):
    target.mkdir(parents=True)
    return stage.run(source, target, Context())


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return sixteen_bit(tmp_path_factory.mktemp("bnb") / "source")


@pytest.fixture(scope="module")
def packed(source, tmp_path_factory):
    """Folder of every stage's result."""
    folder = tmp_path_factory.mktemp("packed")
    for name, stage in STAGES.items():
        run(stage, source, folder / name)
    return {name: folder / name for name in STAGES}


def decoded(folder) -> dict[str, torch.Tensor]:
    """Float32 weights that the files of ``folder`` stand for, from their bytes by the layouts'
    definition."""
    stored, plain = load_file(folder / "model.safetensors"), {}
    for name, tensor in stored.items():
        layer = name.removesuffix(".weight")
        if f"{layer}.SCB" in stored and name.endswith(".weight"):
            plain[name] = tensor.float() * stored[f"{layer}.SCB"].unsqueeze(1) / 127
        elif f"{name}.quant_map" in stored:
            state = json.loads(bytes(stored[f"{name}.quant_state.bitsandbytes__nf4"].tolist()))
            codes = [code for byte in tensor.flatten().tolist() for code in (byte >> 4, byte & 15)]
            scales = stored[f"{name}.absmax"]
            if f"{name}.nested_absmax" in stored:
                outer = stored[f"{name}.nested_absmax"].repeat_interleave(256)[: len(scales)]
                scales = (
                    stored[f"{name}.nested_quant_map"][scales.long()] * outer
                    + state["nested_offset"]
                )
            values = torch.tensor(NF4_VALUES)[torch.tensor(codes)].view(-1, 64) * scales.unsqueeze(
                1
            )
            plain[name] = values.view(state["shape"])
        elif name.split(".")[-1] in ("weight", "bias"):
            plain[name] = tensor.float()
    return plain


def dense_model(source, folder):
    """The source's model in float32 with the weights that ``folder`` stands for."""
    model = load_model(source, "float32")
    model.load_state_dict(decoded(folder), strict=False)
    model.tie_weights()
    return model


def tokens(rows=2, length=24):
    return torch.randint(3, 1500, (rows, length), generator=torch.Generator().manual_seed(5))


def logits(model):
    with torch.no_grad():
        return model(tokens()).logits.float()


def relative(got, expected):
    return ((got - expected).norm() / expected.norm()).item()


def quantised_on_load(folder, stage):
    """What transformers makes of the plain model by itself."""
    dtype = getattr(torch, open_checkpoint(folder).spec.dtype)
    if isinstance(stage, Int8):
        config = BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=stage.threshold)
    else:
        config = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=stage.double_quant,
            bnb_4bit_compute_dtype=dtype,
        )  # fmt: skip
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, quantization_config=config)


@pytest.mark.parametrize("stage", STAGES.values(), ids=STAGES)
@pytest.mark.parametrize(
    ("model_type", "changes"),
    [
        ("llama", {}),
        ("llama", {"dtype": "float16", "tie_word_embeddings": False}),
        ("qwen2", {}),
        ("qwen3", {"dtype": "float32"}),
    ],
    ids=["tied bfloat16", "untied float16", "biases", "norms float32"],
)
def test_files_equal_those_of_transformers(stage, model_type, changes, tmp_path):
    folder = sixteen_bit(tmp_path / "source", model_type, **changes)
    run(stage, folder, tmp_path / "ours")
    theirs = quantised_on_load(folder, stage)
    theirs.save_pretrained(tmp_path / "theirs")
    mine, other = (load_file(tmp_path / name / "model.safetensors") for name in ("ours", "theirs"))
    assert mine.keys() == other.keys()
    for name, tensor in mine.items():
        assert tensor.dtype == other[name].dtype and torch.equal(tensor, other[name]), name
    configs = [
        json.loads((tmp_path / name / "config.json").read_text()) for name in ("ours", "theirs")
    ]
    # left to their default there
    configs[1]["quantization_config"]["llm_int8_skip_modules"] = ["lm_head"]
    assert configs[0]["quantization_config"] == configs[1]["quantization_config"]
    # the way any other program does
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert torch.equal(logits(loaded), logits(theirs))


def test_int8_is_the_nearest_step_of_each_row(source, packed):
    weights, stored = (
        load_file(source / "model.safetensors"),
        load_file(packed["int8"] / "model.safetensors"),
    )
    for layer in (
        "model.layers.0.self_attn.q_proj",
        "model.layers.1.mlp.up_proj",
        "model.layers.1.mlp.down_proj",
    ):
        weight = weights[f"{layer}.weight"].double()
        largest = weight.abs().amax(1)
        assert torch.equal(stored[f"{layer}.SCB"].double(), largest)
        steps = torch.where(largest > 0, 127 / largest, 0).unsqueeze(1) * weight
        # 127 / largest is rounded to float32 and the product to float16 there, so a weight near the
        # middle may go either way
        assert ((stored[f"{layer}.weight"] - steps).abs() < 0.5 + 127 * 2**-10).all()
        assert ((stored[f"{layer}.weight"] - steps.round()) == 0).double().mean() > 0.97
    assert not stored["model.layers.1.mlp.up_proj.weight"][3].any()


@pytest.mark.parametrize("name", ["nf4", "nf4 single"])
def test_nf4_is_the_nearest_of_the_papers_numbers(name, source, packed):
    weights, plain = load_file(source / "model.safetensors"), decoded(packed[name])
    values = torch.tensor(NF4_VALUES, dtype=torch.float64)
    for layer in ("model.layers.0.self_attn.k_proj.weight", "model.layers.1.mlp.up_proj.weight"):
        weight = weights[layer].double()
        blocks = weight.view(-1, 64)
        scale = blocks.abs().amax(1, keepdim=True)
        ratio = torch.where(scale > 0, blocks / scale, 0)
        nearest = (values[(ratio.unsqueeze(-1) - values).abs().argmin(-1)] * scale).view(
            weight.shape
        )
        # One scale is off by what double quantisation rounds; a single one is exact.
        allowed = 0.03 if name == "nf4" else 1e-6
        assert relative(plain[layer].double(), nearest) < allowed


@pytest.mark.parametrize("name", ["nf4", "nf4 single"])
@pytest.mark.parametrize(
    ("dtype", "allowed"), [("float32", 1e-6), ("float16", 4e-3), ("bfloat16", 3e-2)]
)
def test_a_loaded_nf4_model_computes_with_the_stored_weights(name, dtype, allowed, source, packed):
    model = load_model(packed[name], dtype)
    assert {parameter.dtype for parameter in model.parameters()} == {
        getattr(torch, dtype),
        torch.uint8,
    }
    assert model.dtype == model.config.dtype == getattr(torch, dtype)
    assert relative(logits(model), logits(dense_model(source, packed[name]))) < allowed
    stored = load_file(packed[name] / "model.safetensors")["model.layers.0.mlp.up_proj.weight"]
    assert torch.equal(model.model.layers[0].mlp.up_proj.weight.data, stored), (
        "the layout must stay that of the file"
    )


@pytest.mark.parametrize("threshold", [6.0, 2.0, 0.0])
def test_a_loaded_int8_layer_multiplies_as_the_paper_says(threshold, source, tmp_path):
    """Rows of inputs and of weights are rounded to 127 steps; columns with outliers keep their
    inputs as they are."""
    run(Int8(threshold=threshold), source, tmp_path / "q")
    layer = load_model(tmp_path / "q", "float32").model.layers[0].mlp.down_proj
    inputs = torch.randn(16, 192, generator=torch.Generator().manual_seed(3)).half().float()
    inputs[2, 5], inputs[9, 70] = 40.0, -7.0
    columns = (
        (inputs.abs() >= threshold).any(0) if threshold else torch.zeros(192, dtype=torch.bool)
    )
    assert (
        int(columns.sum()) == {6.0: 2, 2.0: int(columns.sum()), 0.0: 0}[threshold]
        and not columns.all()
    )
    weight = decoded(tmp_path / "q")["model.layers.0.mlp.down_proj.weight"]
    outliers = (
        inputs.abs() >= threshold if threshold else torch.zeros_like(inputs, dtype=torch.bool)
    )
    largest = inputs.masked_fill(outliers, 0).abs().amax(1, keepdim=True)
    rounded = (inputs / largest * 127).round() * largest / 127
    expected = torch.where(columns, inputs, rounded) @ weight.T
    with torch.no_grad():
        got = layer(inputs)
    assert relative(got, expected) < 2e-3
    if threshold == 6.0:
        whole = (
            (inputs / inputs.abs().amax(1, keepdim=True) * 127).round()
            * inputs.abs().amax(1, keepdim=True)
            / 127
        )
        assert relative(whole @ weight.T, expected) > 1e-2, "this test must tell the two apart"


@pytest.mark.parametrize("name", STAGES)
def test_facts_sizes_and_errors(name, source, packed, tmp_path):
    facts = run(STAGES[name], source, tmp_path / "again")
    dense, plain = load_file(source / "model.safetensors"), decoded(packed[name])
    table = json.loads((tmp_path / "again" / "report" / "layer_errors.json").read_text())
    assert len(table) == 2 * 7 and (tmp_path / "again" / "report" / "layer_errors.png").is_file()
    for row in table:
        weight = f"model.layers.{row['block']}.{row['layer']}.weight"
        assert row["error"] == pytest.approx(
            relative(plain[weight], dense[weight].float()), rel=1e-3
        )
    assert facts["layer_error_max"] == max(row["error"] for row in table)
    stored = load_file(packed[name] / "model.safetensors")
    spec = open_checkpoint(packed[name]).spec
    assert weight_bytes(spec) == pytest.approx(
        sum(tensor.nbytes for tensor in stored.values()), rel=1e-3
    )
    assert spec.parameters() == open_checkpoint(source).spec.parameters()
    layers = {key: tensor for key, tensor in stored.items() if "_proj" in key}
    weights = sum(tensor.numel() for key, tensor in dense.items() if "_proj" in key)
    bits = 8 * sum(tensor.nbytes for tensor in layers.values()) / weights
    assert facts["bits_per_weight"] == pytest.approx(bits, rel=3e-3)
    again = load_file(tmp_path / "again" / "model.safetensors")
    assert all(torch.equal(again[key], tensor) for key, tensor in stored.items())


@pytest.mark.parametrize("name", STAGES)
def test_weights_in_memory_are_those_of_the_file(name, packed):
    stored = load_file(packed[name] / "model.safetensors")
    model = load_model(packed[name], "bfloat16")
    texts = [key for key in stored if key.endswith(("bitsandbytes__nf4", "weight_format"))]
    expected = sum(tensor.nbytes for key, tensor in stored.items() if key not in texts)
    rotary = sum(buffer.nbytes for buffer in model.buffers())
    assert weights_bytes(model) - rotary == pytest.approx(expected, rel=5e-3)
    logits(model)  # int8 layers move their scales at the first forward
    assert weights_bytes(model) - rotary == pytest.approx(expected, rel=5e-3)


def test_the_cpu_kernel_is_taken_only_in_bfloat16(source, packed):
    if not bnb.functional.has_avx512bf16():
        assert not use_fast_kernels(load_model(packed["nf4"], "bfloat16"))
        pytest.skip("this processor has no AVX-512 BF16")
    assert not use_fast_kernels(load_model(packed["nf4"], "float32"))
    assert not use_fast_kernels(load_model(packed["int8"], "bfloat16"))
    model = load_model(packed["nf4"], "bfloat16")
    assert use_fast_kernels(model)
    assert relative(logits(model), logits(dense_model(source, packed["nf4"]))) < 3e-2
    assert model.model.layers[0].mlp.up_proj.weight.quant_state.packing_format_for_cpu


@pytest.mark.parametrize("name", ["nf4", "int8"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_adapters_on_it_get_the_gradients_of_the_dense_model(name, dtype, source, packed):
    """Also after a forward without gradients, where the library's CPU kernel would silently cut
    them off."""
    from peft import LoraConfig, get_peft_model

    gradients = []
    for model in (load_model(packed[name], dtype), dense_model(source, packed[name])):
        torch.manual_seed(0)
        layers = ["q_proj", "v_proj", "down_proj"]
        adapted = get_peft_model(
            model, LoraConfig(r=4, target_modules=layers, init_lora_weights=False)
        )
        logits(adapted)
        adapted.train()
        adapted(tokens(), labels=tokens()).loss.backward()
        trained = {key: value for key, value in adapted.named_parameters() if value.requires_grad}
        assert len(trained) == 2 * 2 * len(layers) and all("lora" in key for key in trained)
        gradients.append(torch.cat([value.grad.float().flatten() for value in trained.values()]))
    # int8 layers in training multiply by the decoded weights too
    assert relative(*gradients) < {"float32": 1e-4, "bfloat16": 5e-2}[dtype]


def test_blocks_that_differ_in_width(tmp_path):
    widths = {"per_layer_config": {"1": {"intermediate_size": 128}}}
    folder = sixteen_bit(tmp_path / "source", **widths)
    for stage in (NF4(), Int8()):
        target = tmp_path / type(stage).__name__
        run(stage, folder, target)
        assert load_model(target).model.layers[1].mlp.up_proj.out_features == 128
        close = 1e-6 if isinstance(stage, NF4) else 5e-2
        assert relative(logits(load_model(target)), logits(dense_model(folder, target))) < close


def spec(**changes):
    config = dict(
        model_type="llama", hidden_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=192, vocab_size=64, dtype="bfloat16",
    )  # fmt: skip
    return ModelSpec({**config, **changes}, "some model")


@pytest.mark.parametrize(
    ("stage", "changes", "message"),
    [
        (
            NF4(),
            {"intermediate_size": 160},
            "inputs are divisible by 64.*down_proj in some model has 160",
        ),
        (
            NF4(),
            {"intermediate_size": 336},
            "outputs are divisible by 32.*gate_proj in some model has 128 and 336",
        ),
        (NF4(), {"quantization_config": {"quant_method": "gptq"}}, r"already quantized \(gptq\)"),
        (
            Int8(),
            {"quantization_config": {"quant_method": "bitsandbytes"}},
            r"already quantized \(bitsandbytes\)",
        ),
        (Int8(), {"model_type": "gpt2"}, "does not know the model family 'gpt2'"),
    ],
)
def test_models_that_cannot_be_taken(stage, changes, message):
    stage.check(spec())
    with pytest.raises(SlimError, match=message):
        stage.check(spec(**changes))


def test_int8_takes_any_size(tmp_path):
    folder = sixteen_bit(tmp_path / "source", intermediate_size=90)
    run(Int8(), folder, tmp_path / "q")
    assert (
        relative(logits(load_model(tmp_path / "q")), logits(dense_model(folder, tmp_path / "q")))
        < 5e-2
    )


def with_huge_weights(folder, names: str):
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in tensors.items():
        if names in name:
            tensor[0, 0] = 1e5
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_a_layer_with_weights_beyond_float16_stays_plain(tmp_path):
    layer = "model.layers.1.mlp.up_proj"
    folder = with_huge_weights(sixteen_bit(tmp_path / "source"), layer)
    metadata = run(Int8(), folder, tmp_path / "q")
    assert f"{layer} stays unquantized" in metadata["notes"][0]
    stored = load_file(tmp_path / "q" / "model.safetensors")
    assert stored[f"{layer}.weight"].dtype == torch.bfloat16
    assert stored["model.layers.0.mlp.up_proj.weight"].dtype == torch.int8
    assert torch.isfinite(logits(load_model(tmp_path / "q"))).all()
    # transformers reads the same list
    assert (
        layer
        in json.loads((tmp_path / "q" / "config.json").read_text())["quantization_config"][
            "llm_int8_skip_modules"
        ]
    )


def test_weights_beyond_float16_everywhere_are_refused_before_any_work(tmp_path):
    folder = with_huge_weights(sixteen_bit(tmp_path / "source"), "_proj.weight")
    with pytest.raises(SlimError, match="all layers. Use quant=rtn"):
        run(Int8(), folder, tmp_path / "q")
    assert not list((tmp_path / "q").iterdir())


def test_a_missing_library_is_reported_before_work(monkeypatch, packed):
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *rest: None if name == "bitsandbytes" else found(name, *rest),
    )
    for stage in STAGES.values():
        with pytest.raises(SlimError, match="pip install bitsandbytes"):
            stage.check(spec())
    with pytest.raises(SlimError, match="pip install bitsandbytes"):
        load_model(packed["nf4"])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Int8(threshold=-1), "quant.threshold=-1"),
        (lambda: Int8(threshold="six"), "quant.threshold=six"),
        (lambda: NF4(double_quant=1), "quant.double_quant=1: must be true or false"),
        (lambda: NF4(compute_dtype="int4"), "quant.compute_dtype=int4: .*bfloat16"),
    ],
)
def test_wrong_settings_are_refused(make, message):
    with pytest.raises(SlimError, match=message):
        make()


def test_the_choices_have_the_defaults_of_the_classes():
    from hydra.utils import instantiate

    assert instantiate(compose("compress", ["quant=int8"]).quantizer) == Int8()
    assert instantiate(compose("compress", ["quant=nf4"]).quantizer) == NF4()
    assert type(Int8(threshold=5).threshold) is float  # transformers refuses a whole number


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        (
            "int8",
            lambda t: t.pop("model.layers.0.mlp.up_proj.SCB"),
            "no tensor 'model.layers.0.mlp.up_proj.SCB'",
        ),
        (
            "nf4",
            lambda t: t.pop("model.layers.1.mlp.up_proj.weight.absmax"),
            "no tensor .*up_proj.weight.absmax'",
        ),
        ("nf4", lambda t: t.pop("model.norm.weight"), "lacks 1 weights .*'model.norm.weight'"),
        (
            "nf4",
            lambda t: halve(t, "model.layers.1.mlp.up_proj.weight"),
            "up_proj.weight .*not a layer of 192 x 64 at 4 bits",
        ),
        (
            "int8",
            lambda t: halve(t, "model.layers.1.mlp.up_proj.weight"),
            "not a layer of 192 x 64 at 8 bits",
        ),
    ],
)
def test_damaged_files_are_refused(name, damage, message, packed, tmp_path):
    shutil.copytree(packed[name], tmp_path / "damaged")
    tensors = load_file(packed[name] / "model.safetensors")
    damage(tensors)
    save_file(tensors, tmp_path / "damaged" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(SlimError, match=message):
        load_model(tmp_path / "damaged")


def halve(tensors, name):
    tensors[name] = tensors[name][: len(tensors[name]) // 2].contiguous()


def test_files_of_others_are_read(source, tmp_path):
    """FP4, and a list of layers to leave out, as other programs store them."""
    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="fp4", bnb_4bit_quant_storage="bfloat16",
        llm_int8_skip_modules=["lm_head", "model.layers.0", "up_proj"],
    )  # fmt: skip
    theirs = AutoModelForCausalLM.from_pretrained(
        source, dtype=torch.bfloat16, quantization_config=config
    )
    shutil.copytree(source, tmp_path / "theirs")
    theirs.save_pretrained(tmp_path / "theirs")
    model, found = load_model(tmp_path / "theirs", "float32"), open_checkpoint(tmp_path / "theirs")
    assert sum(isinstance(module, bnb.nn.Linear4bit) for module in model.modules()) == 6
    assert relative(logits(model), logits(theirs)) < 3e-2
    stored = sum(tensor.nbytes for tensor in load_file(found.weight_files[0]).values())
    assert weight_bytes(found.spec) == pytest.approx(stored, rel=2e-3)


def test_speed_is_measured_by_the_kernel_and_quality_is_not(packed):
    """Quality is a fact about the stored weights, so it must not depend on whether speed was
    measured before."""
    from slim.evaluation.evaluation import Evaluation
    from slim.evaluation.perplexity import Perplexity
    from slim.evaluation.run import measure
    from slim.evaluation.speed import Speed

    evaluation = Evaluation(
        Perplexity("tiny:heldout", window=64, limit=4),
        speed=Speed(count=1, repeats=1),
        dtype="bfloat16",
    )
    both, alone = (
        measure(packed["nf4"], evaluation),
        measure(packed["nf4"], evaluation, speed=False),
    )
    assert both["quality"]["metrics"] == alone["quality"]["metrics"]
    assert (
        both["speed"]["metrics"]["decode_tokens_per_second"] > 0
        and both["speed"]["protocol"]["speed"]["dtype"] == "bfloat16"
    )
    kinds = {name: open_checkpoint(folder).spec for name, folder in packed.items()}
    found = {
        name: Evaluation(speed=Speed()).speed_dtype(model, "cpu") for name, model in kinds.items()
    }
    assert found == {"int8": "float32", "nf4": "bfloat16", "nf4 single": "bfloat16"}


@pytest.mark.slow
@pytest.mark.parametrize("choice", ["nf4", "int8"])
def test_the_whole_chain_on_the_embedded_model(choice, tmp_path, capsys):
    """Perplexity, tasks and speed are measured; the second run finds everything."""
    from slim.cli.execute import execute

    short = [
        "eval.speed.count=1",
        "eval.speed.repeats=1",
        "eval.tasks.limit=40",
        "eval.perplexity.limit=40",
    ]
    arguments = ["model=tiny", "pruner=none", f"quant={choice}", f"store={tmp_path}", *short]
    first, second = execute(compose("compress", arguments)), execute(compose("compress", arguments))
    assert [result.cached for result in second] == [True, True] and not first[1].cached
    assert first[1].metrics == second[1].metrics
    plain, small = first[0].metrics, first[1].metrics
    assert math.isclose(small["perplexity"], plain["perplexity"], rel_tol=0.01)
    assert (
        small["parameters"] == plain["parameters"]
        and small["bytes_on_disk"] < 0.7 * plain["bytes_on_disk"]
    )
    assert small["tasks/acc"] > 0.95 * plain["tasks/acc"] and small["decode_tokens_per_second"] > 0

"""Tuners: quantised bases, merging by formula, adapters next to the weights, ranks and targets,
optimisers, presets."""

from __future__ import annotations

import importlib.util
import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from slim.chain.compose import compose
from slim.checkpoints.checkpoint import checksums, open_checkpoint
from slim.checkpoints.stage import Context
from slim.checkpoints.tokenizer import load_tokenizer
from slim.core.errors import SlimError
from slim.data.examples import TinyChat, TinyText
from slim.loading.load_model import load_model
from slim.pruning.magnitude import Magnitude
from slim.pruning.weights import MagnitudeWeights
from slim.quantization.methods.bitsandbytes import NF4
from slim.quantization.methods.rtn import RTN
from slim.training import adapters, optimizers
from slim.training.qlora import QLora
from slim.training.tune import Full, Lora
from tests.conftest import ROOT, build_small
from tests.support.stages import run

QUICK = dict(
    steps=4,
    window=64,
    batch_tokens=256,
    validate_every=2,
    validation_tokens=512,
    learning_rate=0.02,
)
LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@pytest.fixture(scope="module")
def little(tmp_path_factory, small_llama) -> Path:
    """A random Llama of two narrow blocks, of sizes that nf4 takes."""
    folder = tmp_path_factory.mktemp("little") / "llama"
    return build_small(
        "llama", folder, vocab_size=len(load_tokenizer(small_llama)), num_hidden_layers=2
    )


@pytest.fixture(scope="module")
def packed(little, tmp_path_factory) -> dict[str, Path]:
    """``little`` quantised: by round-to-nearest at 2 and at 4 bits, in two formats, and to nf4."""
    folder = tmp_path_factory.mktemp("packed")
    stages = {
        "2": RTN(bits=2, group_size=32),
        "4": RTN(bits=4, group_size=32, format="gptq"),
        "nf4": NF4(),
    }
    for name, stage in stages.items():
        (folder / name).mkdir()
        stage.run(little, folder / name, Context())
    return {name: folder / name for name in stages}


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def logits(model) -> torch.Tensor:
    tokens = torch.randint(3, 1500, (2, 24), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        return model(input_ids=tokens, use_cache=False).logits.float()


@pytest.fixture
def trained(monkeypatch) -> dict[str, torch.Tensor]:
    """The adapters just before they are merged: ``<layer>.lora_A`` and so on -> tensor."""
    from peft import PeftModel, get_peft_model_state_dict

    kept: dict[str, torch.Tensor] = {}

    def merge(model, **_):
        for name, tensor in get_peft_model_state_dict(model).items():
            kept[name.removeprefix("base_model.model.").removesuffix(".weight")] = (
                tensor.detach().clone()
            )
        return model.base_model.merge_and_unload(safe_merge=True)

    monkeypatch.setattr(PeftModel, "merge_and_unload", merge, raising=False)
    return kept


def update(kept: dict, layer: str) -> torch.Tensor:
    return kept[f"{layer}.lora_B"] @ kept[f"{layer}.lora_A"]


# A quantised base


def test_qlora_trains_on_nf4_and_merges_into_the_dequantised_base(
    little, packed, tmp_path, trained, capfd
):
    """The result is what the bytes of an nf4 file stand for, plus (alpha / r) B A."""
    from tests.quantization.test_bitsandbytes import decoded

    facts = run(QLora(data=TinyText(), **QUICK), little, tmp_path / "out")
    after, source, base = tensors(tmp_path / "out"), tensors(little), decoded(packed["nf4"])
    for name in [name for name in source if "_proj" in name]:
        change = 2 * update(trained, name.removesuffix(".weight"))
        torch.testing.assert_close(after[name], base[name] + change, rtol=1e-5, atol=1e-6)
        assert (
            change.norm() > 0.01 * base[name].norm()
            and (base[name] - source[name]).norm() > 0.02 * source[name].norm()
        )
    assert all(torch.equal(after[name], source[name]) for name in source if "_proj" not in name)
    assert facts["merge_error"] < 1e-3 < 0.1 < facts["adapter_effect"]
    assert facts["validation_loss_after"] < facts["validation_loss_before"]
    assert "Adapters merged: outputs differ" in " ".join(capfd.readouterr().err.split())
    assert open_checkpoint(tmp_path / "out").spec.quantization is None
    changed = (logits(load_model(tmp_path / "out")) - logits(load_model(packed["nf4"]))).abs().max()
    assert changed > 0.1, "training must change what the model says"
    assert not (tmp_path / "out" / "base").exists()


def test_a_merged_result_must_beat_the_source_and_not_only_the_quantised_base(
    little, tmp_path, monkeypatch
):
    monkeypatch.setattr(QLora, "untouched_loss", lambda *_: 0.5)
    facts = run(QLora(data=TinyText(), **QUICK), little, tmp_path / "out")
    assert facts["validation_loss_after"] == 0.5
    after, source = tensors(tmp_path / "out"), tensors(little)
    assert after.keys() == source.keys() and all(
        torch.equal(after[name], source[name]) for name in source
    )


def test_the_loss_to_beat_is_that_of_the_plain_source(little):
    from slim.training.batches import in_order
    from slim.training.forward import mean_nll

    stage = QLora(data=TinyText(), **QUICK)
    learned = stage.task(open_checkpoint(little), "cpu", "32-true")
    held_out = in_order(stage.data.windows("validation", load_tokenizer(little), 64, 512), 4)
    assert stage.untouched_loss(None, learned) == pytest.approx(
        mean_nll(load_model(little), held_out)
    )


def test_an_unfinished_quantised_base_is_made_again_and_a_finished_one_used(
    little, tmp_path, monkeypatch
):
    stage, work = QLora(data=TinyText(), **QUICK), tmp_path / "work"
    (work / "base.partial").mkdir(parents=True)
    (work / "base.partial" / "config.json").write_text("half")
    context = Context(resume_dir=work)
    base = stage.trained_on(open_checkpoint(little), context)
    assert base.spec.quantization and [path.name for path in work.iterdir()] == ["base"]
    monkeypatch.setattr(NF4, "run", lambda *_: pytest.fail("it was there"))
    assert stage.trained_on(open_checkpoint(little), context).folder == base.folder


# Adapters next to the weights


@pytest.mark.parametrize("name", ["4", "nf4"])
def test_healing_a_quantised_model_keeps_it_and_puts_the_adapter_beside_it(name, packed, tmp_path):
    from slim.training.batches import in_order
    from slim.training.forward import mean_nll

    stage = Lora(data=TinyText(), merge=False, **QUICK)
    expected = stage.output_spec(open_checkpoint(packed[name]).spec)
    facts = run(stage, packed[name], tmp_path / "out")
    assert (
        facts["validation_loss_after"] < facts["validation_loss_before"]
        and facts["adapter_effect"] > 0.1
    )
    before, after = tensors(packed[name]), tensors(tmp_path / "out")
    assert before.keys() == after.keys() and all(
        torch.equal(before[key], after[key]) for key in before
    )
    checkpoint = open_checkpoint(tmp_path / "out")
    assert checkpoint.spec.quantization == open_checkpoint(packed[name]).spec.quantization
    state = load_file(tmp_path / "out" / "adapter" / "adapter_model.safetensors")
    count = sum(tensor.numel() for tensor in state.values())
    assert checkpoint.spec.adapter == expected.adapter == {"parameters": count}
    assert checkpoint.spec.parameters() == open_checkpoint(packed[name]).spec.parameters() + count
    assert {"adapter/adapter_config.json", "adapter/adapter_model.safetensors"} <= checksums(
        tmp_path / "out"
    ).keys()
    model = load_model(tmp_path / "out")
    held_out = in_order(stage.data.windows("validation", load_tokenizer(packed[name]), 64, 512), 4)
    assert mean_nll(model, held_out) == pytest.approx(facts["validation_loss_after"], rel=1e-5)
    assert (logits(model) - logits(load_model(packed[name]))).abs().max() > 0.1
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_others_load_the_folder_with_peft(little, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    run(QLora(data=TinyText(), merge=False, rslora=True, **QUICK), little, tmp_path / "out")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    theirs = PeftModel.from_pretrained(base, tmp_path / "out" / "adapter").eval()
    # theirs takes the library's CPU kernel, where there is one, which computes in bfloat16
    torch.testing.assert_close(
        logits(load_model(tmp_path / "out")), logits(theirs), rtol=0.1, atol=0.1
    )


def test_the_same_call_twice_gives_identical_adapters(packed, tmp_path):
    for name in ("one", "two"):
        run(
            Lora(data=TinyText(), merge=False, dropout=0.1, **{**QUICK, "steps": 2}),
            packed["2"],
            tmp_path / name,
        )
    assert checksums(tmp_path / "one") == checksums(tmp_path / "two")


def test_adapters_that_do_not_help_are_left_out(packed, tmp_path, monkeypatch):
    monkeypatch.setattr(Lora, "measure", lambda *_: math.inf)
    facts = run(Lora(data=TinyText(), merge=False, **QUICK), packed["2"], tmp_path / "out")
    assert (
        facts["validation_loss_after"] == facts["validation_loss_before"]
        and not (tmp_path / "out" / "adapter").exists()
    )
    assert open_checkpoint(tmp_path / "out").spec.adapter is None
    assert torch.equal(logits(load_model(tmp_path / "out")), logits(load_model(packed["2"])))


@pytest.mark.parametrize("name", ["2", "4"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_adapters_on_packed_layers_get_the_gradients_of_the_dense_model(
    name, dtype, packed, little
):
    gradients = []
    for kind in ("packed", "dense"):
        model = load_model(packed[name], dtype, trainable=True)
        if kind == "dense":
            dense = load_model(little, dtype)
            for layer, module in model.named_modules():
                if hasattr(module, "dense_weight"):
                    dense.get_submodule(layer).weight.data = module.dense_weight().to(
                        getattr(torch, dtype)
                    )
            model = dense
        torch.manual_seed(0)
        model = adapters.add_adapters(model, 4, 8, 0.0, ["q_proj", "down_proj"])
        for key, parameter in model.named_parameters():
            if "lora_B" in key:
                parameter.data.normal_(std=0.02)
        tokens = torch.randint(3, 1500, (2, 24), generator=torch.Generator().manual_seed(5))
        model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
        found = {key: value.grad for key, value in model.named_parameters() if value.requires_grad}
        assert len(found) == 2 * 2 * 2 and all(value.abs().max() > 0 for value in found.values())
        gradients.append(torch.cat([value.float().flatten() for value in found.values()]))
    error = (gradients[0] - gradients[1]).norm() / gradients[1].norm()
    assert error < {"float32": 1e-5, "bfloat16": 0.05}[dtype]


def test_an_adapter_that_does_nothing_is_an_error(packed):
    model = adapters.add_adapters(load_model(packed["2"], trainable=True), 4, 8, 0.0, ["q_proj"])
    with pytest.raises(SlimError, match="adapter had no effect"):
        adapters.adapter_effect(model, torch.arange(20)[None])


@pytest.fixture(scope="module")
def healed(little, tmp_path_factory) -> Path:
    """``little`` as it is, with an adapter next to it."""
    folder = tmp_path_factory.mktemp("healed") / "out"
    run(Lora(data=TinyText(), merge=False, **QUICK), little, folder)
    return folder


@pytest.mark.parametrize(
    "stage",
    [
        RTN(group_size=32),
        NF4(),
        Magnitude(),
        MagnitudeWeights(),
        Lora(data=TinyText(), **QUICK),
        Full(data=TinyText(), **QUICK),
    ],
    ids=lambda stage: type(stage).__name__,
)
def test_stages_that_change_weights_refuse_a_model_with_an_adapter_beside_it(stage, healed):
    with pytest.raises(SlimError, match=r"adapter next to its weights.*\n.*tuner\.merge=true"):
        stage.check(open_checkpoint(healed).spec)


def test_a_damaged_or_foreign_adapter_is_refused(healed, small_llama, tmp_path):
    lost = shutil.copytree(healed, tmp_path / "lost")
    (lost / "adapter" / "adapter_model.safetensors").unlink()
    with pytest.raises(SlimError, match="lacks adapter/adapter_model.safetensors"):
        load_model(lost)
    foreign = shutil.copytree(small_llama, tmp_path / "foreign")
    shutil.copytree(healed / "adapter", foreign / "adapter")
    config = json.loads((foreign / "config.json").read_text())
    (foreign / "config.json").write_text(json.dumps({**config, "slim_adapter": {"parameters": 1}}))
    with pytest.raises(SlimError, match="does not belong to its model"):
        load_model(foreign)


@pytest.mark.slow
def test_the_chain_measures_the_adapted_model(little, tmp_path):
    from slim.chain.pipeline import Pipeline
    from slim.checkpoints.source import Source
    from slim.checkpoints.store import Store
    from slim.evaluation.evaluation import Evaluation
    from slim.evaluation.perplexity import Perplexity

    stages = [RTN(bits=2, group_size=32), Lora(data=TinyText(), merge=False, **QUICK)]
    evaluation = Evaluation(perplexity=Perplexity("tiny:heldout", window=64, limit=4))
    results = Pipeline(Source(str(little)), stages, evaluation, Store(tmp_path / "runs")).run()
    perplexity = [result.quality["metrics"]["perplexity"] for result in results]
    assert perplexity[2] < 0.9 * perplexity[1]
    again = Pipeline(Source(str(little)), stages, evaluation, Store(tmp_path / "runs")).run()
    assert all(result.cached for result in again)


# Formulas, ranks, targets


def test_rslora_scales_by_the_root_of_the_rank(little, tmp_path, trained):
    run(Lora(data=TinyText(), r=4, alpha=12, rslora=True, **QUICK), little, tmp_path / "out")
    after, source = tensors(tmp_path / "out"), tensors(little)
    for name in [name for name in source if "_proj" in name]:
        expected = source[name] + 12 / math.sqrt(4) * update(trained, name.removesuffix(".weight"))
        torch.testing.assert_close(after[name], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("tuner", [Lora, QLora])
def test_dora_trains_directions_and_lengths_apart(little, packed, tmp_path, trained, tuner):
    from tests.quantization.test_bitsandbytes import decoded

    run(tuner(data=TinyText(), r=4, alpha=8, dora=True, **QUICK), little, tmp_path / "out")
    after, base = (
        tensors(tmp_path / "out"),
        tensors(little) if tuner is Lora else decoded(packed["nf4"]),
    )
    for name in [name for name in base if "_proj" in name]:
        layer = name.removesuffix(".weight")
        direction = base[name] + 2 * update(trained, layer)
        length = trained[f"{layer}.lora_magnitude_vector"]
        assert (length - base[name].norm(dim=1)).abs().max() > 1e-3, "the lengths were trained"
        expected = length.unsqueeze(1) * direction / direction.norm(dim=1, keepdim=True)
        torch.testing.assert_close(after[name], expected, rtol=1e-4, atol=1e-5)


def test_ranks_and_targets_by_pattern(little, tmp_path):
    stage = Lora(
        data=TinyText(),
        r=3,
        targets=["q_proj", r"layers\.1\.mlp\..*"],
        rank_pattern={"down_proj": 7, "q_proj": 2},
        **QUICK,
    )
    facts = run(stage, little, tmp_path / "out")
    before, after = tensors(little), tensors(tmp_path / "out")
    ranks = {
        name: int(torch.linalg.matrix_rank((after[name] - before[name]).double(), rtol=1e-4))
        for name in before
        if not torch.equal(before[name], after[name])
    }
    assert ranks == {
        "model.layers.0.self_attn.q_proj.weight": 2,
        "model.layers.1.self_attn.q_proj.weight": 2,
        "model.layers.1.mlp.gate_proj.weight": 3,
        "model.layers.1.mlp.up_proj.weight": 3,
        "model.layers.1.mlp.down_proj.weight": 7,
    }
    spec = open_checkpoint(little).spec
    assert stage.adapter_parameters(spec) == 2 * 2 * (64 + 64) + 2 * 3 * (64 + 128) + 7 * (64 + 128)
    assert facts["adapter_effect"] > 0


@pytest.mark.parametrize("targets", [None, ["q_proj", "v_proj"], r"self_attn\.(q|v)_proj"])
def test_targets_reach_peft_in_their_shortest_form(little, targets):
    spec = open_checkpoint(little).spec
    names = Lora(data=TinyText(), targets=targets).target_names(spec)
    assert names == (
        ["self_attn.q_proj", "self_attn.v_proj"] if targets else list(spec.block_linears())
    )


# Optimisers


def test_adamw8bit_keeps_its_moments_in_eight_bits_and_learns_the_same():
    """A least-squares problem, 8192 unknowns, solved by both to nearly the same loss."""
    generator = torch.Generator().manual_seed(0)
    inputs, truth = (
        torch.randn(256, 64, generator=generator),
        torch.randn(64, 128, generator=generator),
    )
    losses = {}
    for name in ("adamw", "adamw8bit", "sgd"):
        weight = torch.nn.Parameter(torch.zeros(64, 128))
        optimizer = optimizers.build(
            name, [{"params": [weight], "weight_decay": 0.0}], 0.02, (0.9, 0.999)
        )
        for _ in range(60):
            optimizer.zero_grad()
            loss = ((inputs @ weight - inputs @ truth) ** 2).mean()
            loss.backward()
            optimizer.step()
        losses[name] = loss.item()
        moments = [
            value
            for value in optimizer.state[weight].values()
            if getattr(value, "shape", ()) == weight.shape
        ]
        kinds = {
            "adamw": [torch.float32] * 2,
            "adamw8bit": [torch.uint8] * 2,
            "sgd": [torch.float32],
        }
        assert [value.dtype for value in moments] == kinds[name]
    assert losses["adamw8bit"] == pytest.approx(losses["adamw"], rel=0.05)


def test_an_optimiser_of_the_settings_is_the_one_that_trains(little, tmp_path):
    curves = {}
    for name in ("adamw", "sgd"):
        settings = {**QUICK, "optimizer": name, "learning_rate": 1e-3, "clip": 0.0}
        run(
            Full(data=TinyText(), betas=(0.0, 0.999), warmup=0.0, schedule="constant", **settings),
            little,
            tmp_path / name,
        )
        curves[name] = json.loads((tmp_path / name / "report" / "loss.json").read_text())["train"]
    assert (
        curves["adamw"][0]["loss"] == curves["sgd"][0]["loss"]
        and curves["adamw"][1]["loss"] != curves["sgd"][1]["loss"]
    )


# What cannot be


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(targets=["q_prj"]), "no layer 'q_prj'.*Possible: q_proj.*Did you mean q_proj"),
        (dict(targets=r"layers\.9\..*"), r"tuner.targets: no layer 'layers\\.9.*Possible: q_proj"),
        (dict(targets=["("]), "is no regular expression"),
        (
            dict(rank_pattern={"down": 4}),
            "tuner.rank_pattern: no adapted layer 'down'.*Did you mean down_proj",
        ),
        (
            dict(targets=["q_proj"], rank_pattern={"up_proj": 4}),
            "no adapted layer 'up_proj'.*Possible: q_proj",
        ),
        (dict(r=64), "(?s)rank 64 is larger than .*k_proj.*32 x 64.*tuner.r of at most 32"),
        (dict(rank_pattern={"k_proj": 33}), "rank 33 is larger than .*k_proj"),
    ],
)
def test_targets_and_ranks_that_do_not_fit_are_refused(settings, message, little):
    with pytest.raises(SlimError, match=message):
        Lora(data=TinyText(), **settings).check(open_checkpoint(little).spec)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(rank_pattern={"q_proj": 0}), "tuner.rank_pattern: q_proj=0"),
        (dict(rslora="yes"), "tuner.rslora=yes: must be"),
        (dict(merge=1), "tuner.merge=1: must be"),
        (
            dict(optimizer="adam8bit"),
            "tuner.optimizer=adam8bit: must be one of .*Did you mean adamw8bit",
        ),
        (dict(base_quant="fp4"), "tuner.base_quant=fp4: must be one of nf4, int8"),
        (dict(epochs=2), "never ends.*tuner.epochs=null tuner.steps=150"),
    ],
)
def test_wrong_settings_are_refused(settings, message):
    with pytest.raises(SlimError, match=message):
        QLora(**{"data": TinyText(), **settings})


def test_quantised_sources_are_refused_with_what_to_type(packed):
    models = {name: open_checkpoint(folder).spec for name, folder in packed.items()}
    for name in models:
        with pytest.raises(SlimError, match="tuner.merge=false to keep them next to it"):
            Lora(data=TinyText()).check(models[name])
        with pytest.raises(SlimError, match="tuner=lora tuner.merge=false"):
            QLora(data=TinyText()).check(models[name])
        with pytest.raises(SlimError, match="Tune first and quantize the result"):
            Full(data=TinyText()).check(models[name])
    with pytest.raises(
        SlimError, match="tuner.dora=true needs plain weights or those of bitsandbytes"
    ):
        Lora(data=TinyText(), merge=False, dora=True).check(models["2"])
    Lora(data=TinyText(), merge=False, dora=True).check(models["nf4"])


def test_missing_packages_and_devices_are_named(little, monkeypatch, tmp_path):
    spec = open_checkpoint(little).spec
    with pytest.raises(
        SlimError, match="paged_adamw8bit pages between GPU and host.*tuner.optimizer=adamw8bit"
    ):
        run(Lora(data=TinyText(), optimizer="paged_adamw8bit", **QUICK), little, tmp_path / "out")
    honest = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "bitsandbytes" else honest(name)
    )
    with pytest.raises(SlimError, match="bitsandbytes. Install it"):
        QLora(data=TinyText()).check(spec)
    with pytest.raises(SlimError, match="tuner.optimizer=adamw8bit needs the package bitsandbytes"):
        Lora(data=TinyText(), optimizer="adamw8bit").check(spec)
    Lora(data=TinyText()).check(spec)


def test_a_tokenizer_without_padding_token_is_no_obstacle(little, tmp_path):
    source = shutil.copytree(little, tmp_path / "source")
    path = source / "tokenizer_config.json"
    settings = {
        name: value for name, value in json.loads(path.read_text()).items() if name != "pad_token"
    }
    path.write_text(json.dumps(settings))
    assert load_tokenizer(source).pad_token is None
    facts = run(Lora(data=TinyChat(), **QUICK), source, tmp_path / "out")
    assert facts["validation_loss_after"] < facts["validation_loss_before"]


# Presets

PRESETS = {
    "lora_llm_pruner": dict(
        r=8, alpha=16, learning_rate=1e-4, epochs=2, batch_tokens=64 * 256, targets=list(LAYERS)
    ),
    "lora_thesis": dict(r=8),
    "qlora_thesis": dict(
        r=64,
        alpha=16,
        learning_rate=2e-5,
        schedule="cosine",
        targets=list(LAYERS[:4]),
        base_quant="nf4",
    ),
}
STUDY_DATA = {
    "lora_llm_pruner": "alpaca_cleaned",
    "lora_thesis": "ms_marco",
    "qlora_thesis": "ultrachat_200k",
}


@pytest.mark.parametrize("name", PRESETS)
def test_presets_have_the_settings_and_the_data_of_their_studies(name):
    assert STUDY_DATA[name] in [
        path.stem for path in (ROOT / "slim" / "conf" / "data").glob("*.yaml")
    ]
    config = compose("compress", ["model=mistral7b", f"tuner={name}"])
    assert {key: config.tuner[key] for key in PRESETS[name]} == PRESETS[name]
    assert config.data == compose("compress", [f"data={STUDY_DATA[name]}"]).data, (
        "also where the model brings other texts"
    )
    assert config.tuner.data == config.data
    chosen = compose("compress", ["model=mistral7b", f"tuner={name}", "data=tiny_chat"])
    assert chosen.data._target_.endswith("TinyChat")


@pytest.mark.slow
@pytest.mark.parametrize("name", PRESETS)
def test_presets_run_on_the_embedded_model(name, tmp_path):
    from slim.chain.build import build_pipeline

    few = [
        "tuner.epochs=null",
        "tuner.steps=3",
        "tuner.batch_tokens=2048",
        "tuner.accumulation=1",
        "eval=none",
    ]
    config = compose(
        "train",
        ["model=tiny", f"tuner={name}", "data=tiny_chat", f"store={tmp_path / 'runs'}", *few],
    )
    facts = build_pipeline(config).run()[-1].metadata
    assert facts["steps"] == 3 and facts["tokens_seen"] == 3 * 2048
    assert facts["validation_loss_trained"] != facts["validation_loss_before"]


@pytest.mark.slow
def test_qlora_in_eight_bits(little, tmp_path):
    """The library multiplies slowly on a CPU, and rounds inputs too, so merging reproduces it only
    about."""
    facts = run(
        QLora(data=TinyText(), base_quant="int8", **{**QUICK, "steps": 2}), little, tmp_path / "out"
    )
    assert facts["merge_error"] < 0.5 * facts["adapter_effect"]
    assert facts["validation_loss_after"] < facts["validation_loss_before"]


@pytest.mark.parametrize("name", ["_base", "_adapters"])
def test_a_file_that_choices_are_made_of_is_no_choice(name):
    """Without a class it would be no stage at all, silently."""
    from slim.chain.build import build_pipeline

    with pytest.raises(SlimError, match="tuner: that file is what choices are made of"):
        build_pipeline(compose("compress", [f"tuner={name}"]))

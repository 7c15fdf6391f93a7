"""Width pruning: every criterion against a slow, direct implementation; the folder it writes; its
settings."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from slim.checkpoints.checkpoint import open_checkpoint
from slim.checkpoints.stage import Context
from slim.core.errors import SlimError
from slim.data.calibration import Calibration
from slim.loading.load_model import load_model
from slim.models.spec import ModelSpec
from slim.pruning import width_scores
from slim.pruning.width_activation import WidthActivation
from slim.pruning.width_magnitude import WidthL1, WidthL2, WidthRandom
from slim.pruning.width_taylor import ORDERS, WidthTaylor
from tests.conftest import FAMILIES, ROOT, build_small

# two query heads per key/value head
HEADS = dict(num_attention_heads=8, num_key_value_heads=4, head_dim=8)


def build(model_type: str, tmp_path_factory) -> Path:
    return build_small(
        model_type, tmp_path_factory.mktemp("width") / model_type, **FAMILIES[model_type], **HEADS
    )


@pytest.fixture(scope="module", params=FAMILIES)
def family_folder(request, tmp_path_factory) -> Path:
    return build(request.param, tmp_path_factory)


# without and with biases and masks that differ by block
@pytest.fixture(scope="module", params=["llama", "qwen2"])
def two_families(request, tmp_path_factory) -> Path:
    return build(request.param, tmp_path_factory)


@pytest.fixture(scope="module")
def grouped_llama(tmp_path_factory) -> Path:
    return build_small("llama", tmp_path_factory.mktemp("grouped") / "llama", **HEADS)


@pytest.fixture(scope="module")
def calibration(tmp_path_factory) -> Calibration:
    words = [
        "the",
        "river",
        "carried",
        "a",
        "small",
        "boat",
        "past",
        "nine",
        "quiet",
        "towns",
        "two",
        "old",
        "mills",
    ]
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(" ".join(random.Random(0).choices(words, k=3000)))
    return Calibration(str(path), samples=5, length=24)


def stages(calibration: Calibration, **settings) -> list:
    """One of each criterion."""
    common = {"calibration": calibration, "rounding": 8, **settings}
    windows = {"samples": 5, "length": 24}
    return [
        *(WidthTaylor(order=order, **windows, **common) for order in ORDERS),
        WidthL1(**common),
        WidthL2(**common),
        WidthRandom(**common),
        WidthActivation(**common),
    ]


NAMES = [*ORDERS, "l1", "l2", "random", "activation"]


def run(stage, source: Path, target: Path) -> dict:
    target.mkdir()
    return stage.run(source, target, Context())


def report(folder: Path) -> dict:
    return json.loads((folder / "report" / "width_scores.json").read_text())


# --- scores against slow implementations
# ----------------------------------------------------------------------------


def slow_channel_scores(name: str, model, tokens: torch.Tensor) -> dict[str, list[float]]:
    """Score per output (q, k, v, gate, up) or input (o, down) channel of every layer, from plain
    whole-model passes."""
    model.requires_grad_(True)
    weights = {n: p for n, p in model.named_parameters() if n.endswith("_proj.weight")}
    per_sample = []
    for sample in tokens:
        model.zero_grad()
        model(sample[None], labels=sample[None]).loss.backward()
        per_sample.append({n: p.grad.double().clone() for n, p in weights.items()})
    found = {}
    for n, p in weights.items():
        w = p.detach().double()
        g = sum(grads[n] for grads in per_sample) / len(tokens)
        f = sum(grads[n] ** 2 for grads in per_sample) / len(tokens)
        matrix = {
            "first": (w * g).abs(), "second": w * f * w, "mixed": (w * g - 0.5 * w * f * w).abs(),
            "vectorised": w * g, "l1": w.abs(), "l2": w**2,
        }[name]  # fmt: skip
        inputs = n.endswith(("o_proj.weight", "down_proj.weight"))
        channels = [vector.sum().item() for vector in (matrix.T if inputs else matrix)]
        found[n] = [abs(value) for value in channels]
    return found


def slow_activations(model, tokens: torch.Tensor) -> dict[str, list[float]]:
    seen: dict[str, list[torch.Tensor]] = {}
    hooks = [
        module.register_forward_pre_hook(
            lambda _, args, n=n: seen.setdefault(f"{n}.weight", []).append(args[0][0])
        )
        for n, module in model.named_modules()
        if n.endswith(("o_proj", "down_proj"))
    ]
    with torch.no_grad():
        for sample in tokens:
            model(sample[None])
    for hook in hooks:
        hook.remove()
    return {n: torch.cat(rows).double().abs().mean(0).tolist() for n, rows in seen.items()}


def slow_units(
    channels: dict[str, list[float]], block: int, owner
) -> tuple[list[float], list[float]]:
    """Scores of 4 groups and 128 channels, one number at a time; ``owner(query head)`` is its
    key/value head."""
    tensors = {
        name.split(".")[-2]: values
        for name, values in channels.items()
        if f"layers.{block}." in name
    }
    groups, count = (
        [0.0] * 4,
        sum(name in tensors for name in ("q_proj", "k_proj", "v_proj", "o_proj")),
    )
    for name in ("k_proj", "v_proj"):
        for channel, value in enumerate(tensors.get(name, [])):
            groups[channel // 8] += value / count
    for name in ("q_proj", "o_proj"):
        for channel, value in enumerate(tensors.get(name, [])):
            groups[owner(channel // 8)] += value / count
    mlp = [
        values for name in ("gate_proj", "up_proj", "down_proj") if (values := tensors.get(name))
    ]
    return groups, [sum(values) / len(mlp) for values in zip(*mlp, strict=True)]


@pytest.mark.parametrize("name", [name for name in NAMES if name != "random"])
def test_scores_equal_a_slow_implementation(two_families, calibration, tmp_path, monkeypatch, name):
    monkeypatch.setattr("slim.calibration.loaded_blocks.TOKENS_PER_BATCH", 2 * 24)
    monkeypatch.setattr(width_scores, "CHUNK", 300)  # tensors in several parts
    stage = stages(calibration, first_block=1, last_block=4)[NAMES.index(name)]
    run(stage, two_families, tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(two_families, dtype=torch.float32).eval()
    tokens = getattr(stage, "windows", calibration).tokens(tokenizer(two_families), 256)
    channels = (
        slow_activations(model, tokens)
        if name == "activation"
        else slow_channel_scores(name, model, tokens)
    )
    found = report(tmp_path / "out")["blocks"]
    assert list(found) == ["1", "2", "3", "4"]
    for block in range(1, 5):
        groups, mlp = slow_units(channels, block, lambda head: head // 2)
        assert found[str(block)]["group_scores"] == pytest.approx(groups, rel=2e-3)
        assert found[str(block)]["channel_scores"] == pytest.approx(
            mlp, rel=2e-3, abs=1e-3 * max(mlp)
        )
        by_score = sorted(range(4), key=lambda group, groups=groups: groups[group])
        assert found[str(block)]["groups_kept"] == sorted(by_score[1:])
        assert len(found[str(block)]["channels_kept"]) == 96


def tokenizer(folder: Path):
    from slim.checkpoints.tokenizer import load_tokenizer

    return load_tokenizer(folder)


def test_both_foldings_on_grouped_queries(grouped_llama, calibration, tmp_path):
    """The published folding credits query head h to h mod 4; the right one to the head it reads, h
    // 2."""
    model = AutoModelForCausalLM.from_pretrained(grouped_llama, dtype=torch.float32)
    channels = slow_channel_scores("l1", model, torch.zeros(1, 9).long())
    found = {}
    for folding, owner in (("own", lambda head: head // 2), ("llm_pruner", lambda head: head % 4)):
        run(
            WidthL1(calibration=calibration, rounding=8, folding=folding),
            grouped_llama,
            tmp_path / folding,
        )
        found[folding] = report(tmp_path / folding)["blocks"]
        for block in range(1, 5):
            expected = slow_units(channels, block, owner)[0]
            assert found[folding][str(block)]["group_scores"] == pytest.approx(expected, rel=1e-4)
    assert found["own"]["2"]["group_scores"] != pytest.approx(
        found["llm_pruner"]["2"]["group_scores"], rel=1e-3
    )
    assert found["own"]["2"]["channel_scores"] == found["llm_pruner"]["2"]["channel_scores"]


def test_the_group_whose_query_heads_do_nothing_goes(grouped_llama, calibration, tmp_path):
    """Silence the two query heads of group 2: only the right folding finds that group."""
    source = tmp_path / "silenced"
    model = load_model(grouped_llama)
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight.data[:, 4 * 8 : 6 * 8] = 0
        layer.self_attn.q_proj.weight.data[4 * 8 : 6 * 8] = 0
    model.save_pretrained(source)
    from slim.checkpoints.writer import copy_companions

    copy_companions(grouped_llama, source)
    kept = {}
    for folding in ("own", "llm_pruner"):
        run(
            WidthL1(calibration=calibration, rounding=8, folding=folding),
            source,
            tmp_path / folding,
        )
        kept[folding] = [
            entry["groups_kept"] for entry in report(tmp_path / folding)["blocks"].values()
        ]
    assert kept["own"] == [[0, 1, 3]] * 4
    assert any(2 in groups for groups in kept["llm_pruner"])


# --- the folder
# -----------------------------------------------------------------------------------------------------


def silenced(source: Path, found: dict):
    """The source model with zeros where the removed units are read: what the pruned model has to
    compute."""
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    for block, entry in found["blocks"].items():
        layer = model.model.layers[int(block)]
        for group in set(range(4)) - set(entry["groups_kept"]):
            layer.self_attn.o_proj.weight.data[:, group * 16 : (group + 1) * 16] = 0
        gone = sorted(set(range(128)) - set(entry["channels_kept"]))
        layer.mlp.down_proj.weight.data[:, gone] = 0
    return model


@pytest.mark.parametrize("uniform", [False, True])
def test_result_computes_what_the_model_does_without_the_removed_units(
    family_folder, calibration, tmp_path, uniform
):
    stage = WidthActivation(
        calibration=calibration, rounding="llm_pruner", ratio=0.3, uniform=uniform
    )
    facts = run(stage, family_folder, tmp_path / "out")
    assert json.loads(json.dumps(facts)) == facts
    assert facts["pruned_blocks"] == list(range(6) if uniform else range(1, 5))
    expected = silenced(family_folder, report(tmp_path / "out"))
    tokens = torch.randint(0, 1024, (2, 20), generator=torch.Generator().manual_seed(1))
    pruned = load_model(tmp_path / "out")
    with torch.no_grad():
        assert torch.allclose(pruned(tokens).logits, expected(tokens).logits, atol=1e-4)
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
        assert torch.equal(again(tokens).logits, pruned(tokens).logits)
        cached = pruned.generate(tokens, max_new_tokens=12, do_sample=False, use_cache=True)
        plain = expected.generate(tokens, max_new_tokens=12, do_sample=False, use_cache=False)
    assert torch.equal(cached, plain)
    spec = open_checkpoint(tmp_path / "out").spec
    assert spec.parameters() == sum(parameter.numel() for parameter in pruned.parameters())
    assert spec.parameters() == facts["parameters_after"]
    assert stage.output_spec(open_checkpoint(family_folder).spec).config == spec.config
    assert (tmp_path / "out" / "README.md").exists() != uniform
    for picture in ("width_kept.png", "head_scores.png"):
        assert (tmp_path / "out" / "report" / picture).read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("name", NAMES)
def test_same_run_twice_gives_the_same(grouped_llama, calibration, tmp_path, name):
    facts = [
        run(stages(calibration)[NAMES.index(name)], grouped_llama, tmp_path / part) for part in "ab"
    ]
    assert facts[0] == facts[1]
    assert (tmp_path / "a" / "model.safetensors").read_bytes() == (
        tmp_path / "b" / "model.safetensors"
    ).read_bytes()


LOGITS = """
import sys, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32).eval()
with torch.no_grad():
    print(model(torch.arange(3, 40)[None]).logits.double().sum().item())
    print(model.generate(torch.arange(3, 20)[None], max_new_tokens=5, do_sample=False)[0].tolist())
"""


def in_another_process(code: str, folder: Path) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", code, str(folder)], capture_output=True, text=True, cwd=ROOT
    )


@pytest.mark.slow
def test_a_uniform_result_needs_no_slim_and_the_other_says_how(
    grouped_llama, calibration, tmp_path
):
    run(
        WidthL1(calibration=calibration, rounding=8, uniform=True),
        grouped_llama,
        tmp_path / "uniform",
    )
    run(WidthL1(calibration=calibration, rounding=8), grouped_llama, tmp_path / "differing")
    lines = []
    with torch.no_grad():
        for name in ("uniform", "differing"):
            lines.append(
                str(
                    load_model(tmp_path / name)(torch.arange(3, 40)[None])
                    .logits.double()
                    .sum()
                    .item()
                )
            )
    code = LOGITS + "\nassert 'slim' not in sys.modules"
    assert in_another_process(code, tmp_path / "uniform").stdout.splitlines()[0] == lines[0]
    without = in_another_process(code, tmp_path / "differing")
    # an error, never other weights
    assert without.returncode != 0 and "per_layer_config" in without.stderr
    for first in ("import slim", "import slim.checkpoints.checkpoint, slim"):
        found = in_another_process(first + LOGITS, tmp_path / "differing")
        assert found.stdout.splitlines()[0] == lines[1], found.stderr
    late = "import transformers.models.mistral.modeling_mistral, slim" + LOGITS
    assert in_another_process(late, tmp_path / "differing").stdout.splitlines()[0] == lines[1]
    card = (tmp_path / "differing" / "README.md").read_text()
    assert "import slim" in card and "from_pretrained" in card


def test_importing_slim_imports_nothing_heavy():
    code = "import slim, sys; print([name for name in ('torch', 'transformers', 'numpy') if name in sys.modules])"
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip()
        == "[]"
    )


def test_models_whose_blocks_are_alike_are_built_as_before(small_llama):
    model = load_model(small_llama)
    assert type(model.model.layers[0]).__module__ == "transformers.models.llama.modeling_llama"
    assert model.model.layers[0].self_attn.config is model.config


def test_a_saved_copy_and_fewer_blocks_of_a_model_whose_blocks_differ(
    grouped_llama, calibration, tmp_path
):
    from slim.checkpoints.writer import write_blocks
    from slim.loading.save_model import save_model

    run(WidthL1(calibration=calibration, rounding=8), grouped_llama, tmp_path / "out")
    model, tokens = load_model(tmp_path / "out"), torch.arange(3, 40)[None]
    with torch.no_grad():
        expected = model(tokens).logits
        (tmp_path / "copy").mkdir()
        save_model(load_model(tmp_path / "out"), tmp_path / "out", tmp_path / "copy")
        assert torch.equal(load_model(tmp_path / "copy")(tokens).logits, expected)
        assert (tmp_path / "copy" / "README.md").exists()
        (tmp_path / "short").mkdir()
        write_blocks(open_checkpoint(tmp_path / "out"), tmp_path / "short", [0, 2, 5])
        model.model.layers = torch.nn.ModuleList(model.model.layers[index] for index in (0, 2, 5))
        expected = model.lm_head(run_blocks(model, tokens))
        assert torch.allclose(load_model(tmp_path / "short")(tokens).logits, expected, atol=1e-5)


def run_blocks(model, tokens):
    inner = model.model
    hidden = inner.embed_tokens(tokens)
    positions = torch.arange(tokens.shape[1])[None]
    angles = inner.rotary_emb(hidden, position_ids=positions)
    for layer in inner.layers:
        hidden = layer(
            hidden, position_embeddings=angles, position_ids=positions, attention_mask=None
        )
    return inner.norm(hidden)


def test_pruned_again(grouped_llama, calibration, tmp_path):
    """A model whose blocks differ is a source like any other."""
    run(WidthL1(calibration=calibration, rounding=8), grouped_llama, tmp_path / "once")
    run(
        WidthTaylor(calibration=calibration, rounding=8, length=24),
        tmp_path / "once",
        tmp_path / "twice",
    )
    sizes = json.loads((tmp_path / "twice" / "config.json").read_text())["per_layer_config"]
    expected = {"num_attention_heads": 6, "num_key_value_heads": 3, "intermediate_size": 72}
    assert sizes == {str(block): expected for block in range(1, 5)}
    assert load_model(tmp_path / "twice").model.layers[1].mlp.up_proj.weight.shape == (72, 64)


@pytest.mark.parametrize("damage", ["config", "weights"])
def test_sizes_are_checked_at_load(grouped_llama, calibration, tmp_path, damage):
    run(WidthL1(calibration=calibration, rounding=8), grouped_llama, tmp_path / "out")
    if damage == "config":
        config = json.loads((tmp_path / "out" / "config.json").read_text())
        config["per_layer_config"]["2"]["intermediate_size"] += 1
        (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    else:
        from safetensors.torch import save_file

        tensors = load_file(tmp_path / "out" / "model.safetensors")
        tensors["model.layers.2.mlp.up_proj.weight"] = tensors["model.layers.2.mlp.up_proj.weight"][
            1:
        ].contiguous()
        save_file(tensors, tmp_path / "out" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        SlimError, match=r"model.layers.2.mlp.\w+_proj.weight in .* but config.json asks for"
    ):
        load_model(tmp_path / "out")


# --- reconstruction
# -------------------------------------------------------------------------------------------------


def test_reconstruction_is_the_least_squares_fit_on_what_the_layer_sees(
    grouped_llama, calibration, tmp_path
):
    """In the first pruned block, whose inputs are the whole model's: against a solver on the inputs
    themselves."""
    stage = WidthL1(
        calibration=calibration,
        rounding=8,
        reconstruct=True,
        damping=1e-7,
        first_block=2,
        last_block=2,
    )
    facts = run(stage, grouped_llama, tmp_path / "out")
    assert 0 < facts["layer_error_refitted"] < facts["layer_error_cut"]
    model, seen = load_model(grouped_llama), []
    hook = model.model.layers[2].self_attn.o_proj.register_forward_pre_hook(
        lambda _, args: seen.append(args[0])
    )
    with torch.no_grad():
        model(calibration.tokens(tokenizer(grouped_llama), 256))
    hook.remove()
    x = seen[0].flatten(0, 1).double()
    groups = report(tmp_path / "out")["blocks"]["2"]["groups_kept"]
    columns = [group * 16 + channel for group in groups for channel in range(16)]
    dense = model.model.layers[2].self_attn.o_proj.weight.double()
    expected = torch.linalg.lstsq(x[:, columns], x @ dense.T).solution.T
    found = load_file(tmp_path / "out" / "model.safetensors")[
        "model.layers.2.self_attn.o_proj.weight"
    ].double()
    assert (found - expected).norm() < 0.02 * expected.norm()
    assert (dense[:, columns] - expected).norm() > 0.1 * expected.norm()


@pytest.mark.parametrize("criterion", [WidthRandom, WidthTaylor])
def test_reconstruction_brings_the_output_closer(tmp_path, criterion):
    """On the embedded trained model, on text that was not calibrated on."""
    source = ROOT / "slim" / "assets" / "tiny"
    text = Calibration("tiny:calibration", samples=32, length=64)
    tokens = Calibration("tiny:calibration", samples=8, length=64, seed=7).tokens(
        tokenizer(source), 512
    )
    losses = {}
    for fit in (False, True):
        run(criterion(calibration=text, reconstruct=fit, ratio=0.5), source, tmp_path / str(fit))
        with torch.no_grad():
            losses[fit] = load_model(tmp_path / str(fit))(tokens, labels=tokens).loss.item()
    assert losses[True] < losses[False] - 0.01


# --- counts and settings
# --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rounding", [1, 8, 32, 64])
@pytest.mark.parametrize("ratio", [0.1, 0.3, 0.62])
def test_rounding_keeps_sizes_divisible(grouped_llama, calibration, rounding, ratio):
    spec = open_checkpoint(grouped_llama).spec
    stage = WidthL1(calibration=calibration, rounding=rounding, ratio=ratio)
    for width in stage.widths(spec).values():
        assert width.channels % rounding == 0 and abs(width.channels - 128 * (1 - ratio)) <= max(
            rounding / 2, 1
        )
        assert width.heads * 8 % rounding == 0 and width.heads == 2 * width.kv_heads


def test_a_ratio_that_drops_no_head_prunes_the_mlp_alone_and_says_so(
    grouped_llama, calibration, tmp_path, capsys
):
    facts = run(
        WidthL1(calibration=calibration, ratio=0.2, rounding=8), grouped_llama, tmp_path / "out"
    )
    assert not facts["heads_pruned"]
    assert facts["sizes"]["2"] == {"kv_heads": 4, "heads": 8, "channels": 104}
    said = " ".join(capsys.readouterr().err.split())
    assert "no whole key/value group" in said and "only MLP channels are pruned" in said
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == "llama"


@pytest.mark.parametrize(
    ("group_size", "ratio", "channels"),
    [
        (None, 0.3, 448),  # 7 * 64
        (64, 0.3, 448),
        (128, 0.3, 512),
        (128, 0.4, 384),  # 64 gives a multiple of 128 already
        (-1, 0.3, 448),
    ],
)
def test_channels_fit_the_groups_of_a_later_quantizer(
    grouped_llama, calibration, group_size, ratio, channels
):
    from slim.quantization.methods.rtn import RTN

    spec = open_checkpoint(grouped_llama).spec.with_config(intermediate_size=640)
    following = []
    if group_size is not None:
        following = [RTN(4, group_size)]
    stage = WidthL1(calibration=calibration, ratio=ratio)
    stage.look_ahead(spec, following)
    assert {width.channels for width in stage.widths(spec).values()} == {channels}
    # where 64 fits the result keeps the name it had when 64 was the default
    assert stage.cache_key()["rounding"] == (128 if channels == 512 else 64)


def test_a_rounding_that_is_given_is_kept(grouped_llama, calibration):
    from slim.quantization.methods.rtn import RTN

    spec = open_checkpoint(grouped_llama).spec.with_config(intermediate_size=640)
    stage = WidthL1(calibration=calibration, ratio=0.3, rounding=64)
    stage.look_ahead(spec, [RTN(4, 128)])
    assert {width.channels for width in stage.widths(spec).values()} == {448}


def test_the_plan_of_a_later_stage_sees_the_sizes_of_every_block(grouped_llama, calibration):
    """One block of 40 channels among others of 128 is enough for groups of 32 not to fit."""
    from slim.quantization.methods.rtn import RTN

    spec = open_checkpoint(grouped_llama).spec
    stage = WidthL1(calibration=calibration, rounding=40, ratio=0.7, first_block=2, last_block=2)
    assert stage.output_spec(spec).block_linears(2)["mlp.down_proj"] == (64, 40)
    assert stage.output_spec(spec).block_linears()["mlp.down_proj"] == (64, 128)
    RTN(4, 32).check(spec)
    with pytest.raises(
        SlimError, match="does not divide the 40 inputs of model.layers.2.mlp.down_proj"
    ):
        RTN(4, 32).check(stage.output_spec(spec))


def test_identity_holds_what_counts_and_nothing_else(calibration):
    more = Calibration(calibration.text, samples=99, length=24)
    assert WidthL1(calibration=calibration).cache_key() == WidthL1(calibration=more).cache_key()
    assert (
        WidthL1(calibration=calibration).cache_key()
        == WidthL1(calibration=calibration, damping=0.1).cache_key()
    )
    fitted = [
        WidthL1(calibration=text, reconstruct=True).cache_key() for text in (calibration, more)
    ]
    assert fitted[0] != fitted[1]
    assert (
        WidthTaylor(calibration=calibration).cache_key()
        == WidthTaylor(calibration=more).cache_key()
    )
    assert (
        WidthTaylor(calibration=calibration).cache_key()
        != WidthTaylor(calibration=more, samples=11).cache_key()
    )
    assert (
        WidthActivation(calibration=calibration).cache_key()
        != WidthActivation(calibration=more).cache_key()
    )
    assert (
        WidthRandom(calibration=calibration).cache_key()
        != WidthRandom(calibration=calibration, seed=1).cache_key()
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        *(
            ({"ratio": ratio}, f"pruner.ratio={ratio}: must be a number between 0 and 1")
            for ratio in (0, 1, -0.1, 1.5, "half", True)
        ),
        ({"first_block": -1}, "pruner.first_block=-1"),
        ({"first_block": 4, "last_block": 2}, "comes after pruner.last_block=2"),
        ({"uniform": True, "first_block": 2}, "pruner.uniform=true prunes all blocks"),
        ({"rounding": 0}, "pruner.rounding=0"),
        ({"rounding": "llm-pruner"}, "Did you mean llm_pruner"),
        ({"rounding": 1.5}, "pruner.rounding=1.5"),
        ({"reconstruct": 1}, "pruner.reconstruct=1"),
        ({"damping": -1}, "pruner.damping=-1"),
        ({"folding": "other"}, "pruner.folding=other"),
    ],
)
def test_wrong_settings_are_refused(calibration, settings, message):
    with pytest.raises(SlimError, match=message):
        WidthL1(calibration=calibration, **settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"first_block": 6}, "pruner.first_block=6: .* has blocks 0 to 5"),
        ({"last_block": 9}, "pruner.last_block=9: .* has blocks 0 to 5"),
        ({"last_block": 0}, "No block is left"),
        ({"ratio": 0.99, "rounding": "llm_pruner"}, "removes all key/value heads of block 1"),
        ({"ratio": 0.05, "rounding": 64}, "removes nothing"),
    ],
)
def test_settings_that_do_not_fit_the_model_are_refused(
    grouped_llama, calibration, settings, message
):
    with pytest.raises(SlimError, match=message):
        WidthL1(calibration=calibration, **settings).check(open_checkpoint(grouped_llama).spec)


def test_models_that_cannot_be_pruned_are_refused(small_llama, calibration):
    spec = open_checkpoint(small_llama).spec
    with pytest.raises(SlimError, match="already quantized"):
        WidthL1(calibration=calibration, rounding=8).check(
            spec.with_config(quantization_config={"quant_method": "x"})
        )
    with pytest.raises(SlimError, match="does not know the model family 'mamba'"):
        WidthL1(calibration=calibration, rounding=8).check(spec.with_config(model_type="mamba"))
    biased = spec.with_config(
        attention_bias=True, num_attention_heads=8, num_key_value_heads=4, head_dim=8
    )
    with pytest.raises(SlimError, match="has attention_bias"):
        WidthL1(calibration=calibration, rounding=8).check(biased)
    dividing = WidthL1(calibration=calibration, rounding=8, ratio=0.5, uniform=True)
    dividing.check(biased)  # 4 heads divide 64: Llama takes them


def test_missing_config_entries_keep_llamas_meaning():
    """config.json may leave out what is Llama's default; as Mistral the same entries would mean
    something else."""
    config = dict(
        model_type="llama", hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4,
        vocab_size=99,
    )  # fmt: skip
    from slim.pruning.width_sizes import Width, with_widths

    result = with_widths(ModelSpec(config), dict.fromkeys(range(4), Width(3, 3, 64))).config
    assert (result["model_type"], result["max_position_embeddings"], result["head_dim"]) == (
        "mistral",
        2048,
        16,
    )
    assert result["num_key_value_heads"] == 3 and result["sliding_window"] is None


def test_broken_weights_are_reported(grouped_llama, calibration, tmp_path, monkeypatch):
    def broken(folder, device):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        model.model.layers[3].mlp.up_proj.weight.data[0, 0] = float("nan")
        return model

    monkeypatch.setattr("slim.loading.load_model.load_model", broken)
    for index in (NAMES.index("first"), NAMES.index("activation")):
        stage = stages(calibration)[index]
        with pytest.raises(SlimError, match="NaN"):
            run(stage, grouped_llama, tmp_path / str(index))


def test_settings_answer_without_torch(calibration):
    code = (
        "import sys\n"
        "from slim.pruning.width_taylor import WidthTaylor; from slim.pruning.width_activation import WidthActivation\n"
        "from slim.pruning.width_magnitude import WidthL1; from slim.data.calibration import Calibration\n"
        f"WidthL1(calibration=Calibration({calibration.text!r}))\n"
        "print([name for name in ('torch', 'transformers', 'matplotlib', 'rich', 'hydra') if name in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert found.stdout.strip() == "[]", found.stderr


def test_the_plan_says_when_memory_is_short(tiny_plan):
    with pytest.raises(
        SlimError, match=r"'prune width_taylor' needs about .* of memory, and 1.0 MB are free"
    ):
        tiny_plan()


@pytest.fixture
def tiny_plan(tmp_path, calibration, monkeypatch):
    from slim.chain.pipeline import Pipeline
    from slim.checkpoints.source import Source
    from slim.checkpoints.store import Store

    def plan():
        monkeypatch.setattr("slim.chain.pipeline.available_memory", lambda device: 1_000_000)
        stage = WidthTaylor(calibration=calibration, rounding=8)
        pipeline = Pipeline(Source("tiny"), [stage], None, Store(tmp_path / "runs"))
        pipeline.check_limits(pipeline.plan())

    return plan

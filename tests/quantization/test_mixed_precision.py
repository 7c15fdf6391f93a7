"""Layers with schemes of their own, bits chosen under a budget, and runs that resume where they
were interrupted."""

from __future__ import annotations

import itertools
import json

import pytest
import torch
from safetensors.torch import load_file

from slim.calibration.sequential import transform_checkpoint
from slim.chain.pipeline import Pipeline
from slim.checkpoints.checkpoint import open_checkpoint
from slim.checkpoints.source import Source
from slim.checkpoints.stage import Context
from slim.checkpoints.store import Store
from slim.core.errors import SlimError
from slim.loading.load_model import load_model
from slim.pruning.weights import MagnitudeWeights
from slim.quantization.assign import fused_groups
from slim.quantization.methods.allocate import allocate, allocate_together
from slim.quantization.methods.awq import AWQ
from slim.quantization.methods.gptq import GPTQ
from slim.quantization.methods.rtn import RTN
from slim.quantization.scheme import Scheme
from slim.quantization.storage import packed_schemes, weight_bytes
from tests.conftest import build_small
from tests.support.calibrating import random_calibration

HEAD = Scheme(8, -1, True)


@pytest.fixture(scope="module")
def calibration(tmp_path_factory):
    """Calibration on a text of random words."""
    return random_calibration(tmp_path_factory.mktemp("text"), 3000)


def run(stage, source, target, **context):
    target.mkdir(parents=True)
    return stage.run(source, target, Context(**context))


def names(folder, end):
    return {
        name.removesuffix(end)
        for name in load_file(folder / "model.safetensors")
        if name.endswith(end)
    }


# Choosing bits
# ------------------------------------------------------------------------------------------------


def best_by_trying_all(errors, sizes, average):
    """The smallest sum of n_l e_l(b_l) that fits."""
    budget, best = average * sum(sizes.values()), float("inf")
    for bits in itertools.product((2, 3, 4, 8), repeat=len(sizes)):
        if (
            sum(size * width for size, width in zip(sizes.values(), bits, strict=True))
            <= budget + 1e-9
        ):
            loss = sum(
                sizes[name] * errors[name][width] for name, width in zip(sizes, bits, strict=True)
            )
            best = min(best, loss)
    return best


@pytest.mark.parametrize("average", [2.0, 2.6, 3.25, 4.0, 6.1, 8.0])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_chosen_bits_are_near_the_best_that_fits(seed, average):
    generator = torch.Generator().manual_seed(seed)
    sizes = {
        f"layer {index}": int(torch.randint(1, 5, (), generator=generator)) * 64
        for index in range(6)
    }
    errors = {}
    for name in sizes:  # error falls about fourfold per bit, from a level that differs by layer
        level = float(torch.rand((), generator=generator)) * 4 + 0.01
        errors[name] = {
            bits: level * 4.0**-bits * (1 + 0.2 * float(torch.rand((), generator=generator)))
            for bits in (2, 3, 4, 8)
        }
    chosen = allocate(errors, sizes, average)
    assert (
        sum(sizes[name] * bits for name, bits in chosen.items())
        <= average * sum(sizes.values()) + 1e-6
    )
    loss = sum(sizes[name] * errors[name][bits] for name, bits in chosen.items())
    best = best_by_trying_all(errors, sizes, average)
    even = max(bits for bits in (2, 3, 4, 8) if bits <= average)
    assert best - 1e-9 <= loss <= 1.6 * best
    assert loss <= sum(sizes[name] * errors[name][even] for name in sizes) + 1e-9
    assert chosen == allocate(errors, sizes, average)


def test_bits_that_bring_nothing_are_not_spent():
    errors = {
        "useless": {2: 0.1, 3: 0.1, 4: 0.1, 8: 0.1},
        "useful": {2: 0.1, 3: 0.05, 4: 0.02, 8: 0.0},
    }
    assert allocate(errors, {"useless": 10, "useful": 10}, 8.0) == {"useless": 2, "useful": 8}


def test_layers_of_a_group_get_the_bits_that_their_sum_asks_for():
    errors = {
        "q": {2: 1.0, 3: 0.9, 4: 0.8, 8: 0.7},
        "k": {2: 9.0, 3: 2.0, 4: 0.5, 8: 0.0},
        "o": {2: 0.5, 3: 0.4, 4: 0.3, 8: 0.2},
    }
    sizes = {"q": 30, "k": 10, "o": 40}
    groups = [("q", "k", "v"), ("o",)]
    for average in (2.5, 3.0, 4.0, 6.0):
        chosen = allocate_together(errors, sizes, average, groups)
        assert chosen["q"] == chosen["k"]
        best = None
        for together, alone in itertools.product((2, 3, 4, 8), repeat=2):
            if 40 * together + 40 * alone > 80 * average:
                continue
            loss = 30 * errors["q"][together] + 10 * errors["k"][together]
            loss += 40 * errors["o"][alone]
            if best is None or loss < best[0]:
                best = (loss, together, alone)
        assert (chosen["q"], chosen["o"]) == best[1:]


def groups_that_differ(folder) -> set[str]:
    """Return the fused groups in whose report the layers have different bits."""
    table = json.loads((folder / "report" / "bits.json").read_text())
    bits = {row["layer"]: row["bits"] for row in table}
    spec = open_checkpoint(folder).spec
    return {group[0] for group in fused_groups(spec) if len({bits[name] for name in group}) > 1}


def test_automatic_bits_are_alike_in_what_engines_fuse(small_llama, tmp_path):
    run(RTN("auto", 32, average_bits=3.3), small_llama, tmp_path / "fused")
    run(RTN("auto", 32, average_bits=3.3, fused=False), small_llama, tmp_path / "apart")
    assert not groups_that_differ(tmp_path / "fused")
    assert groups_that_differ(tmp_path / "apart")


def test_an_override_that_parts_fused_layers_is_kept_and_warned_of(small_llama, tmp_path):
    overrides = {"*.q_proj": {"bits": 8}}
    result = run(RTN(4, 32, overrides=overrides), small_llama, tmp_path / "q")
    assert len(result["notes"]) == 1
    assert "q_proj 8 bits, k_proj 4 bits, v_proj 4 bits" in result["notes"][0]
    assert "vLLM" in result["notes"][0]
    assert packed_schemes(open_checkpoint(tmp_path / "q").spec)[
        "model.layers.0.self_attn.q_proj"
    ] == Scheme(8, 32, False)
    whole = {"*.self_attn.?_proj": {"bits": 8}}
    assert "notes" not in run(RTN(4, 32, overrides=whole), small_llama, tmp_path / "whole")


def test_only_automatic_bits_have_fused_in_their_name():
    assert "fused" not in RTN(4, 32).cache_key()
    assert RTN("auto", 32, average_bits=3).cache_key()["fused"] is True
    apart = RTN("auto", 32, average_bits=3, fused=False)
    assert "fused" not in apart.cache_key()  # as before there was the setting


@pytest.mark.parametrize("method", [RTN, GPTQ])
def test_automatic_bits_keep_the_budget_and_beat_equal_bits(method, calibration, tmp_path):
    source = build_small("llama", tmp_path / "source", num_hidden_layers=3)
    settings = {} if method is RTN else {"calibration": calibration}
    weights = load_file(source / "model.safetensors")
    for name, tensor in weights.items():  # one layer with outliers, which few bits ruin
        if name.endswith("1.mlp.down_proj.weight"):
            tensor[:, ::32] *= 30
    from safetensors.torch import save_file

    save_file(weights, source / "model.safetensors", metadata={"format": "pt"})
    facts = run(method("auto", 32, average_bits=3.0, **settings), source, tmp_path / "auto")
    equal = run(method(3, 32, **settings), source, tmp_path / "equal")
    table = json.loads((tmp_path / "auto" / "report" / "bits.json").read_text())
    assert (tmp_path / "auto" / "report" / "bits.png").stat().st_size > 5000
    assert len(table) == 3 * 7
    assert facts["bits"] <= 3.0
    assert len({row["bits"] for row in table}) > 1
    assert facts["layer_error_mean"] < equal["layer_error_mean"] * 1.1
    scheme = open_checkpoint(tmp_path / "auto").spec.quantization["config_groups"]
    assert {group["weights"]["num_bits"] for group in scheme.values()} == {
        row["bits"] for row in table
    }
    tokens = torch.arange(3, 40)[None]
    with torch.no_grad():
        expected = load_model(source)(tokens).logits
        found, even = (load_model(tmp_path / name)(tokens).logits for name in ("auto", "equal"))
    # GPTQ's errors are not independent of one another, and the whole of a random model says little
    if method is RTN:
        assert (found - expected).norm() < (even - expected).norm()
    chosen, even = (
        sum(row["predicted_errors"][str(bits or row["bits"])] for row in table)
        for bits in (None, 3)
    )
    assert chosen < even


def test_a_budget_in_bytes_is_kept(small_llama, tmp_path):
    plain = open_checkpoint(small_llama).spec
    limits = [weight_bytes(RTN(bits, 32).output_spec(plain)) for bits in (2, 8)]
    budget = (0.6 * limits[0] + 0.4 * limits[1]) / 1e9
    facts = run(RTN("auto", 32, budget_gb=budget), small_llama, tmp_path / "q")
    written = sum(
        tensor.nbytes for tensor in load_file(tmp_path / "q" / "model.safetensors").values()
    )
    assert 0.93 * budget * 1e9 < written <= budget * 1e9 + 16 * 42  # the shapes next to each layer
    assert 2 < facts["bits"] < 8
    with pytest.raises(SlimError, match=r"quant\.budget_gb=0\.0001 is too little.* at 2 bits"):
        RTN("auto", 32, budget_gb=1e-4).check(plain)


# Settings by name
# ------------------------------------------------------------------------------------------------


def test_overrides_hold_for_the_layers_they_name(small_llama, tmp_path):
    overrides = {
        "*.down_proj": {"bits": 8, "group_size": 64},
        "model.layers.0.*": {"bits": 16},
        "*.5.self_attn.q_proj": {"symmetric": True},
    }
    stage = RTN(4, 32, overrides=overrides)
    schemes = stage.schemes(open_checkpoint(small_llama).spec)
    assert schemes["model.layers.1.mlp.down_proj"] == Scheme(8, 64, False)
    assert schemes["model.layers.5.self_attn.q_proj"] == Scheme(4, 32, True)
    assert schemes["model.layers.5.self_attn.k_proj"] == Scheme(4, 32, False)
    assert not [name for name in schemes if ".layers.0." in name]
    run(stage, small_llama, tmp_path / "q")
    packed = load_file(tmp_path / "q" / "model.safetensors")
    assert packed["model.layers.2.mlp.down_proj.weight_packed"].shape == (64, 128 * 8 // 32)
    assert packed["model.layers.2.mlp.up_proj.weight_packed"].shape == (128, 64 * 4 // 32)
    original = load_file(small_llama / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(packed[name], original[name])
    tokens = torch.arange(3, 40)[None]
    with torch.no_grad():
        plain, ours = (
            load_model(small_llama)(tokens).logits,
            load_model(tmp_path / "q")(tokens).logits,
        )
    assert 1e-4 < (ours - plain).norm() / plain.norm() < 0.5


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"overrides": {"*.down": {"bits": 8}}},
            r"'\*\.down' is not the name .*\n.*model\.layers\.0\.self_attn\.q_proj",
        ),
        ({"overrides": {"*": {"bit": 8}}}, r"quant\.overrides.*=bit: must be one of"),
        ({"overrides": {"*": {"bits": 5}}}, r"must be one of 2, 3, 4, 8, 16"),
        ({"overrides": {"*": 8}}, r"braces"),
        ({"overrides": ["x"]}, r"must map layer names"),
        ({"overrides": {"*": {"bits": 16}}}, r"no layer to quantize"),
        ({"overrides": {"*.q_proj": {"group_size": 128}}}, r"does not divide the 64 inputs"),
        ({"bits": "auto"}, r"either quant\.average_bits or quant\.budget_gb"),
        ({"bits": "auto", "average_bits": 3, "budget_gb": 1}, r"needs either"),
        ({"bits": "auto", "average_bits": 1.5}, r"from 2 to 8"),
        ({"average_bits": 3}, r"belongs to quant\.bits=auto"),
        ({"bits": "some"}, r"must be one of 2, 3, 4, 8, auto"),
        ({"lm_head": 1}, r"quant\.lm_head=1"),
    ],
)
def test_refusals(settings, message, small_llama):
    with pytest.raises(SlimError, match=message):
        RTN(**{"bits": 4, "group_size": 32, **settings}).check(open_checkpoint(small_llama).spec)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("which", ["lm_head", "embeddings", "both"])
def test_head_and_embedding(which, tied, tmp_path):
    source = build_small(
        "llama", tmp_path / "source", num_hidden_layers=2, tie_word_embeddings=tied
    )
    chosen = {"lm_head": which != "embeddings", "embeddings": which != "lm_head"}
    stage = RTN(8, 32, **chosen)
    run(stage, source, tmp_path / "q")
    plain = open_checkpoint(source).spec
    tensors = load_file(tmp_path / "q" / "model.safetensors")
    assert ("model.embed_tokens.weight_packed" in tensors) == chosen["embeddings"]
    assert ("lm_head.weight_packed" in tensors) == (
        chosen["lm_head"] and not (tied and chosen["embeddings"])
    )
    # the embedding stays as it is, the head gets its own weights
    untied = tied and which == "lm_head"
    assert sum(value.nbytes for value in tensors.values()) < weight_bytes(plain) * (
        0.9 if untied else 0.6
    )
    tokens = torch.arange(3, 60)[None]
    with torch.no_grad():
        expected, found = (
            load_model(source)(tokens).logits,
            load_model(tmp_path / "q")(tokens).logits,
        )
    assert 1e-5 < (found - expected).norm() / expected.norm() < 0.03
    assert weight_bytes(stage.output_spec(plain)) == pytest.approx(
        sum(value.nbytes for value in tensors.values()), rel=0.02
    )


# Going on after an interruption
# ---------------------------------------------------------------------------------------


class Interrupted(Exception):
    pass


def interrupted_at(monkeypatch, kind, block):
    """Make a method fail when it reaches ``block`` for the first time."""
    original, armed = kind.process, [True]

    def process(self, group):
        if group.block == block and armed:
            armed.clear()
            raise Interrupted
        return original(self, group)

    monkeypatch.setattr(kind, "process", process)


@pytest.mark.parametrize("method", ["awq", "gptq auto", "gptq propagating", "magnitude"])
@pytest.mark.parametrize("small_shards", [False, True])
def test_an_interrupted_stage_goes_on_and_gives_the_same_files(
    method, small_shards, small_llama, calibration, tmp_path, monkeypatch
):
    from slim.pruning.weights import MagnitudeMethod
    from slim.quantization.methods.awq import ActivationAware
    from slim.quantization.methods.gptq import ErrorFeedback

    stage, method = {
        "awq": (AWQ(3, 32, calibration=calibration, grid=4), ActivationAware),
        "gptq auto": (
            GPTQ("auto", 32, calibration=calibration, average_bits=3.3, refine=0),
            ErrorFeedback,
        ),
        "gptq propagating": (
            GPTQ(2, 32, calibration=calibration, refine=0, propagate=True),
            ErrorFeedback,
        ),
        "magnitude": (MagnitudeWeights(sparsity=0.5), MagnitudeMethod),
    }[method]
    monkeypatch.setattr("slim.calibration.resume.SAVE_SECONDS", 0.0)
    if small_shards:
        monkeypatch.setattr(
            "slim.checkpoints.shards.ShardWriter.__init__.__defaults__", (50_000, None)
        )
    whole = Store(tmp_path / "whole")
    expected = Pipeline(Source(str(small_llama)), [stage], None, whole).run()[-1].checkpoint
    store, seen = Store(tmp_path / "store"), []
    interrupted_at(monkeypatch, method, 4)
    with pytest.raises(Interrupted):
        Pipeline(Source(str(small_llama)), [stage], None, store).run()
    left = [
        path.name for path in (store.root / "stages").iterdir() if not path.name.startswith(".")
    ]
    assert len(left) == 1 and left[0].endswith(".work")
    original = method.process
    monkeypatch.setattr(
        method, "process", lambda self, group: seen.append(group.block) or original(self, group)
    )
    result = Pipeline(Source(str(small_llama)), [stage], None, store).run()[-1].checkpoint
    assert sorted(set(seen)) == [4, 5]
    assert result.folder.name == expected.folder.name
    assert (len(result.weight_files) > 1) == small_shards
    assert result.manifest["checksums"] == expected.manifest["checksums"]
    assert result.manifest["facts"] == expected.manifest["facts"]
    assert result.manifest["curves"] == expected.manifest["curves"]
    assert not list((store.root / "stages").glob("*.work"))


@pytest.mark.parametrize("small_shards", [False, True])
@pytest.mark.parametrize("lost", [False, True])
def test_a_stage_that_ends_before_its_result_is_complete_resumes_its_last_block(
    small_llama, tmp_path, monkeypatch, small_shards, lost
):
    """All files are written, the check or the report is not done. ``lost``: someone has removed the
    files that the saved progress speaks of."""
    from slim.pruning.weights import MagnitudeMethod

    monkeypatch.setattr("slim.calibration.resume.SAVE_SECONDS", 0.0)
    if small_shards:
        monkeypatch.setattr(
            "slim.checkpoints.shards.ShardWriter.__init__.__defaults__", (50_000, None)
        )
    stage = MagnitudeWeights(sparsity=0.5)
    whole, store = Store(tmp_path / "whole"), Store(tmp_path / "store")
    expected = Pipeline(Source(str(small_llama)), [stage], None, whole).run()[-1].checkpoint
    check, seen = Pipeline._check, []
    monkeypatch.setattr(Pipeline, "_check", lambda *_: (_ for _ in ()).throw(Interrupted()))
    with pytest.raises(Interrupted):
        Pipeline(Source(str(small_llama)), [stage], None, store).run()
    monkeypatch.setattr(Pipeline, "_check", check)
    process = MagnitudeMethod.process
    monkeypatch.setattr(
        MagnitudeMethod,
        "process",
        lambda self, group: seen.append(group.block) or process(self, group),
    )
    if lost:
        for path in (store.root / "stages").glob("*.work/shard-*"):
            path.unlink()
    result = Pipeline(Source(str(small_llama)), [stage], None, store).run()[-1].checkpoint
    assert bool(seen) == lost
    assert result.manifest["checksums"] == expected.manifest["checksums"]
    assert not list((store.root / "stages").glob("*.work"))


def test_progress_made_elsewhere_is_not_taken_up(small_llama, tmp_path, monkeypatch):
    from slim.quantization.methods.rtn import RoundToNearest

    monkeypatch.setattr("slim.calibration.resume.SAVE_SECONDS", 0.0)
    source = open_checkpoint(small_llama)
    stage = RTN(4, 32)
    seen = []

    class Counting(RoundToNearest):
        def process(self, group):
            seen.append(group.block)
            return super().process(group)

    def transform(target):
        target.mkdir()
        method = Counting(stage.schemes(source.spec), "float32")
        transform_checkpoint(
            source,
            target,
            method,
            stage.output_spec(source.spec).config,
            Context(resume_dir=tmp_path / "work"),
        )

    transform(tmp_path / "a")
    seen.clear()
    record = json.loads((tmp_path / "work" / "progress.json").read_text())
    record["setting"]["versions"]["torch"] = "1.0"
    (tmp_path / "work" / "progress.json").write_text(json.dumps(record))
    transform(tmp_path / "b")
    assert sorted(set(seen)) == list(range(6))
    assert (
        load_file(tmp_path / "b" / "model.safetensors").keys()
        == load_file(tmp_path / "a" / "model.safetensors").keys()
    )

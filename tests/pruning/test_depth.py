"""Depth pruning: every criterion against a slow, direct implementation; the folder it writes; its
settings."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM

from slim.checkpoints.checkpoint import open_checkpoint
from slim.checkpoints.stage import Context
from slim.checkpoints.tokenizer import load_tokenizer
from slim.core.errors import SlimError
from slim.data.calibration import Calibration
from slim.loading.load_model import load_model
from slim.models.spec import ModelSpec
from slim.pruning import taylor
from slim.pruning.angular import Angular, state_distances
from slim.pruning.block_influence import BlockInfluence, block_influences
from slim.pruning.magnitude import Magnitude
from slim.pruning.ppl import Perplexity, perplexities_without
from slim.pruning.taylor import Taylor, block_taylor_scores, taylor_score
from slim.quantization.storage import weight_bytes
from tests.conftest import FAMILIES, build_small


@pytest.fixture(scope="module", params=FAMILIES)
def family_folder(request, tmp_path_factory) -> Path:
    """A small random model of each family, with different masks per block where the family has
    them."""
    return build_small(
        request.param, tmp_path_factory.mktemp("family") / request.param, **FAMILIES[request.param]
    )


@pytest.fixture(scope="module")
def calibration(tmp_path_factory) -> Calibration:
    words = (
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
        "and",
        "two",
        "old",
        "mills",
    )
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(" ".join(random.Random(0).choices(words, k=3000)))
    return Calibration(str(path), samples=6, length=24)


def load(folder: Path):
    """Load a folder with plain transformers, and its family."""
    spec = ModelSpec(json.loads((folder / "config.json").read_text()))
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval(), spec.family


def random_tokens(samples: int, length: int, vocabulary: int = 1024) -> torch.Tensor:
    return torch.randint(
        0, vocabulary, (samples, length), generator=torch.Generator().manual_seed(1)
    )


def direct_perplexity(model, tokens: torch.Tensor) -> float:
    """Perplexity, sample by sample and token by token, from the model's own logits."""
    losses = []
    for sample in tokens:
        with torch.no_grad():
            logits = model(sample[None]).logits[0].double()
        for position in range(len(sample) - 1):
            row = logits[position]
            losses.append((torch.logsumexp(row, 0) - row[sample[position + 1]]).item())
    return math.exp(sum(losses) / len(losses))


def without_block(folder: Path, target: Path, block: int):
    """Write the model of ``folder`` without ``block`` through the stage and load the result with
    plain transformers."""
    target.mkdir()
    Magnitude(remove=[block]).run(folder, target, Context())
    return load(target)[0]


# --- criteria
# -------------------------------------------------------------------------------------------------------


def test_taylor_score_of_a_tensor():
    weight, grad = torch.tensor([[1.0, -2.0], [3.0, 0.5]]), torch.tensor([[0.5, 1.0], [-1.0, 4.0]])
    assert taylor_score(weight, grad) == 0.5 + 2 + 3 + 2
    big = torch.linspace(-1, 1, taylor.CHUNK + 3)
    assert taylor_score(big, big) == pytest.approx((big.double() ** 2).sum().item(), rel=1e-6)


def test_taylor_equals_plain_backward_with_all_gradients(family_folder, monkeypatch):
    # logits of 7 tokens at a time
    monkeypatch.setattr("slim.calibration.loaded_blocks.LOGITS_AT_ONCE", 7 * 1536)
    model, family = load(family_folder)
    tokens = random_tokens(5, 19)
    scores = block_taylor_scores(model, family, tokens)
    assert all(parameter.grad is None for parameter in model.parameters())

    model.requires_grad_(True)
    model(tokens, labels=tokens).loss.backward()
    expected = [0.0] * 6
    for name, parameter in model.named_parameters():
        if name.startswith("model.layers.") and name.endswith("weight"):
            expected[int(name.split(".")[2])] += (
                (parameter.double() * parameter.grad.double()).abs().sum().item()
            )
    assert scores == pytest.approx(expected, rel=1e-4)


class LiveGradients(TorchDispatchMode):
    """Counts, at every operation, the live tensors that have as many elements as a weight matrix
    and are none."""

    def __init__(self, model):
        super().__init__()
        self.sizes = {parameter.numel() for parameter in model.parameters() if parameter.dim() == 2}
        self.weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
        self.seen: dict[int, StorageWeakRef] = {}
        self.most = self.total = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (list, tuple)) else [result]:
            if isinstance(tensor, torch.Tensor) and tensor.numel() in self.sizes:
                storage = tensor.untyped_storage()
                if storage.data_ptr() not in self.weights and storage._cdata not in self.seen:
                    self.seen[storage._cdata] = StorageWeakRef(storage)
                    self.total += 1
        self.seen = {
            key: reference for key, reference in self.seen.items() if not reference.expired()
        }
        self.most = max(self.most, len(self.seen))
        return result


def test_taylor_keeps_one_gradient_at_a_time(family_folder, monkeypatch):
    # its products have a gradient's size, too
    monkeypatch.setattr(taylor, "taylor_score", lambda *arguments: 0.0)
    model, family = load(family_folder)
    with LiveGradients(model) as live:
        block_taylor_scores(model, family, random_tokens(3, 19))
    assert live.total == 6 * 7  # every gradient was seen
    assert live.most == 1

    model.requires_grad_(True)
    with LiveGradients(model) as live:
        tokens = random_tokens(3, 19)
        model(tokens, labels=tokens).loss.backward()
    assert live.most >= 6 * 7  # the measurement does see what a plain backward keeps


def test_perplexity_equals_that_of_the_model_with_the_block_removed(
    family_folder, tmp_path, monkeypatch
):
    model, family = load(family_folder)
    tokens = random_tokens(5, 19)
    # batches of 2, 2 and 1 samples
    monkeypatch.setattr("slim.calibration.loaded_blocks.TOKENS_PER_BATCH", 2 * 19)
    scores, whole = perplexities_without(model, family, tokens)
    assert whole == pytest.approx(direct_perplexity(model, tokens), rel=1e-4)
    for block in range(6):
        shorter = without_block(family_folder, tmp_path / str(block), block)
        assert scores[block] == pytest.approx(direct_perplexity(shorter, tokens), rel=1e-4)


def test_perplexity_costs_half_as_many_forwards_as_there_are_blocks(small_llama):
    model, family = load(small_llama)
    calls = {"blocks": 0}
    for block in model.model.layers:
        block.mlp.register_forward_hook(lambda *_: calls.update(blocks=calls["blocks"] + 1))
    perplexities_without(model, family, random_tokens(4, 16))
    assert calls["blocks"] / 6 <= (6 + 1) / 2 + 1


def dot(x: list[float], y: list[float]) -> float:
    return sum(a * b for a, b in zip(x, y, strict=True))


def test_angular_distances_equal_those_of_the_models_own_hidden_states(family_folder, monkeypatch):
    model, family = load(family_folder)
    tokens = random_tokens(5, 19)
    monkeypatch.setattr("slim.calibration.loaded_blocks.TOKENS_PER_BATCH", 2 * 19)
    distances = state_distances(model, family, tokens)

    expected = torch.zeros(7, 7, dtype=torch.float64)
    for sample in tokens:
        before_norm = []
        hook = model.model.norm.register_forward_pre_hook(
            lambda _, args, kept=before_norm: kept.append(args[0])
        )
        with torch.no_grad():
            states = list(model(sample[None], output_hidden_states=True).hidden_states)
        hook.remove()
        states[-1] = before_norm[0]  # transformers gives the last state behind the final norm
        last = [state[0, -1].tolist() for state in states]
        for i in range(7):
            for j in range(7):
                cosine = dot(last[i], last[j]) / math.sqrt(
                    dot(last[i], last[i]) * dot(last[j], last[j])
                )
                expected[i, j] += math.acos(max(-1, min(1, cosine))) / math.pi / 5
    assert torch.allclose(distances, expected, atol=1e-5)
    assert distances[0, 6] > 0.01


def test_influences_equal_those_of_the_models_own_hidden_states(family_folder, monkeypatch):
    model, family = load(family_folder)
    tokens = random_tokens(5, 19)
    monkeypatch.setattr("slim.calibration.loaded_blocks.TOKENS_PER_BATCH", 2 * 19)
    found = block_influences(model, family, tokens)

    last_states = []
    hook = model.model.norm.register_forward_pre_hook(lambda _, args: last_states.append(args[0]))
    with torch.no_grad():
        states = list(model(tokens, output_hidden_states=True).hidden_states)
    hook.remove()
    states[-1] = last_states[0]  # transformers gives the last state behind the final norm
    for block, influence in enumerate(found):
        total = 0.0
        for sample in range(5):
            for token in range(19):
                x = states[block][sample, token].tolist()
                y = states[block + 1][sample, token].tolist()
                total += dot(x, y) / math.sqrt(dot(x, x) * dot(y, y))
        assert influence == pytest.approx(1 - total / (5 * 19), abs=1e-5)
    assert max(found) > 0.01


def test_magnitude_equals_the_sum_over_the_file(small_llama, calibration):
    checkpoint = open_checkpoint(small_llama)
    expected = [0.0] * 6
    with safe_open(small_llama / "model.safetensors", "np") as file:
        for name in file.keys():  # noqa: SIM118 (not a dict)
            if name.startswith("model.layers."):
                expected[int(name.split(".")[2])] += abs(
                    file.get_tensor(name).astype("float64")
                ).sum()
    assert Magnitude().scores(checkpoint, Context()) == pytest.approx(expected, rel=1e-6)


# --- the stage
# ------------------------------------------------------------------------------------------------------


def stages(calibration: Calibration) -> list:
    return [
        Taylor(calibration=calibration, blocks=2, samples=4, length=16),
        Perplexity(calibration=calibration, blocks=2, samples=4, length=16),
        Angular(calibration=calibration, blocks=2),
        Magnitude(blocks=2),
        BlockInfluence(calibration=calibration, blocks=2),
    ]


NAMES = ["taylor", "ppl", "angular", "magnitude", "block_influence"]


@pytest.mark.parametrize("index", range(5), ids=NAMES)
def test_result_is_the_source_without_the_removed_blocks(small_llama, calibration, tmp_path, index):
    stage = stages(calibration)[index]
    facts = stage.run(small_llama, tmp_path, Context())
    assert sorted(facts["removed_blocks"] + facts["kept_blocks"]) == list(range(6))
    assert len(facts["removed_blocks"]) == 2 and 0 not in facts["removed_blocks"]
    assert json.loads(json.dumps(facts)) == facts

    source, _ = load(small_llama)
    source.model.layers = torch.nn.ModuleList(
        source.model.layers[block] for block in facts["kept_blocks"]
    )
    source.config.num_hidden_layers = 4
    tokens = random_tokens(2, 20)
    with torch.no_grad():
        expected = source(tokens, use_cache=False).logits
        assert torch.equal(load(tmp_path)[0](tokens, use_cache=False).logits, expected)
        assert torch.equal(load_model(tmp_path)(tokens, use_cache=False).logits, expected)

    spec = stage.output_spec(open_checkpoint(small_llama).spec)
    assert spec.parameters() == open_checkpoint(tmp_path).spec.parameters()
    report = json.loads((tmp_path / "report" / "block_scores.json").read_text())
    assert (
        report["scores"] == facts["scores"] and report["removed_blocks"] == facts["removed_blocks"]
    )
    assert (tmp_path / "report" / "block_scores.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("index", range(5), ids=NAMES)
def test_same_run_twice_gives_the_same(small_llama, calibration, tmp_path, index):
    facts = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        facts.append(stages(calibration)[index].run(small_llama, tmp_path / name, Context()))
    assert facts[0] == facts[1]
    first, second = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("a", "b"))
    assert first == second


def test_choice_follows_the_scores(small_llama, calibration, tmp_path):
    facts = Perplexity(calibration=calibration, blocks=3, protect=[2]).run(
        small_llama, tmp_path, Context()
    )
    by_score = sorted((score, block) for block, score in enumerate(facts["scores"]) if block != 2)
    assert facts["removed_blocks"] == sorted(block for _, block in by_score[:3])


def test_angular_removes_one_allowed_run(small_llama, calibration, tmp_path):
    facts = Angular(calibration=calibration, blocks=2, protect=[0, 3]).run(
        small_llama, tmp_path, Context()
    )
    assert facts["removed_blocks"] in ([1, 2], [4, 5])
    report = json.loads((tmp_path / "report" / "block_scores.json").read_text())
    assert [len(row) for row in report["distances"]] == [6, 5, 4, 3, 2, 1]
    assert report["distances"][1] == facts["scores"]
    assert min((d, s) for s, _, d in report["runs"])[1] == facts["removed_blocks"][0]


def test_explicit_list_needs_no_scores(small_llama, calibration, tmp_path):
    facts = Taylor(calibration=calibration, remove=[4, 1]).run(small_llama, tmp_path, Context())
    assert (facts["removed_blocks"], facts["kept_blocks"], facts["scores"]) == (
        [1, 4],
        [0, 2, 3, 5],
        [],
    )
    assert not (tmp_path / "report").exists()


def test_pruner_takes_its_own_number_of_samples(small_llama, calibration):
    tokenizer = load_tokenizer(small_llama)
    for stage, shape in (
        (Taylor(calibration=calibration), (10, 128)),
        (Angular(calibration=calibration), (6, 24)),
    ):
        assert tuple(stage.windows.tokens(tokenizer, 256).shape) == shape


def test_identity_holds_what_counts_and_nothing_else(calibration):
    more = Calibration(calibration.text, samples=99, length=24)
    assert Taylor(calibration=calibration).cache_key() == Taylor(calibration=more).cache_key()
    assert Angular(calibration=calibration).cache_key() != Angular(calibration=more).cache_key()
    assert (
        Taylor(calibration=calibration).cache_key()
        != Taylor(calibration=calibration, samples=11).cache_key()
    )
    assert (
        Taylor(calibration=calibration, remove=[2, 1]).cache_key()
        == Taylor(calibration=more, remove=[1, 2]).cache_key()
    )
    assert Magnitude(blocks=2).cache_key() != Magnitude(blocks=3).cache_key()


# --- wrong settings
# -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"blocks": 0}, "pruner.blocks=0"),
        ({"blocks": 1.5}, "pruner.blocks=1.5"),
        ({"protect_first": -1}, "pruner.protect_first=-1"),
        ({"protect": [0], "protect_first": 1}, "pruner.protect names all"),
        ({"remove": []}, "removes nothing"),
        ({"remove": [1, 2], "blocks": 3}, "names 2 blocks but pruner.blocks=3"),
        ({"remove": [1, 2], "protect": [2]}, "both name block 2"),
    ],
)
def test_wrong_settings_are_refused(settings, message):
    with pytest.raises(SlimError, match=message):
        Magnitude(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"blocks": 5},
            r"pruner.blocks=5 is too many: .* 6 blocks, protected \[0, 5\], so 4 can be removed",
        ),
        ({"blocks": 6, "protect_first": 0, "protect_last": 0}, "so 5 can be removed"),
        ({"protect_first": 4, "protect_last": 4}, "so 0 can be removed.\nProtect fewer"),
        ({"remove": [6]}, "pruner.remove names block 6: .* has blocks 0 to 5"),
        ({"protect": [0, 9]}, "pruner.protect names block 9"),
        ({"remove": [0, 1, 2, 3, 4, 5]}, "At least one has to stay"),
    ],
)
def test_settings_that_do_not_fit_the_model_are_refused(small_llama, settings, message):
    with pytest.raises(SlimError, match=message):
        Magnitude(**settings).check(open_checkpoint(small_llama).spec)


def test_angular_counts_what_fits_in_one_run(small_llama, calibration):
    spec = open_checkpoint(small_llama).spec
    Angular(calibration=calibration, blocks=5).check(spec)
    with pytest.raises(SlimError, match="so 2 can be removed in one run"):
        Angular(calibration=calibration, blocks=3, protect=[0, 3]).check(spec)


def test_quantised_and_unknown_models_are_refused(small_llama):
    spec = open_checkpoint(small_llama).spec
    with pytest.raises(SlimError, match="already quantized"):
        Magnitude().check(
            spec.with_config(quantization_config={"quant_method": "compressed-tensors"})
        )
    with pytest.raises(SlimError, match="does not know the model family 'mamba'"):
        Magnitude().check(spec.with_config(model_type="mamba"))


def test_broken_weights_are_reported(small_llama, calibration, tmp_path, monkeypatch):
    def broken(folder, device):
        model = load(folder)[0]
        model.model.layers[3].mlp.up_proj.weight.data[0, 0] = float("nan")
        return model

    monkeypatch.setattr("slim.loading.load_model.load_model", broken)
    for stage in stages(calibration)[:3]:
        with pytest.raises(SlimError, match="NaN"):
            stage.run(small_llama, tmp_path, Context())
    assert not list(tmp_path.iterdir())


def test_settings_answer_without_torch():
    import subprocess
    import sys

    code = (
        "import sys, slim.pruning.taylor, slim.pruning.ppl, slim.pruning.angular, slim.pruning.magnitude, slim.core.figures\n"
        "slim.pruning.magnitude.Magnitude(blocks=2)\n"
        "print([name for name in ('torch', 'transformers', 'matplotlib', 'rich', 'hydra') if name in sys.modules])"
    )
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip()
        == "[]"
    )


def test_memory_estimates_are_ordered_as_the_methods_are(calibration):
    model = ModelSpec(
        {
            "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
            "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256, "dtype": "bfloat16",
        }
    )  # fmt: skip
    weights = weight_bytes(model, "float32")
    stages = (Magnitude(), Perplexity(calibration=calibration), Taylor(calibration=calibration))
    magnitude, ppl, taylor_peak = (stage.peak_bytes(model, "cpu") for stage in stages)
    assert magnitude < weight_bytes(model) / 8  # streamed
    assert weights < ppl < taylor_peak < 1.1 * weights  # no second copy
    assert (
        Taylor(calibration=calibration, remove=[9]).peak_bytes(model, "cpu")
        < weight_bytes(model) / 8
    )
    assert stages[2].peak_bytes(model, "cuda") < 0.6 * taylor_peak  # bfloat16 there

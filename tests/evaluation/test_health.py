"""Where NaN begins, who repeats itself, energy, and memory of each phase."""

from __future__ import annotations

import json
import sys
import types

import pytest
import torch

from slim.chain.pipeline import Pipeline
from slim.checkpoints.checkpoint import open_checkpoint
from slim.checkpoints.source import Source
from slim.checkpoints.store import Store
from slim.checkpoints.tokenizer import load_tokenizer
from slim.core.errors import SlimError
from slim.evaluation import energy
from slim.evaluation.evaluation import Evaluation
from slim.evaluation.health import first_non_finite, repeated_ngrams, repetition
from slim.evaluation.memory import cache_bytes, phase_peaks
from slim.evaluation.perplexity import Perplexity
from slim.evaluation.speed import Speed
from slim.loading.load_model import load_model
from slim.models.accounting import macs_per_token
from tests.support.stages import Scale


def test_the_place_where_nan_starts_is_named(small_llama):
    model, tokenizer = load_model(small_llama), load_tokenizer(small_llama)
    assert first_non_finite(model, [[1, 2, 3]]) is None
    with torch.no_grad():
        model.model.layers[2].mlp.up_proj.weight[0, 0] = float("nan")
        model.model.layers[4].self_attn.q_proj.weight[0, 0] = float("nan")
    evaluation = Evaluation(perplexity=Perplexity("tiny:heldout", window=32, limit=3))
    found = evaluation.measure_quality(model, tokenizer)
    assert found["metrics"]["perplexity"] != found["metrics"]["perplexity"], (
        "NaN is shown, not averaged away"
    )
    place = {"module": "model.layers.2.mlp.up_proj", "value": "nan", "cause": "weights"}
    assert found["health"] == {"non_finite": place}


def test_overflow_in_half_precision_is_told_from_broken_weights(small_llama):
    model = load_model(small_llama, "float16")
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.fill_(6e4)
    place = first_non_finite(model, [[5, 6, 7]])
    assert place == {
        "module": "model.layers.1.mlp.down_proj",
        "value": "inf",
        "cause": "activations",
    }


def test_repeated_ngrams():
    assert repeated_ngrams([1, 2, 3, 4]) is None
    assert repeated_ngrams(list(range(20))) == 0
    assert repeated_ngrams([7] * 13) == pytest.approx(9 / 10)  # ten 4-grams, one of them new
    # 1234 and 2345 come twice
    assert repeated_ngrams([1, 2, 3, 4, 5, 1, 2, 3, 4, 5]) == pytest.approx(2 / 7)


def test_a_model_that_repeats_itself_is_flagged(small_llama):
    tokenizer = load_tokenizer(small_llama)
    lively, stuck = "The goat sleeps in the stable while Luke feeds a hen.", "the goat " * 20
    found = repetition(tokenizer, [lively, stuck])
    assert found["repeating_answers"] == 0.5 and 0.4 < found["repeated_4grams"] < 0.5
    assert repetition(tokenizer, ["The"]) == {}


def test_memory_of_the_phases_and_of_the_cache(small_llama):
    model = load_model(small_llama)
    found = phase_peaks(model, [3] * 64, 8)
    config = model.config
    assert (
        found["cache_bytes_per_token"] == 2 * 6 * config.num_key_value_heads * config.head_dim * 4
    )
    assert cache_bytes(object()) == 0
    if "prefill_peak_bytes" in found:
        assert found["prefill_peak_bytes"] < 2**30 and found["decode_peak_bytes"] < 2**30


def test_prefill_needs_the_memory_that_it_needs(monkeypatch):
    """A stand-in that allocates 80 MB for the prompt and 30 MB for a step: each phase is charged
    with its own."""
    from slim.evaluation import memory

    if memory.process_bytes("VmHWM") is None or not memory.reset_process_peak():
        pytest.skip("this machine does not tell the peak memory of a process")

    class Hungry:
        device = torch.device("cpu")

        def __call__(self, input_ids, past_key_values=None, **_):
            torch.ones((20 if past_key_values is None else 7) * 10**6).sum()
            return types.SimpleNamespace(logits=torch.zeros(1, 1, 4), past_key_values=1)

    found = phase_peaks(Hungry(), [1] * 8, 3)
    assert found["prefill_peak_bytes"] == pytest.approx(80e6, abs=8e6)
    assert found["decode_peak_bytes"] == pytest.approx(28e6, abs=8e6)


def test_multiply_accumulates_of_a_token(small_llama):
    """Every weight of a linear layer is used once for a token; embeddings and norms are looked up
    and scaled."""
    spec, model = open_checkpoint(small_llama).spec, load_model(small_llama)
    linear = sum(
        module.weight.numel() for module in model.modules() if isinstance(module, torch.nn.Linear)
    )
    assert macs_per_token(spec) == linear


class FakeTracker:
    """codecarbon's offline tracker as far as slim uses it: 2 kJ and 0.5 g a run."""

    def __init__(self, country_iso_code, save_to_file, **_):
        assert save_to_file is False and country_iso_code == "DEU"

    def start(self):
        pass

    def stop(self):
        self.final_emissions_data = types.SimpleNamespace(
            energy_consumed=2000 / 3.6e6, emissions=0.0005
        )


@pytest.fixture
def codecarbon(monkeypatch, tmp_path):
    """A package called codecarbon with a tracker and a list of two countries."""
    package = tmp_path / "codecarbon"
    (package / "data" / "private_infra").mkdir(parents=True)
    (package / energy.MIX).write_text(json.dumps({"DEU": {}, "FRA": {}}))
    (package / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(str(tmp_path))
    import codecarbon as module

    module.OfflineEmissionsTracker = FakeTracker
    monkeypatch.setattr(energy, "RAPL", tmp_path / "powercap")
    yield tmp_path / "powercap"
    sys.modules.pop("codecarbon", None)


def test_energy_per_token_and_whether_it_was_measured(codecarbon, small_llama, monkeypatch):
    monkeypatch.setattr(energy, "LEAST_SECONDS", 0.0)
    model = load_model(small_llama)
    found = energy.generation_energy(model, [[1, 2, 3], [4, 5]], 5, "DEU")
    expected = {"energy_joules_per_token": 200, "co2_micrograms_per_token": 50_000}
    assert found == pytest.approx({f"{name}_estimate": value for name, value in expected.items()})
    (codecarbon / "intel-rapl:0").mkdir(parents=True)
    (codecarbon / "intel-rapl:0" / "energy_uj").write_text("1")
    assert energy.meters("cpu") == ["RAPL"]
    assert energy.generation_energy(model, [[1, 2, 3]] * 2, 5, "DEU") == pytest.approx(expected)


def test_no_meter_and_no_such_country_are_said(codecarbon, monkeypatch):
    energy.check_country("FRA")
    with pytest.raises(SlimError, match=r"eval.energy=GERMANY is no country.*such as DEU"):
        energy.check_country("GERMANY")
    monkeypatch.setattr(energy.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SlimError, match=r"needs codecarbon: pip install 'slim\[energy\]'"):
        energy.check_country("DEU")


def test_every_stage_states_its_energy(codecarbon, small_llama, tmp_path):
    pipeline = Pipeline(
        Source(str(small_llama)), [Scale()], Evaluation(energy="DEU"), Store(tmp_path / "runs")
    )
    source, result = pipeline.run()
    assert (result.metadata["energy_joules"], result.metadata["co2_grams"]) == pytest.approx(
        (2000, 0.5)
    )
    assert result.metadata["energy_estimated"] == 1 and "energy_joules" not in source.metadata


def test_speed_in_batches_and_lengths(small_llama):
    model, tokenizer = load_model(small_llama), load_tokenizer(small_llama)
    part = Speed(count=1, prompt_length=[24, 8], batch_size=[1, 3], new_tokens=4, repeats=2)
    from slim.data.text import Text

    found = part.measure(model, part.prompt_ids(tokenizer, Text("tiny:heldout")))
    suffixes = ("", "/p24_b3", "/p8_b1", "/p8_b3")
    assert all(found["metrics"][f"decode_tokens_per_second{suffix}"] > 0 for suffix in suffixes)
    assert found["protocol"]["prompt_tokens"] == [24] and found["protocol"]["batch_size"] == 1
    assert (
        found["metrics"]["time_to_first_token"] > 0
        and "time_to_first_token_iqr" in found["metrics"]
    )


def test_the_prompts_of_the_thesis(small_llama):
    model, tokenizer = load_model(small_llama), load_tokenizer(small_llama)
    part = Evaluation(speed="thesis").speed
    assert len(part.prompts) == 5 and part.max_length == 200
    part.repeats = part.warmup = 1
    part.prompts = part.prompts[:1]
    prompt = part.prompt_ids(tokenizer, None)
    found = part.measure(model, prompt)["metrics"]
    first, steps = found["time_to_first_token"], 199 - len(prompt[0])
    seconds = first + steps / found["decode_tokens_per_second"]
    assert found["whole_length_tokens_per_second"] == pytest.approx(200 / seconds, rel=1e-6)
    with pytest.raises(
        SlimError, match="eval.speed=thesys: must be one of thesis. Did you mean thesis"
    ):
        Evaluation(speed="thesys")

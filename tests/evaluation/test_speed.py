"""Speed: prompt and generated tokens apart. Memory: against allocations of known size."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from slim.checkpoints.tokenizer import load_tokenizer
from slim.core.errors import SlimError
from slim.data.text import Text
from slim.evaluation import memory, timing
from slim.evaluation.generation import continue_text
from slim.evaluation.memory import MemoryMeter, weights_bytes
from slim.evaluation.speed import Speed
from slim.loading.load_model import load_model
from slim.models.spec import ModelSpec

MEGABYTE = 10**6


@pytest.fixture
def clock(monkeypatch):
    """A clock that only a :class:`SlowModel` moves: times are exact on a busy machine too."""
    clock = SimpleNamespace(seconds=0.0)
    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: clock.seconds))
    return clock


class SlowModel:
    """Takes 1 ms per prompt token and 10 ms per generated one; the first calls take 200 ms more."""

    device = torch.device("cpu")

    def __init__(self, clock, slow_calls: int = 0):
        self.clock = clock
        self.calls: list[int] = []
        self.slow_calls = slow_calls

    def __call__(self, input_ids, past_key_values=None, **_):
        tokens = input_ids.shape[1]
        self.calls.append(tokens)
        slow = 0.2 if len(self.calls) <= self.slow_calls else 0.0
        self.clock.seconds += slow + (0.001 * tokens if past_key_values is None else 0.01)
        return SimpleNamespace(
            logits=torch.zeros(1, 1, 4), past_key_values=(past_key_values or 0) + tokens
        )


def test_prompt_and_generated_tokens_are_timed_apart(clock):
    found = Speed(new_tokens=9, repeats=3, warmup=0).measure(
        SlowModel(clock), [[1] * 100, [2] * 50]
    )
    assert found["metrics"]["prefill_tokens_per_second"] == pytest.approx(1000)
    assert found["metrics"]["decode_tokens_per_second"] == pytest.approx(100)
    assert found["protocol"] == {
        "prompt_tokens": [100, 50], "new_tokens": 9, "max_length": None, "runs": 6, "warmup_runs": 0, "batch_size": 1,
        "compile": False,
    }  # fmt: skip


def test_warm_up_runs_are_dropped(clock):
    model = SlowModel(clock, slow_calls=2 * 4)
    found = Speed(new_tokens=4, repeats=1, warmup=2).measure(model, [[1] * 20])
    assert found["metrics"]["prefill_tokens_per_second"] == pytest.approx(1000)
    assert found["metrics"]["decode_tokens_per_second"] == pytest.approx(100)
    assert model.calls == [20, 1, 1, 1] * 3


def test_a_real_model(small_llama):
    model, tokenizer = load_model(small_llama), load_tokenizer(small_llama)
    speed = Speed(count=2, prompt_length=40, new_tokens=6, repeats=1)
    prompts = speed.prompt_ids(tokenizer, Text("tiny:heldout"))
    assert [len(ids) for ids in prompts] == [40, 40] and prompts[0] != prompts[1]
    assert prompts[0] + prompts[1] == tokenizer(Text("tiny:heldout").joined())["input_ids"][:80]
    metrics = speed.measure(model, prompts)["metrics"]
    assert metrics["prefill_tokens_per_second"] > metrics["decode_tokens_per_second"] > 1


def test_given_prompts_are_taken_as_they_are(small_llama):
    tokenizer = load_tokenizer(small_llama)
    ids = Speed(prompts=["The goat", "Luke keeps a hen"]).prompt_ids(
        tokenizer, Text("tiny:heldout")
    )
    assert ids == [tokenizer("The goat")["input_ids"], tokenizer("Luke keeps a hen")["input_ids"]]


def test_a_short_text_is_repeated(small_llama, tmp_path):
    (tmp_path / "short.txt").write_text("The goat")
    tokenizer = load_tokenizer(small_llama)
    once = tokenizer("The goat")["input_ids"]
    (ids,) = Speed(count=1, prompt_length=7).prompt_ids(
        tokenizer, Text(str(tmp_path / "short.txt"))
    )
    assert ids == (once * 7)[:7]


def test_lengths_must_fit_the_context():
    sizes = dict(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, vocab_size=8
    )
    model = ModelSpec({**sizes, "max_position_embeddings": 64})
    Speed(prompt_length=32, new_tokens=32).check(model)
    with pytest.raises(SlimError, match="Use prompt_length up to 31"):
        Speed(prompt_length=32, new_tokens=33).check(model)
    with pytest.raises(SlimError, match="eval.speed.new_tokens="):
        Speed(new_tokens=1)


def test_greedy_samples_equal_generation_by_transformers(small_llama):
    model, tokenizer = load_model(small_llama), load_tokenizer(small_llama)
    for prompt in ("The goat", "In the morning"):
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        whole = model.generate(ids, max_new_tokens=20, do_sample=False, pad_token_id=1)
        expected = tokenizer.decode(whole[0, ids.shape[1] :], skip_special_tokens=True)
        assert continue_text(model, tokenizer, prompt, 20) == expected


def test_samples_stop_at_the_end_of_text(small_llama):
    model, tokenizer = load_model(small_llama), load_tokenizer(small_llama)
    ids = tokenizer("The goat", return_tensors="pt")["input_ids"]
    chosen = model.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=1)[
        0, ids.shape[1] :
    ].tolist()
    end = chosen[5]
    model.generation_config.eos_token_id = [end]
    expected = tokenizer.decode(chosen[: chosen.index(end)], skip_special_tokens=True)
    assert continue_text(model, tokenizer, "The goat", 8) == expected


def test_weights_are_counted_exactly_and_once():
    model = nn.Sequential(
        nn.Embedding(10, 6), nn.Linear(6, 10, bias=False), nn.Linear(10, 4).to(torch.bfloat16)
    )
    model[1].weight = model[0].weight
    model.register_buffer("packed", torch.zeros(5, 3, dtype=torch.int32))
    assert weights_bytes(model) == 60 * 4 + (40 + 4) * 2 + 15 * 4


@pytest.mark.skipif(memory.process_bytes("VmHWM") is None, reason="needs /proc/self/status")
def test_the_meter_sees_what_is_kept_and_what_was_used():
    if not memory.reset_process_peak():
        pytest.skip("the kernel does not let this process reset its peak memory")
    with MemoryMeter("cpu") as warm_up:
        torch.ones(1000)
    with MemoryMeter("cpu") as meter:
        kept = torch.ones(15_000_000)
        used = torch.ones(25_000_000)
        del used
    assert meter.resident == pytest.approx(60 * MEGABYTE, abs=3 * MEGABYTE)
    assert meter.peak == pytest.approx(160 * MEGABYTE, abs=3 * MEGABYTE)
    assert warm_up.resident < 3 * MEGABYTE
    del kept


@pytest.mark.slow
@pytest.mark.skipif(memory.process_bytes("VmRSS") is None, reason="needs /proc/self/status")
def test_a_model_loaded_twice_takes_the_same_memory_twice(ref_llama):
    resident = []
    for _ in range(3):
        with MemoryMeter("cpu") as meter:
            model = load_model(ref_llama)
        resident.append(meter.resident)
        expected = weights_bytes(model)
        del model
        memory.release()
    # the first one loads libraries too
    assert resident[1:] == pytest.approx([expected] * 2, abs=2 * MEGABYTE)


def test_the_meter_says_nothing_where_nothing_can_be_read(monkeypatch, tmp_path):
    monkeypatch.setattr(memory, "STATUS", tmp_path / "status")
    monkeypatch.setattr(memory, "CLEAR_REFS", tmp_path / "no" / "clear_refs")
    with MemoryMeter("cpu") as meter:
        pass
    assert meter.resident is None and meter.peak is None


def test_four_bit_weights_are_timed_in_the_type_their_kernel_takes():
    from slim.evaluation.evaluation import Evaluation
    from slim.models.spec import ModelSpec
    from slim.quantization.methods.rtn import RTN

    plain = ModelSpec(
        dict(model_type="llama", hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128,
             vocab_size=100, dtype="float16")
    )  # fmt: skip
    packed = {bits: RTN(bits, 32).output_spec(plain) for bits in (3, 4)}
    auto, fixed = Evaluation(), Evaluation(dtype="float32")
    assert auto.speed_dtype(packed[4], "cpu") == "bfloat16"
    assert auto.quality_dtype(packed[4], "cpu") == "float32"
    assert auto.speed_dtype(packed[3], "cpu") == auto.speed_dtype(plain, "cpu") == "float32"
    assert auto.speed_dtype(packed[4], "cuda") == "float16"
    assert fixed.speed_dtype(packed[4], "cpu") == "float32"

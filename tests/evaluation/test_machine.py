"""The type in which all checkpoints of a chain are timed: measured once, kept, the same for all."""

from __future__ import annotations

import json

import pytest
import torch

from slim.checkpoints.store import Store
from slim.evaluation import machine
from slim.evaluation.evaluation import Evaluation
from slim.evaluation.machine import faster, generation_seconds, machine_dtype
from slim.evaluation.run import measure
from slim.evaluation.speed import Speed
from slim.loading.load_model import load_model
from slim.loading.packed import use_fast_kernels
from slim.models.spec import ModelSpec
from slim.quantization.kernels.linear import QuantLinear
from slim.quantization.methods.rtn import RTN
from tests.support.stages import Context

SIZES = {"model_type": "llama", "hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 100}
HEADS = {"num_attention_heads": 4, "intermediate_size": 128, "dtype": "float16"}


@pytest.fixture
def timings(monkeypatch):
    """Seconds per type that the next measurement finds; how often there was one is counted."""
    seconds = {"float32": 1.0, "bfloat16": 0.5}
    seconds_asked = []

    def timed(dtype: str) -> float:
        seconds_asked.append(dtype)
        return seconds[dtype]

    monkeypatch.setattr(machine, "generation_seconds", timed)
    return seconds, seconds_asked


@pytest.mark.parametrize(
    ("float32", "bfloat16", "chosen"),
    [(1.0, 0.5, "bfloat16"), (1.0, 0.95, "float32"), (1.0, 4.5, "float32")],
)
def test_the_faster_type_is_chosen_and_float32_where_they_are_equal(float32, bfloat16, chosen):
    assert faster({"float32": float32, "bfloat16": bfloat16}) == chosen


def test_a_machine_is_measured_once_per_store(tmp_path, timings):
    seconds, asked = timings
    assert machine_dtype(Store(tmp_path)) == "bfloat16"
    seconds["bfloat16"] = 9.0
    assert machine_dtype(Store(tmp_path)) == "bfloat16"
    assert asked == ["float32", "bfloat16"]


def test_another_number_of_threads_is_another_machine(tmp_path, timings, monkeypatch):
    machine_dtype(Store(tmp_path))
    monkeypatch.setattr(machine, "fingerprint", lambda device: {"threads": 99})
    timings[0]["bfloat16"] = 9.0
    assert machine_dtype(Store(tmp_path)) == "float32"


@pytest.mark.parametrize("text", ["", "{", "[]", '{"dtype": "int3"}'])
def test_a_damaged_measurement_is_made_again(tmp_path, timings, text):
    machine_dtype(Store(tmp_path))
    kept = next((tmp_path / "machines").glob("*.json"))
    kept.write_text(text)
    assert machine_dtype(Store(tmp_path)) == "bfloat16"
    assert json.loads(kept.read_text())["seconds"] == timings[0]


def test_a_measurement_takes_both_types(monkeypatch):
    monkeypatch.setattr(machine, "HIDDEN", 32)
    monkeypatch.setattr(machine, "WIDE", 64)
    assert all(generation_seconds(dtype) > 0 for dtype in machine.DTYPES)


@pytest.mark.parametrize("dtype", machine.DTYPES)
@pytest.mark.parametrize("bits", [None, 3, 4, 8])
def test_all_checkpoints_are_timed_in_the_machines_type(dtype, bits):
    spec = ModelSpec({**SIZES, **HEADS})
    evaluation = Evaluation()
    evaluation.machine_dtype = dtype
    packed = RTN(bits, 32).output_spec(spec) if bits else spec
    assert evaluation.speed_dtype(packed, "cpu") == dtype
    assert evaluation.quality_dtype(packed, "cpu") == "float32"
    assert evaluation.speed_dtype(packed, "cuda") == "float16"


def test_a_type_that_is_asked_for_wins():
    evaluation = Evaluation(dtype="float16")
    evaluation.machine_dtype = "bfloat16"
    assert evaluation.speed_dtype(ModelSpec({**SIZES, **HEADS}), "cpu") == "float16"


@pytest.fixture(scope="module")
def packed(small_llama, tmp_path_factory):
    """A checkpoint of 4 bits, in groups that torch's kernel takes."""
    target = tmp_path_factory.mktemp("packed") / "rtn"
    target.mkdir()
    RTN(4, 32).run(small_llama, target, Context())
    return target


def test_in_float32_layers_of_4_bits_use_their_kernel_for_few_rows_only(packed):
    plain, fast = (load_model(packed, "float32") for _ in range(2))
    assert use_fast_kernels(fast)
    name, layer = next((n, m) for n, m in fast.named_modules() if isinstance(m, QuantLinear))
    assert layer.kernel.startswith("int4")
    exact = plain.get_submodule(name)
    one, many = torch.randn(1, layer.in_features), torch.randn(4096, layer.in_features)
    assert layer(one).dtype == torch.float32
    assert torch.nn.functional.cosine_similarity(layer(one), exact(one)).item() > 0.999
    assert torch.allclose(layer(many), exact(many), rtol=0.02, atol=0.02)


def test_quality_is_not_touched_by_how_speed_is_measured(packed):
    evaluation = Evaluation(speed=Speed(count=1, prompt_length=8, new_tokens=3), prompts=["The"])
    evaluation.machine_dtype = "float32"
    both = measure(packed, evaluation)
    alone = measure(packed, evaluation, speed=False)
    assert both["quality"] == alone["quality"]
    assert both["speed"]["protocol"]["speed"]["dtype"] == "float32"

"""An evaluation as a whole: its configuration, its identities, one checkpoint measured."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys

import pytest
from hydra.utils import instantiate
from omegaconf import OmegaConf

from slim.chain.compose import compose
from slim.checkpoints.checkpoint import open_checkpoint
from slim.checkpoints.tokenizer import load_tokenizer
from slim.core.errors import SlimError
from slim.evaluation.answers import Answers
from slim.evaluation.documents import DocumentPerplexity
from slim.evaluation.evaluation import Evaluation
from slim.evaluation.judge import Judge
from slim.evaluation.perplexity import Perplexity
from slim.evaluation.run import measure
from slim.evaluation.speed import Speed
from slim.evaluation.tasks import Tasks
from slim.models.spec import FAMILIES, ModelSpec
from tests.conftest import ROOT, build_small


def small_evaluation(**changes) -> Evaluation:
    parts = dict(
        perplexity=Perplexity("tiny:heldout", window=64, limit=6),
        tasks=Tasks(["tiny_facts"], limit=8),
        speed=Speed(count=1, prompt_length=16, new_tokens=4, repeats=1),
        prompts=["The goat"],
        new_tokens=6,
    )
    return Evaluation(**{**parts, **changes})


@pytest.fixture(scope="module")
def found(small_llama) -> dict:
    return measure(small_llama, small_evaluation())


def test_everything_is_measured_and_is_plain_json(found):
    assert json.loads(json.dumps(found)) == found
    quality, speed = found["quality"], found["speed"]
    accuracies = {
        f"tiny_facts/{name}" for name in ("acc", "acc_stderr", "acc_norm", "acc_norm_stderr")
    }
    repeats = {"repeated_4grams", "repeating_answers"}
    assert set(quality["metrics"]) - repeats == {"perplexity", "tasks/acc", *accuracies}
    assert (
        len(quality["records"]["perplexity"]["nll"]) == 6
        and len(quality["records"]["tasks"]["tiny_facts"]) == 8
    )
    assert quality["health"] == {}
    assert {"time_to_first_token", "decode_tokens_per_second_iqr", "cache_bytes_per_token"} <= set(
        speed["metrics"]
    )
    assert {"prefill_tokens_per_second", "decode_tokens_per_second", "weights_bytes"} <= set(
        speed["metrics"]
    )
    assert all(
        isinstance(value, float) for part in found.values() for value in part["metrics"].values()
    )
    assert [sample["prompt"] for sample in quality["samples"]] == ["The goat"]
    assert quality["protocol"]["dtype"] == speed["protocol"]["speed"]["dtype"] == "float32"


def test_the_bytes_of_the_weights_are_those_of_the_checkpoint(found, small_llama):
    expected = sum(
        shape[0] * (shape[1] if len(shape) > 1 else 1) * 4
        for _, _, shape in open_checkpoint(small_llama).tensors.values()
    )
    rotary = 2 * 8 * 4  # the frequencies, and their original values
    assert expected < found["speed"]["metrics"]["weights_bytes"] <= expected + rotary


def test_memory_is_at_least_that_of_the_weights(found):
    metrics = found["speed"]["metrics"]
    if "peak_bytes" not in metrics:
        pytest.skip("this machine does not tell the memory of a process")
    assert metrics["peak_bytes"] >= metrics["resident_bytes"] > 0.5 * metrics["weights_bytes"]


def test_the_same_again_gives_the_same_quality(found, small_llama):
    again = measure(small_llama, small_evaluation(), speed=False)
    assert again == {"quality": found["quality"], "speed": None}


# one with two kinds of attention and a scale of its own, one with fused layers; the rest take as long
@pytest.mark.parametrize(
    "model_type",
    [
        "gemma3_text",
        "phi3",
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in FAMILIES
            if name not in ("llama", "gemma3_text", "phi3")
        ),
    ],
)
def test_other_families_are_measured_too(model_type, tmp_path):
    found = measure(build_small(model_type, tmp_path / model_type), small_evaluation(tasks=None))
    assert found["quality"]["metrics"]["perplexity"] > 1
    assert found["speed"]["metrics"]["decode_tokens_per_second"] > 1


def test_only_what_is_asked_for_is_measured(small_llama):
    assert measure(small_llama, small_evaluation(), quality=False)["quality"] is None
    assert measure(small_llama, Evaluation()) == {"quality": None, "speed": None}
    assert (
        measure(small_llama, small_evaluation(speed=None, tasks=Tasks([]), prompts=[]))["speed"]
        is None
    )


def test_the_type_can_be_chosen(small_llama, found):
    other = measure(small_llama, small_evaluation(dtype="bfloat16", tasks=None))
    assert other["quality"]["protocol"]["dtype"] == "bfloat16"
    assert (
        other["speed"]["metrics"]["weights_bytes"]
        < 0.6 * found["speed"]["metrics"]["weights_bytes"]
    )
    here, there = (result["quality"]["metrics"]["perplexity"] for result in (other, found))
    assert here != there and here == pytest.approx(there, rel=0.1)


def test_identities_hold_what_determines_the_figures_and_nothing_else():
    evaluation = small_evaluation()
    quality, speed = evaluation.quality_cache_key(), evaluation.speed_cache_key()
    assert json.loads(json.dumps([quality, speed])) == [quality, speed]
    for changes in (
        {"perplexity": Perplexity("tiny:heldout", window=32, limit=6)},
        {"perplexity": Perplexity("tiny:calibration", window=64, limit=6)},
        {"tasks": Tasks(["tiny_facts"], limit=9)},
        {"tasks": Tasks(["tiny_next"], limit=8)},
        {"prompts": ["The hen"]},
        {"new_tokens": 7},
        {"dtype": "float32"},
        {"documents": DocumentPerplexity("tiny:heldout")},
        {"answers": Answers(limit=2)},
    ):
        assert small_evaluation(**changes).quality_cache_key() != quality
    faster = dataclasses.replace(evaluation.tasks, batch_size=3)
    assert small_evaluation(speed=None, tasks=faster).quality_cache_key() == quality
    for changes in (
        {"speed": Speed(new_tokens=5)},
        {"speed": None},
        {"dtype": "float32"},
        {"energy": "DEU"},
    ):
        assert small_evaluation(**changes).speed_cache_key() != speed
    assert small_evaluation(tasks=None, prompts=[]).speed_cache_key() == speed


def test_checks_need_no_weights():
    sizes = dict(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, vocab_size=8
    )
    model = ModelSpec({**sizes, "max_position_embeddings": 128})
    small_evaluation().check(model)
    for changes, message in (
        ({"tasks": Tasks(["tiny_fact"])}, "no task 'tiny_fact'"),
        ({"speed": Speed(prompt_length=128)}, "exceed the context of 128"),
        ({"new_tokens": 128}, "leaves no room for a prompt"),
    ):
        with pytest.raises(SlimError, match=message):
            small_evaluation(**changes).check(model)


def test_settings_are_checked():
    judge = Judge("m", endpoint="http://127.0.0.1:9/v1")
    for wrong in (
        {"dtype": "float31"},
        {"new_tokens": 0},
        {"prompts": [""]},
        {"judge": judge},
        {"speed": "fast"},
    ):
        with pytest.raises(SlimError, match=f"eval.{next(iter(wrong))}"):
            Evaluation(**wrong)


@pytest.mark.parametrize(
    "path", sorted((ROOT / "slim" / "conf" / "eval").glob("*.yaml")), ids=lambda path: path.stem
)
def test_every_choice_can_be_made(path):
    if path.stem in ("classification", "similarity"):  # of encoders, on data of their own
        settings = compose("evaluate", [f"task={path.stem}"]).eval
        evaluation = instantiate(settings, _convert_="all")
        assert evaluation.has_quality and evaluation.has_speed
        return
    config = OmegaConf.load(path)
    if path.stem == "judged":
        config.judge.merge_with({"model": "name", "endpoint": "http://127.0.0.1:8000/v1"})
    evaluation = instantiate(config)
    assert isinstance(evaluation, Evaluation)
    assert evaluation.has_quality == evaluation.has_speed == (path.stem != "none")
    json.dumps([evaluation.quality_cache_key(), evaluation.speed_cache_key()])
    sizes = dict(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, vocab_size=8
    )
    evaluation.check(ModelSpec({**sizes, "max_position_embeddings": 512}))


def test_parts_can_be_left_out_on_the_command_line():
    config = OmegaConf.load(ROOT / "slim" / "conf" / "eval" / "quick.yaml")
    config.merge_with_dotlist(["speed=null", "tasks.names=[]", "perplexity.limit=2"])
    evaluation = instantiate(config)
    assert evaluation.speed is None and not evaluation.has_speed
    assert "tasks" not in evaluation.quality_cache_key()
    assert evaluation.perplexity.limit == 2


def test_importing_the_settings_is_cheap():
    code = (
        "import sys, slim.evaluation.evaluation, slim.evaluation.run;"
        "assert not {'torch', 'transformers', 'datasets', 'lm_eval', 'numpy', 'rich'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompts": ["The goat " * 40], "new_tokens": 8}, r"eval\.prompts\[0\] has \d+ tokens"),
        ({"prompts": ["The", "The goat " * 40]}, r"eval\.prompts\[1\] has \d+ tokens"),
        (
            {"speed": Speed(prompts=["The goat " * 40], new_tokens=8)},
            r"eval\.speed\.prompts\[0\] has \d+ tokens, and with 8 new ones",
        ),
    ],
)
def test_a_prompt_that_does_not_fit_is_refused(changes, message):
    tokenizer = load_tokenizer(ROOT / "slim" / "assets" / "tiny")
    with pytest.raises(SlimError, match=message):
        Evaluation(**changes).check_tokenizer(tokenizer, 64)


def test_a_prompt_that_just_fits_is_taken():
    tokenizer = load_tokenizer(ROOT / "slim" / "assets" / "tiny")
    length = len(tokenizer("The goat sleeps.")["input_ids"])
    Evaluation(prompts=["The goat sleeps."], new_tokens=8).check_tokenizer(tokenizer, length + 8)

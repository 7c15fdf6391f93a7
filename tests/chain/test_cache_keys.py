"""Results made before a renaming are still found: the settings that name them, as they were before
slim had packages."""

from __future__ import annotations

import hashlib
import json
from itertools import islice
from pathlib import Path

import pytest

from slim.chain.build import build_pipeline
from slim.chain.compose import CONF, compose
from slim.tiny_world import GENERATOR, World

RECORDED = json.loads((Path(__file__).parent / "cache_keys.json").read_text(encoding="utf-8"))
CHAINS = {  # plan of a chain -> names of its results, source first
    "pruner=taylor tuner=lora quant=awq": [
        "0e069633d0334521",
        "85aec2ac22ea1c42",
        "bb3ef9f13f13f5dc",
        "a6c9b7778489cfd7",
    ],
    "pruner=width_l1 quant=gptq quant.bits=3 quant.group_size=64": [
        "0e069633d0334521",
        "98e677bb823ef420",
        "f4543619e46eaf15",
    ],
    "pruner=wanda tuner=none quant=none": ["0e069633d0334521", "8e963b25729e64c5"],
    "pruner=none teacher=base quant=int8": [
        "0e069633d0334521",
        "d479e808ca9f391f",
        "9a2a73172e020f31",
    ],
}


def recorded(key: str):
    return RECORDED["keys"][key]


def as_json(value):
    """Return a cache key as it is hashed: tuples are lists, keys are texts."""
    return json.loads(json.dumps(value))


@pytest.mark.parametrize("name", RECORDED["configurations"])
def test_a_configuration_keeps_its_cache_keys(name):
    expected = RECORDED["configurations"][name]
    pipeline = build_pipeline(compose("compress", expected["overrides"]))
    stages = [[stage.kind, stage.version, stage.cache_key()] for stage in pipeline.stages]
    assert as_json(stages) == [recorded(key) for key in expected["stages"]]
    if "model" in expected:
        model = pipeline.model
        assert as_json([model.kind, model.version, model.cache_key()]) == recorded(
            expected["model"]
        )
    if "quality" in expected:
        assert as_json(pipeline.evaluation.quality_cache_key()) == recorded(expected["quality"])
        assert as_json(pipeline.evaluation.speed_cache_key()) == recorded(expected["speed"])


def test_every_choice_that_makes_a_stage_is_recorded():
    groups = ("pruner", "quantizer", "tuner", "teacher", "data", "calibration", "student_init")
    choices = set()
    for group in groups:  # files that begin with "_" are what others are made of
        choices |= {f"{group}/{path.stem}" for path in (CONF / group).glob("[!_]*.yaml")}
    # choices that came after the recording have no results from before it
    added_later = {
        "quantizer/gguf",
        "pruner/block_influence",
        "tuner/encoder",
        "calibration/labelled",
    }
    added_later |= {"data/headlines", "data/labelled", "data/documents"}
    added_later |= {"data/made_pairs", "data/scored", "teacher/encoder"}
    added_later.add("tuner/scales")
    added_later |= {"pruner/external"}
    tools = ("autoawq", "autogptq", "autoround", "external", "gptqmodel", "llmcompressor")
    added_later |= {f"quantizer/{name}" for name in tools}
    added_later |= {"pruner/mlp_channels"}
    assert choices - added_later <= set(RECORDED["configurations"])


@pytest.mark.parametrize("overrides", CHAINS)
def test_a_chain_keeps_the_names_of_its_results(overrides):
    plan = build_pipeline(compose("compress", overrides.split())).plan()
    assert [step.digest for step in plan] == CHAINS[overrides]


def test_the_generator_writes_what_its_name_says():
    samples = {}
    for split in ("train", "calibration", "heldout"):
        text = hashlib.sha256()
        for document in islice(World(0).documents(split, 0), 200):
            text.update(document.encode())
        samples[split] = text.hexdigest()
    assert GENERATOR == "6029442868bfc30dd146bbf02f78c30a23624b174cbdee00b27542385f5f95ee"
    assert samples == {
        "train": "da7dc39f68578d79e48e8ad4f756fa705d195b48e529058b2c3ecb9d428d5451",
        "calibration": "a7c22d41dd015571cf870987da25537a6843e0808c7e3a43c0c3bfaf2b641b5b",
        "heldout": "1f81a2ef34b84eb18a6978d6ac21f20ef7742c3ca6725486e8e35438b8dff345",
    }

"""The tools themselves, in their environments. They take minutes and a network, or environments that
are there (SLIM_ENVIRONMENTS=FOLDER):

    pytest -m engines tests/backends
"""

from __future__ import annotations

import os

import pytest

from slim.backends.making import make, problems
from slim.backends.quantizers import AutoAWQ, AutoRound, GPTQModel, LLMCompressor
from slim.backends.tools import TOOLS
from slim.checkpoints.checkpoint import open_checkpoint
from slim.data.calibration import Calibration
from slim.loading.check_result import check_result
from tests.backends.test_making import environment
from tests.support.stages import run

pytestmark = [pytest.mark.engines, pytest.mark.timeout(3000)]
STAGES = {
    "autoawq": (AutoAWQ, {}),
    "gptqmodel": (GPTQModel, {"symmetric": True}),
    "gptqmodel with zero points": (GPTQModel, {}),
    "llmcompressor gptq": (LLMCompressor, {"modifier": "gptq"}),
    "llmcompressor awq": (LLMCompressor, {"modifier": "awq"}),
    "llmcompressor rtn": (LLMCompressor, {"modifier": "rtn"}),
    "autoround": (AutoRound, {"symmetric": True, "steps": 4}),
    "autoround with zero points": (AutoRound, {"steps": 4}),
    "autoround as gptq": (AutoRound, {"symmetric": True, "steps": 4, "format": "auto_gptq"}),
}


@pytest.fixture(scope="module")
def environments(tmp_path_factory) -> str:
    """Folder of environments: the one that is named, else a fresh one."""
    return os.environ.get("SLIM_ENVIRONMENTS") or str(tmp_path_factory.mktemp("environments"))


@pytest.mark.parametrize("name", STAGES)
def test_a_tool_quantizes_and_slim_reads_the_result(name, ref_llama, environments, tmp_path):
    make_stage, settings = STAGES[name]
    calibration = Calibration("tiny:calibration", samples=4, length=128)
    stage = make_stage(calibration=calibration, environments=environments, **settings)
    facts = run(stage, ref_llama, tmp_path / "result")
    check_result(tmp_path / "result")
    result = open_checkpoint(tmp_path / "result")
    assert result.spec.parameters() == open_checkpoint(ref_llama).spec.parameters()
    assert 4 < facts["bits_per_weight"] < 4.6


@pytest.mark.parametrize("name", TOOLS)
def test_an_environment_holds_what_is_pinned_and_imports(name, environments):
    made = TOOLS[name].environment(environments)
    make(made)
    assert problems(made) == []


def test_without_a_network_nothing_is_left(tmp_path, monkeypatch):
    from slim.core.errors import SlimError

    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")  # nobody listens there
    for name in ("PIP_FIND_LINKS", "PIP_EXTRA_INDEX_URL"):
        monkeypatch.delenv(name, raising=False)
    lonely = environment(tmp_path, "nobody==1.0")
    with pytest.raises(SlimError, match="no package index answers"):
        make(lonely)
    assert not lonely.folder.exists()


def test_a_pin_that_does_not_exist_is_named(tmp_path):
    from slim.core.errors import SlimError

    broken = environment(tmp_path, "safetensors==0.0.0.99")
    with pytest.raises(SlimError, match="there is no safetensors==0.0.0.99"):
        make(broken)
    assert not broken.folder.exists()

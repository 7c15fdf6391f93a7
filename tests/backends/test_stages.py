"""Other programs as stages: what they are asked, what becomes of their results, and what if they
fail. The program is a few lines in an environment without packages; tests/backends/test_tools.py
has the real ones."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from hydra.errors import InstantiationException

from slim.backends.stage import both_spellings
from slim.backends.tools import WORKERS
from slim.chain.build import build_pipeline
from slim.chain.compose import compose
from slim.chain.pipeline import Pipeline
from slim.checkpoints.checkpoint import open_checkpoint
from slim.checkpoints.source import Source
from slim.checkpoints.store import Store
from slim.core.errors import SlimError
from slim.data.calibration import Calibration
from tests.support.stages import run
from tests.support.tools import BEGIN, COPIES, quantizer, stage, worker


@pytest.fixture(scope="module")
def environments(tmp_path_factory):
    """Folder of environments, shared: the one without packages is made once."""
    return tmp_path_factory.mktemp("environments")


@pytest.fixture(scope="module")
def copied(tmp_path_factory, environments, small_llama):
    """The result of a worker that copies, and its facts."""
    folder = tmp_path_factory.mktemp("copied")
    calibration = Calibration("tiny:calibration", samples=4, length=16)
    copies = stage(
        worker(folder, COPIES), environments, calibration=calibration,
        settings_for_worker={"ratio": 0.5},
    )  # fmt: skip
    return folder / "result", run(copies, small_llama, folder / "result")


def test_the_result_is_a_checkpoint(copied, small_llama):
    result, _ = copied
    assert (
        open_checkpoint(result).spec.parameters() == open_checkpoint(small_llama).spec.parameters()
    )
    assert (result / "tokenizer.json").read_bytes() == (small_llama / "tokenizer.json").read_bytes()


def test_nothing_else_is_left_in_it(copied):
    result, _ = copied
    assert not [path.name for path in result.iterdir() if path.name.startswith(".")]


def test_the_tokens_are_those_of_slims_own_methods(copied, small_llama):
    _, facts = copied
    calibration = Calibration("tiny:calibration", samples=4, length=16)
    tokens = calibration.tokens_for(open_checkpoint(small_llama))
    assert facts["tokens"] == [[4, 16], int(tokens.sum()), tokens.flatten()[:5].tolist()]


def test_its_log_and_what_else_it_wrote_are_in_the_report(copied):
    result, _ = copied
    log = (result / "report" / "log.txt").read_text()
    assert "a library says hello" in log
    assert "a warning" in log
    assert "event" not in log
    assert (result / "report" / "recipe.txt").read_text() == "copied"


def test_time_and_memory_are_measured(copied):
    _, facts = copied
    assert facts["worker_seconds"] > 0
    assert facts["tool_seconds"] == 1.5
    if sys.platform == "linux":
        assert 2**20 < facts["worker_bytes"] < 2**28


def test_settings_and_notes_get_through(copied):
    _, facts = copied
    assert facts["settings"] == {"ratio": 0.5}
    assert facts["contract"] == 1
    assert facts["notes"] == ["a copy is no smaller"]


def test_it_sees_nothing_of_slims_packages(copied):
    _, facts = copied
    own = [path for path in sys.path if "site-packages" in path]
    assert not set(own) & set(facts["path"])
    assert "PYTHONPATH" not in facts["variables"]


def test_folders_that_libraries_write_to_are_within_the_target(copied):
    _, facts = copied
    for name in ("HOME", "TMPDIR", "HF_HOME", "XDG_CACHE_HOME"):
        assert facts["variables"][name] == facts["folder"]


FAULTS = {
    "fails": ("raise ValueError('no such layer')", "exit code 1.*no such layer"),
    "killed": ("import signal; os.kill(os.getpid(), signal.SIGKILL)", "killed .SIGKILL"),
    "nonsense": ("say('progress', what='blocks', done='many', total=3)", "answered nonsense"),
    "unfinished": ("copy(); print('bye')", "without saying that it is done"),
    "gives up": ("say('error', message='the moon is full')", "the moon is full"),
    "writes nothing": ("say('done')", "wrote no weights"),
    "pickles": (
        "open(request['target'] + '/model.bin', 'w').close(); say('done')",
        "only pickled weights",
    ),
    "no config": (
        "copy(); os.remove(request['target'] + '/config.json'); say('done')",
        "wrote no config.json",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_one_clear_error(fault, small_llama, tmp_path, environments):
    does, expected = FAULTS[fault]
    broken = stage(worker(tmp_path, f"{BEGIN}\nprint('working')\n{does}\n"), environments)
    with pytest.raises(SlimError, match=f"(?s){expected}") as caught:
        run(broken, small_llama, tmp_path / "result")
    assert "external-failed.log" in str(caught.value)


def test_a_worker_that_says_nothing_is_stopped_with_its_children(
    small_llama, tmp_path, environments
):
    hangs = (
        "import subprocess\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        f"open({str(tmp_path / 'child')!r}, 'w').write(str(child.pid))\n"
        "time.sleep(60)"
    )
    silent = stage(worker(tmp_path, BEGIN + hangs), environments, silence=1)
    with pytest.raises(SlimError, match="said nothing for 1 s and was stopped"):
        run(silent, small_llama, tmp_path / "result")
    child = int((tmp_path / "child").read_text())
    state = subprocess.run(["ps", "-o", "stat=", "-p", str(child)], capture_output=True, text=True)
    assert state.stdout.strip()[:1] in ("", "Z")


def chain(stages, source, root) -> Pipeline:
    return Pipeline(Source(str(source)), stages, None, Store(root))


def test_a_full_disk_leaves_nothing(small_llama, tmp_path, environments):
    full = "copy(); print('OSError: No space left on device', file=sys.stderr); sys.exit(1)"
    broken = stage(worker(tmp_path, BEGIN + full), environments)
    with pytest.raises(SlimError, match="The disk is full"):
        chain([broken], small_llama, tmp_path / "store").run()
    assert not list((tmp_path / "store" / "stages").glob("*/"))


def test_a_worker_that_fails_leaves_nothing_of_a_chain(small_llama, tmp_path, environments):
    broken = stage(worker(tmp_path, BEGIN + "copy(); sys.exit(3)"), environments)
    with pytest.raises(SlimError, match="exit code 3"):
        chain([broken], small_llama, tmp_path / "store").run()
    assert not list((tmp_path / "store" / "stages").glob("*/"))


def test_results_are_ordinary_results(small_llama, tmp_path, environments):
    # of a pruner and a quantizer of one's own, the second run of both is found in the cache
    stages = [
        stage(worker(tmp_path, COPIES), environments, name="first"),
        quantizer(worker(tmp_path, COPIES, "second.py"), environments, name="second"),
    ]
    results = chain(stages, small_llama, tmp_path / "store").run()
    assert [result.label for result in results[1:]] == ["prune first", "quantize second"]
    again = chain(stages, small_llama, tmp_path / "store").run()
    assert [result.cached for result in again] == [True, True, True]
    assert again[2].metadata["tool_seconds"] == 1.5


def test_a_changed_worker_is_another_result(tmp_path, environments):
    file = worker(tmp_path, COPIES)
    before = stage(file, environments).cache_key()
    worker(tmp_path, COPIES + "\n# changed\n")
    assert stage(file, environments).cache_key() != before


def test_an_environment_that_cannot_be_made_is_said_before_any_work(small_llama, tmp_path):
    # there is no such Python: the pruner in front of it must not run first
    first = stage(worker(tmp_path, COPIES), tmp_path / "environments", name="first")
    second = quantizer(
        worker(tmp_path, COPIES, "second.py"), tmp_path / "environments", name="second",
        python="3.99",
    )  # fmt: skip
    with pytest.raises(SlimError, match="needs Python 3.99"):
        chain([first, second], small_llama, tmp_path / "store").run()
    assert not list((tmp_path / "store").glob("stages/*/"))


def test_what_a_stage_lacks_is_told_before(tmp_path, environments):
    fresh = stage(worker(tmp_path, COPIES), tmp_path / "other", packages=["nobody==1.0"])
    assert "to be fetched, of unknown size: nobody==1.0" in fresh.to_fetch()


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"packages": ["nobody"]}, "not pinned"),
        ({"packages": ["nobody>=1"]}, "not pinned"),
        ({"name": "My Tool"}, "small letters"),
        ({"silence": 0}, "silence"),
    ],
)
def test_mistakes_are_said(settings, expected, tmp_path):
    with pytest.raises(SlimError, match=expected):
        stage(worker(tmp_path, COPIES), tmp_path, **settings)


def test_a_worker_must_be_there(tmp_path):
    with pytest.raises(SlimError, match="pruner.worker_file=.*must be a Python script"):
        stage(tmp_path / "none.py", tmp_path)


def test_autogptq_refuses_a_cpu_before_any_work():
    pipeline = build_pipeline(compose("compress", ["pruner=none", "quant=autogptq", "device=cpu"]))
    with pytest.raises(SlimError, match="quantizes on CUDA only.*\n.*quant=gptqmodel"):
        pipeline.plan()


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["quant=autoawq", "quant.bits=3"], "quant.bits=3: must be one of 4"),
        (["quant=autoawq", "quant.group_size=100"], "must be one of 32, 64, 128"),
        (["quant=llmcompressor", "quant.modifier=hqq"], "must be one of gptq, awq, rtn"),
        (["quant=autoround", "quant.format=gguf"], "must be one of auto_round, auto_gptq"),
        (["quant=gptqmodel", "quant.damp_percent=2"], "quant.damp_percent=2"),
    ],
)
def test_settings_that_a_tool_does_not_have(overrides, expected):
    # Hydra wraps what a class raises
    with pytest.raises(InstantiationException, match=expected):
        build_pipeline(compose("compress", ["pruner=none", *overrides]))


@pytest.mark.parametrize("name", ["autoawq", "autoround", "gptqmodel", "llmcompressor"])
def test_a_tool_is_planned_with_its_size_and_its_pins(name):
    pipeline = build_pipeline(compose("compress", ["pruner=none", f"quant={name}", "device=cpu"]))
    step = pipeline.plan()[-1]
    assert step.spec.quantization is not None
    assert step.stage.cache_key()["tool"].split()[1] == step.stage.tool.version
    assert len(step.stage.cache_key()["pins"]) == 16


def test_both_spellings_of_rotary_angles_and_type():
    plain = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e5}, "dtype": "bfloat16"}
    old = both_spellings(plain)
    assert old["rope_theta"] == 1e5
    assert old["torch_dtype"] == "bfloat16"
    assert "rope_scaling" not in old
    scaled = {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}
    assert both_spellings(scaled)["rope_scaling"] == {"rope_type": "linear", "factor": 2.0}


CONTRACT = """
import contract, os
request = contract.read_request()
print("a library prints")
os.write(1, b"and so does C")
contract.progress("blocks", 1, 2)
contract.facts(threads=1)
contract.done()
"""


def test_the_contract_of_slims_workers_keeps_answers_apart(tmp_path):
    file = worker(tmp_path, CONTRACT)
    (tmp_path / "request.json").write_text("{}")
    process = subprocess.Popen(
        [sys.executable, str(file), str(tmp_path / "request.json")], text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env={"PYTHONPATH": str(WORKERS)},
    )  # fmt: skip
    process.wait(20)
    out, log = process.stdout.read(), process.stderr.read()
    assert [json.loads(line)["event"] for line in out.splitlines()] == ["progress", "facts", "done"]
    assert "a library prints" in log
    assert "and so does C" in log


def test_slims_workers_end_when_slim_does(tmp_path):
    file = worker(tmp_path, "import contract, time\ncontract.done()\ntime.sleep(60)\n")
    process = subprocess.Popen(
        [sys.executable, str(file)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        env={"PYTHONPATH": str(WORKERS)},
    )  # fmt: skip
    process.stdout.readline()
    process.stdin.close()
    assert process.wait(20) == 1

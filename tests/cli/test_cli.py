"""The command line: the ``quant`` alias, short errors with exit code 2, answers within a second,
help."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys

import pytest

from slim.chain.compose import compose, expand_alias
from slim.chain.explain import explain
from slim.cli.help import help_page
from slim.cli.launch import sweep_flag_first
from tests.conftest import ROOT


def run(*arguments: str, script: str = "compress.py", cwd=None) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / script), *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, cwd=cwd or ROOT, timeout=120, env=os.environ
    )


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("quant=awq", "quantizer=awq"),
        ("quant.bits=2,3", "quantizer.bits=2,3"),
        ("+quant.bits=3", "+quantizer.bits=3"),
        ("++quant.bits=3", "++quantizer.bits=3"),
        ("~quant", "~quantizer"),
        ("quantizer=rtn", "quantizer=rtn"),
        ("quantile=3", "quantile=3"),
        ("model.source=quant=1", "model.source=quant=1"),
        ("-m", "-m"),
    ],
)
def test_quant_is_short_for_quantizer(typed, meant):
    assert expand_alias([typed]) == [meant]


@pytest.mark.parametrize("flag", ["-m", "--multirun"])
def test_the_flag_of_a_sweep_may_stand_anywhere(flag):
    settings = ["model=tiny", "quantizer.bits=3,4", "--config-dir", "folder"]
    for place in range(3):
        typed = [*settings[:place], flag, *settings[place:]]
        assert sweep_flag_first(typed) == [flag, *settings]
    assert sweep_flag_first(settings) == settings


def test_the_compose_api_takes_the_alias_too():
    config = compose("compress", ["quant=rtn", "quant.bits=3"])
    assert config.quantizer._target_.endswith("RTN")
    assert config.quantizer.bits == 3


def test_defaults_are_those_of_the_readme():
    from hydra.core.hydra_config import HydraConfig  # noqa: F401

    config = compose("compress")
    assert config.model.source == "tiny"
    assert config.pruner._target_.endswith("Taylor")
    assert config.quantizer._target_.endswith("AWQ")
    assert not config.tuner and not config.teacher


@pytest.mark.parametrize(
    ("choice", "source"),
    [
        ("mistral7b", "mistralai/Mistral-7B-Instruct-v0.2"),
        ("llama2_7b", "meta-llama/Llama-2-7b-chat-hf"),
        ("llama3_8b", "meta-llama/Meta-Llama-3-8B-Instruct"),
        ("tinyllama", "TinyLlama/TinyLlama-1.1B-Chat-v1.0"),
        ("qwen2_5_0_5b", "Qwen/Qwen2.5-0.5B-Instruct"),
    ],
)
def test_the_models_of_the_studies(choice, source):
    config = compose("compress", [f"model={choice}"])
    assert config.model.source == source
    assert config.calibration.text == "Salesforce/wikitext"
    assert (
        compose("compress", [f"model={choice}", "calibration=tiny"]).calibration.text
        == "tiny:calibration"
    )


def test_a_python_without_the_packages_is_named():
    script = [sys.executable, "-S", str(ROOT / "compress.py"), "model=tiny"]  # -S: none installed
    result = subprocess.run(script, capture_output=True, text=True)
    assert result.returncode == 2
    assert "has no package 'omegaconf'. Activate the environment" in result.stderr
    assert "Traceback" not in result.stderr


WRONG = [
    (["bits=3"], r"no group or setting 'bits'.*Did you mean quant.bits\?"),
    (["model=/a/b.gguf"], r"model=/a/b.gguf: must be one of .*\n.*model=hf model.source=/a/b.gguf"),
    (["prunner=taylor"], r"no group or setting 'prunner'.*Did you mean pruner"),
    (["pruner=tailor"], r"pruner=tailor: must be one of .*taylor.*Did you mean taylor"),
    (["quant=nope"], r"quantizer=nope: must be one of .*awq"),
    (["quant.bitz=4"], r"quantizer has no setting 'bitz'. It has: .*bits.*Did you mean bits"),
    (["pruner=none", "pruner.blocks=2"], r"pruner has no settings"),
    (["quant.bits=5"], r"quant\.bits=5: must be one of .*4"),
    (["quant.bits=four"], r"quant\.bits=four: must be"),
    (["quant.group_size=96"], r"group_size=96"),
    (["quant.group_size=256"], r"256.*(128|64|32)"),
    (["pruner.blocks=99"], r"blocks=99"),
    (["pruner.blocks=0"], r"blocks=0"),
    (["model=hf"], r"model\.source is missing"),
    (["model=hf", "model.source=/not/there"], r"There is no folder or file /not/there"),
    (["device=gpu"], r"device=gpu: must be one of auto, cpu, cuda"),
    (["calibration.text=/not/there.txt"], r"no text /not/there.txt"),
    (["calibration.samples=0"], r"calibration\.samples=0"),
    (["eval.tasks.names=[tiny_fact]"], r"tiny_fact.*tiny_facts"),
    (["budget.memory_gb=4"], r"Choose one with hparams_search="),
    (["model.source=/x/epoch=3-step=100"], r"""Type 'model\.source="/x/epoch=3-step=100"'"""),
    (["quant.bits=3,4"], r"several values\. Add -m.*\n.*a list is quantizer\.bits=\[3,4\]"),
    (["tuner=lora,full"], r"tuner=lora,full are several choices\. Add -m"),
    (["quant.bits=choice(3,4)"], r"add -m to the command"),
    (["seed=abc"], r"seed=abc: must be a whole number"),
    (["seed=-1"], r"seed=-1: must be a whole number"),
    (["tuner=lora", "tuner.lr=1e-4"], r"no setting 'lr'.*Did you mean learning_rate\?"),
    (["tuner=lora", "tuner.rank=8"], r"no setting 'rank'.*Did you mean r\?"),
    (["=3"], r"'=3' names no setting"),
    (["quant.bits="], r"."),
    (["quant.bits"], r"."),
]


@pytest.mark.parametrize(
    ("arguments", "message"), WRONG, ids=[" ".join(arguments) for arguments, _ in WRONG]
)
def test_a_mistake_is_answered_in_one_or_two_lines(tmp_path, arguments, message):
    result = run(*arguments, f"store={tmp_path / 'runs'}", cwd=tmp_path)
    assert result.returncode == 2, result.stderr
    assert result.stdout == ""
    assert len(result.stderr.strip().splitlines()) <= 2, result.stderr
    assert "Traceback" not in result.stderr
    assert re.search(message, result.stderr), result.stderr
    assert list(tmp_path.iterdir()) == [], "a mistake must leave nothing behind"


@pytest.mark.parametrize("store", ["", "null", "file.txt", "file.txt/runs"])
@pytest.mark.parametrize("sweep", [[], ["-m", "quant.bits=3,4"]], ids=["run", "sweep"])
def test_a_store_that_is_no_folder_is_refused(tmp_path, store, sweep):
    file = tmp_path / "file.txt"
    file.write_text("kept")
    result = run("model=tiny", *sweep, f"store={store}", cwd=tmp_path)
    assert result.returncode == 2, result.stderr
    assert re.search(rf"store={re.escape(store)}: .*Give store=FOLDER", result.stderr)
    assert len(result.stderr.strip().splitlines()) <= 2, result.stderr
    assert list(tmp_path.iterdir()) == [file]
    assert file.read_text() == "kept"


@pytest.mark.parametrize(
    "value",
    [
        "/x/epoch=3-step=100",
        "/x/a(b)",
        "/x/it's",
        "/x/a{b",
        "/x/a[1]",
        "/x/a#b",
        "/x/ü%&;",
        "/x/a,b",
    ],
)
def test_what_a_value_with_special_characters_must_be_typed_as(value):
    with pytest.raises(Exception) as refused:
        compose("compress", [f"model.source={value}"])
    message = explain(refused.value, "compress", [])
    typed = shlex.split(message[message.index("'model.source=") :])[0]
    assert compose("compress", [typed]).model.source == value


def test_a_stream_in_ascii_shows_the_plan_of_a_folder_with_accents(tmp_path, monkeypatch):
    shutil.copytree(ROOT / "slim" / "assets" / "tiny", tmp_path / "modèle 量化")
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    typed = f"model.source='{tmp_path / 'modèle 量化'}'"
    result = run("model=hf", typed, "texts=tiny", "quant=rtn", "plan=true", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert r"mod\xe8le" in result.stdout


def processor_seconds(*arguments: str) -> float:
    """Return the processor time of a command, which does not depend on what else is running."""
    before = os.times()
    run(*arguments)
    after = os.times()
    return (
        after.children_user + after.children_system - before.children_user - before.children_system
    )


@pytest.mark.parametrize(
    "arguments", [["--help"], ["quant.bits=5"], ["quant.group_size=256"], ["pruner=tailor"]]
)
def test_help_and_mistakes_answer_at_once(arguments):
    # 0.7 s; the bound leaves room for a slower processor and still excludes importing torch and
    # transformers
    assert min(processor_seconds(*arguments) for _ in range(2)) < 1.8


def test_a_mistake_does_not_import_torch(tmp_path):
    code = (
        "import sys; sys.argv = ['compress.py', 'quant.bits=5']\n"
        "import runpy\n"
        "try: runpy.run_path('compress.py', run_name='__main__')\n"
        "except SystemExit: pass\n"
        "print([name for name in ('torch', 'transformers', 'mlflow', 'datasets', 'lm_eval') if name in sys.modules])"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=60
    )
    assert result.stdout.strip() == "[]", result.stderr


def test_help_lists_the_groups():
    result = run("--help")
    assert result.returncode == 0
    for group in (
        "model",
        "pruner",
        "quantizer",
        "tuner",
        "teacher",
        "eval",
        "data",
        "calibration",
        "trainer",
    ):
        assert re.search(rf"^{group}:", result.stdout, re.MULTILINE), group
    # files that choices build on are no choices themselves
    assert not re.search(r"^[\w/]+:.*\b_", result.stdout.split("== Config ==")[0], re.MULTILINE)


@pytest.mark.parametrize("command", ["compress", "train", "evaluate"])
def test_help_shows_users_first_what_they_need(command):
    page = help_page(command, ["--help"])
    choices = page[: page.index("Settings, with")]
    assert choices.index("model:") < choices.index("pruner:") < choices.index("eval:")
    for helper in ("texts:", "sizes:", "chain:", "hub", "tiny/", "_base", "_target_"):
        assert helper not in choices
    assert "_target_" not in page
    assert max(map(len, choices.splitlines())) <= 80


def test_help_shows_the_settings_of_what_is_chosen():
    page = help_page("compress", ["pruner=wanda", "--help"])
    assert "pruner:\n  sparsity: null" in page


def test_help_that_is_cut_leaves_no_traceback():
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "compress.py"), "--help"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=ROOT,
    )
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait(60) == 0


@pytest.mark.parametrize("script", ["compress.py", "train.py", "evaluate.py"])
def test_the_plan_prints_what_would_run_and_does_nothing(tmp_path, script):
    result = run("plan=true", script=script, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "nothing has been run" in result.stdout
    assert "Disk and memory suffice." in result.stdout
    assert "Time: about" in result.stdout
    expected = {
        "compress.py": ["prune taylor", "quantize awq"],
        "train.py": ["tune lora"],
        "evaluate.py": [],
    }[script]
    assert all(
        re.search(rf"{stage}.*to be made.* [\d,]+ .*[MG]B", result.stdout) for stage in expected
    ), result.stdout
    assert list(tmp_path.iterdir()) == []


def test_an_existing_output_is_refused_before_work(tmp_path):
    result = run(f"output={tmp_path}", f"store={tmp_path / 'runs'}")
    assert result.returncode == 2
    assert "exists already" in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_every_choice_of_every_group_composes():
    for path in sorted((ROOT / "slim" / "conf").glob("*/*.yaml")):
        group, choice = path.parent.name, path.stem
        config = compose("compress", [f"{group}={choice}"])
        assert group in config or group in ("experiment", "hparams_search")


def test_the_plan_says_how_much_memory_is_missing(tmp_path):
    options = ["plan=true", "pruner.samples=100000", "pruner.length=512"]
    result = run(*options, f"store={tmp_path / 'runs'}", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert re.search(
        r"This would not fit: 'prune taylor' needs about [\d.]+ GB of memory.*GB are missing",
        " ".join(result.stdout.split()),
    ), result.stdout

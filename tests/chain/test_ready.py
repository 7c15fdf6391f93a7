"""What a chain needs besides its model is asked for before work begins."""

from __future__ import annotations

import http.server
import shutil
import threading

import pytest

from slim.chain.build import build_pipeline
from slim.chain.compose import compose
from slim.chain.explain import check_form, explain
from slim.checkpoints.source import EMBEDDED
from slim.core import hub
from slim.core.errors import SlimError
from slim.core.io import write_json
from slim.data import ready
from slim.data.text import Text
from slim.report.plan import show_plan
from slim.tracking.connection import server_problem


def problem(*overrides: str) -> str | None:
    """Return what a chain on the embedded model lacks."""
    pipeline = build_pipeline(compose("compress", ["pruner=none", *overrides]))
    return pipeline.text_problem(pipeline.plan())


def test_the_embedded_texts_are_there(tmp_path):
    assert problem("quant=gptq", f"store={tmp_path}") is None


def test_a_data_set_of_the_hub_is_named_with_what_to_type(tmp_path):
    text = problem("quant=gptq", "eval=wikitext2", "calibration=wikitext2", f"store={tmp_path}")
    reason, advice = text.split("\n")
    assert reason.startswith("Data of the hub are needed: Salesforce/wikitext, and the hub cannot")
    assert "calibration.text=FILE.txt eval.perplexity.text=FILE.txt" in advice
    assert advice.endswith("For a trial: calibration=tiny eval=quick")


def test_stock_tasks_and_training_data_are_asked_for(tmp_path):
    overrides = ("quant=none", "tuner=lora", "data=alpaca_cleaned", "eval.tasks.names=[piqa]")
    text = problem(*overrides, f"store={tmp_path}")
    assert "yahma/alpaca-cleaned" in text and "piqa" in text
    assert "data=text data.text=FILE.txt eval.local_data=FOLDER" in text


def test_what_is_measured_already_needs_no_text(tmp_path):
    pipeline = build_pipeline(
        compose("compress", ["pruner=none", "quant=none", "eval=wikitext2", f"store={tmp_path}"])
    )
    (step,) = steps = pipeline.plan()
    assert pipeline.text_problem(steps) is not None
    file = pipeline._quality_file(step.digest, step.spec)
    file.parent.mkdir(parents=True)
    write_json(file, {})
    assert pipeline.text_problem(steps) is None


def test_a_result_that_is_there_needs_no_calibration_text(tmp_path):
    overrides = ("quant=gptq", "calibration=wikitext2", "eval=none", f"store={tmp_path}")
    pipeline = build_pipeline(compose("compress", ["pruner=none", *overrides]))
    folder = pipeline.plan()[-1].folder
    assert pipeline.text_problem(pipeline.plan()) is not None
    shutil.copytree(EMBEDDED["tiny"], folder)
    steps = pipeline.plan()
    assert steps[-1].cached
    assert pipeline.text_problem(steps) is None


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("rows.jsonl", '{"body": "x"}\n', "Set calibration.column=... to one of them."),
        ("empty.txt", "", "empty.txt is empty. Give another text."),
        ("rows.jsonl", "\n", "rows.jsonl is empty. Give another text."),
        ("short.txt", "a few words", "has 11 bytes, too few for one window of 256 tokens"),
        ("folder/notes.md", "x", "cannot be loaded as a data set"),
        ("latin.txt", "\udce9" * 900, "is not UTF-8"),
    ],
)
def test_a_local_text_that_cannot_be_used(tmp_path, name, content, message):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(content, errors="surrogateescape")
    text = tmp_path / name.split("/")[0]
    assert message in problem("quant=gptq", f"calibration.text={text}", f"store={tmp_path / 's'}")


def test_columns_of_training_data(tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text('{"question": "x", "answer": "y"}\n')
    overrides = ("quant=none", "tuner=lora", "data=jsonl", f"data.text={path}")
    text = problem(*overrides, f"store={tmp_path}")
    assert "has no column 'prompt' (has: question, answer). Set data.prompt=..." in text


def test_what_is_in_the_cache_is_not_asked_for(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path))
    assert "hub cannot be reached" in ready.missing_dataset("org/SomeText")
    (tmp_path / "org___some_text").mkdir()
    assert ready.missing_dataset("org/SomeText") is None


def test_a_hub_that_does_not_answer_is_asked_once(monkeypatch, capsys):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    hub.hub_problem.cache_clear()
    try:
        assert hub.hub_problem().startswith("the hub cannot be reached (127.0.0.1:9: ")
        assert constants.HF_HUB_OFFLINE is True  # for what the libraries ask for next
    finally:
        hub.hub_problem.cache_clear()
        import datasets

        datasets.config.HF_HUB_OFFLINE = True


def test_the_plan_says_what_is_missing(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    options = ["pruner=none", "quant=none", "eval=wikitext2", f"store={tmp_path}"]
    pipeline = build_pipeline(compose("compress", options))
    show_plan(pipeline, pipeline.plan(), "http://127.0.0.1:9")
    out = capsys.readouterr().out
    assert "This would not run: Data of the hub are needed: Salesforce/wikitext" in out
    assert "This would not run: The tracking server http://127.0.0.1:9 does not answer" in out


@pytest.mark.parametrize("columns", [80, 100, 200])
def test_the_plan_fits_a_terminal_and_cuts_nothing(tmp_path, capsys, monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    options = ["tuner=lora", "teacher=base", "quant=gptq", f"store={tmp_path}"]
    pipeline = build_pipeline(compose("compress", options))
    steps = pipeline.plan()
    show_plan(pipeline, steps, None)
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= columns
    assert "…" not in out
    letters = out.replace("\n", "").replace(" ", "")
    for step in steps:
        assert step.label.replace(" ", "") in letters


def test_a_server_that_answers_is_no_problem():
    server = http.server.HTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler)
    thread = threading.Thread(target=server.handle_request, daemon=True)
    thread.start()
    try:
        assert server_problem(f"http://127.0.0.1:{server.server_port}/") is None
    finally:
        server.server_close()
    for uri in (None, "sqlite:////x/mlflow.db", "databricks"):
        assert server_problem(uri) is None


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        ("--plan", "Settings are typed without dashes: plan=true"),
        ("--quant=awq", "Settings are typed without dashes: quant=awq"),
        ("--quant.bits=3", "Settings are typed without dashes: quant.bits=3"),
        ("--gpu", "There is no option --gpu. Settings are typed as group.setting=value"),
    ],
)
def test_settings_with_dashes(typed, message):
    with pytest.raises(SlimError) as error:
        check_form(["model=tiny", typed])
    assert str(error.value).startswith(message)


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        ("pruner=null", "pruner=null: must be the name of a choice. Use pruner=none, or one of"),
        ("quantizer=~", "quant=~: must be the name of a choice. Use quant=none, or one of"),
        ("model=5", "model=5: must be the name of a choice. Use one of those that --help lists"),
        ("eval=true", "eval=true: must be the name of a choice. Use one of those that --help"),
        ("tracking=null", "tracking=null: tracking has settings of its own, such as tracking.uri"),
    ],
)
def test_groups_take_names(typed, message):
    with pytest.raises(SlimError) as error:
        check_form(["seed=1", typed])
    assert str(error.value).startswith(message)


@pytest.mark.parametrize("typed", ["pruner=none", "quantizer=awq,gptq", "eval=[a,b]", "model="])
def test_names_of_choices_pass(typed):
    check_form([typed])


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        ("plan", "'plan' sets nothing. Type it as plan=true"),
        ("quantizer", "'quant' sets nothing. Type it as quant=gptq"),
        ("teacher", "'teacher' sets nothing. Type it as teacher=CHOICE"),
        ("something", "'something' sets nothing. Type it as group.setting=value"),
    ],
)
def test_a_name_without_a_value(typed, message):
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import OverrideParseException

    with pytest.raises(OverrideParseException) as error:
        OverridesParser.create().parse_overrides([typed])
    assert explain(error.value, "compress", [typed]) == message


def test_the_text_of_a_setting_is_named():
    assert Text("tiny:heldout").setting("column") == "column"
    evaluation = build_pipeline(compose("compress", [])).evaluation
    assert evaluation.perplexity.setting("column") == "eval.perplexity.column"

"""The guides in docs/extending: what they have people type is typed here, and it works."""

from __future__ import annotations

import importlib
import inspect
import sys
from pathlib import Path

import pytest
from hydra.errors import ConfigCompositionException

from slim.chain.build import build_pipeline
from slim.chain.compose import compose, config_dirs
from slim.chain.explain import explain
from slim.chain.pipeline import Pipeline
from slim.checkpoints.checkpoint import open_checkpoint
from slim.checkpoints.result import Result
from slim.cli.help import help_page
from slim.core.io import read_json
from slim.distillation import losses
from slim.evaluation import metrics
from slim.models import families
from slim.report.table import markdown_table
from slim.search.metrics import offered
from tests.conftest import ROOT, build_small
from tests.models import test_families
from tests.support.pages import commands, fences, files


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A folder of one's own, from which modules can be imported."""
    folder = tmp_path / "my_project"
    folder.mkdir()
    monkeypatch.syspath_prepend(folder)
    known = set(sys.modules)
    yield folder
    for name in set(sys.modules) - known:
        module = sys.modules[name]
        if str(folder) in str(getattr(module, "__file__", "")):
            del sys.modules[name]


def type_in(page: str, project: Path) -> str:
    """Write the files of a page into the project; return the page."""
    text = (ROOT / page).read_text(encoding="utf-8")
    for name, content in files(text).items():
        path = project / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content, encoding="utf-8")
    return text


def run_tests(project: Path, tmp_path: Path) -> int:
    """Run every test that was typed in; return their number."""
    count = 0
    for path in project.glob("test_*.py"):
        module = importlib.import_module(path.stem)
        for name, function in inspect.getmembers(module, inspect.isfunction):
            if name.startswith("test_"):
                scratch = tmp_path / name
                scratch.mkdir()
                function(*([scratch] if inspect.signature(function).parameters else []))
                count += 1
    return count


def pipeline(words: list[str], project: Path, store: Path, *further: str) -> Pipeline:
    """Build the chain of a command with choices of one's own; without ``eval=`` measure nothing."""
    overrides = [word for word in words[1:] if "=" in word]
    if not any(word.startswith("eval=") for word in overrides):
        overrides.append("eval=none")
    folders = [project / folder for folder in config_dirs(words)]
    return build_pipeline(compose("compress", [*overrides, f"store={store}", *further], folders))


def run_command(words: list[str], project: Path, store: Path, *further: str) -> list[Result]:
    """Run the chain of a command."""
    return pipeline(words, project, store, *further).run()


def own_commands(text: str) -> list[list[str]]:
    """Return the commands of a page that use the project's choices, without sweeps."""
    return [words for words in commands(text) if "--config-dir" in words and "-m" not in words]


def test_pruner(project, tmp_path):
    text = type_in("docs/extending/pruner.md", project)
    assert run_tests(project, tmp_path) == 2
    scored, merged = own_commands(text)
    last = run_command(scored, project, tmp_path / "store")[-1]
    assert last.label == "prune output_norm"
    assert last.checkpoint.spec.blocks == 5
    last = run_command(merged, project, tmp_path / "store")[-1]
    assert last.metadata == {"merged_blocks": [3, 4]}


def test_merged_blocks_are_the_mean_of_two(project, tmp_path):
    from safetensors.torch import load_file

    text = type_in("docs/extending/pruner.md", project)
    source, last = run_command(own_commands(text)[1], project, tmp_path / "store")
    before = load_file(source.checkpoint.folder / "model.safetensors")
    after = load_file(last.checkpoint.folder / "model.safetensors")
    name = "model.layers.{}.mlp.up_proj.weight"
    mean = (before[name.format(3)].float() + before[name.format(4)].float()) / 2
    assert (after[name.format(3)].float() - mean).abs().max() <= mean.abs().max() * 2**-8
    assert after[name.format(4)].equal(before[name.format(5)])
    assert open_checkpoint(last.checkpoint.folder).spec.blocks == 7


def test_quantizer(project, tmp_path):
    text = type_in("docs/extending/quantizer.md", project)
    assert run_tests(project, tmp_path) == 2
    small = ("calibration.samples=4", "calibration.length=32", "quantizer.intervals=2")
    last = run_command(own_commands(text)[0], project, tmp_path / "store", *small)[-1]
    assert last.label == "quantize weighted"
    assert read_json(last.checkpoint.folder / "slim.json")["facts"]["bits"] == 3


def test_method_of_the_readme(project, tmp_path):
    text = type_in("README.md", project)
    (words,) = own_commands(text)
    first = run_command(words, project, tmp_path / "store")[-1]
    other = run_command(words, project, tmp_path / "store", "seed=2")[-1]
    assert first.checkpoint.spec.blocks == 6
    assert first.metadata["removed_blocks"] != other.metadata["removed_blocks"]


def entry_and_line(text: str) -> tuple[dict, dict]:
    """Return what the guide for families adds to FAMILIES and to MODELS."""
    snippets = [body for body in fences(text, "python") if body.startswith(("Family(", '"'))]
    entry, line = snippets
    family = eval(f"({entry})", vars(families))[0]
    return {family.model_type: family}, eval(f"{{{line}}}")


@pytest.fixture
def seed_oss(monkeypatch, tmp_path):
    """A small random checkpoint of the guide's family, which slim has been told of."""
    text = (ROOT / "docs/extending/family.md").read_text(encoding="utf-8")
    entry, line = entry_and_line(text)
    for name, family in entry.items():
        monkeypatch.setitem(families.FAMILIES, name, family)
    ((model_type, changes),) = line.values()
    return test_families.build(model_type, tmp_path / model_type, **changes)


def test_family(seed_oss, tmp_path):
    test_families.test_folding_leaves_the_function_unchanged(seed_oss, tmp_path)


@pytest.mark.parametrize("bias", [False, True])
def test_parameters_of_the_new_family(seed_oss, bias):
    test_families.test_parameters_of_every_family("seed_oss", {}, bias)


def test_family_from_a_module_of_ones_own(project, tmp_path, monkeypatch):
    text = type_in("docs/extending/family.md", project)
    with monkeypatch.context() as patch:
        patch.setitem(families.FAMILIES, "seed_oss", None)  # restores what was there
        (words,) = own_commands(text)
        model = build_small("seed_oss", tmp_path / "model", attention_bias=True)
        words = [word.replace("FOLDER", str(model)) for word in words]
        last = run_command(words, project, tmp_path / "store")[-1]
    assert last.checkpoint.spec.blocks == 5
    assert last.checkpoint.spec.quantization["quant_method"] == "compressed-tensors"


def test_mistake_in_a_setting_of_ones_own(project, monkeypatch):
    """The message that the guide shows is the one that appears."""
    text = type_in("docs/extending/pruner.md", project)
    monkeypatch.chdir(project)
    arguments = ["--config-dir", "my_conf", "pruner=output_norm", "pruner.bloks=2"]
    with pytest.raises(ConfigCompositionException) as raised:
        compose("compress", arguments[2:], config_dirs(arguments))
    assert f"slim: {explain(raised.value, 'compress', arguments)}\n" in text


@pytest.fixture
def own_metrics():
    """Metrics that a test registers are forgotten after it."""
    known = list(metrics.METRICS)
    yield
    metrics.METRICS[:] = known
    metrics.BY_NAME.pop("next_token", None)


def test_metric(project, tmp_path, own_metrics):
    text = type_in("docs/extending/metric.md", project)
    assert run_tests(project, tmp_path) == 2
    (words,) = own_commands(text)
    quick = (
        "eval.tasks=null",
        "eval.prompts=[]",
        "eval.perplexity.limit=2",
        "eval.extra.next_token.limit=4",
    )
    source, pruned = run_command(words, project, tmp_path / "store", *quick)
    assert 0.5 < source.metrics["next_token"] < 1
    assert pruned.metrics["next_token"] < source.metrics["next_token"]
    assert "next token" in markdown_table([source, pruned])
    assert "next_token" in offered(pipeline(words, project, tmp_path / "store").evaluation)


def test_loss(project, tmp_path, monkeypatch):
    monkeypatch.setitem(losses.LOSSES, "alpha_divergence", None)  # forgotten after the test
    text = type_in("docs/extending/loss.md", project)
    assert run_tests(project, tmp_path) == 3
    (words,) = own_commands(text)
    words = [word.replace("pruner=taylor", "pruner=magnitude") for word in words]
    short = (
        "teacher.steps=2",
        "teacher.window=32",
        "teacher.batch_tokens=64",
        "teacher.validation_tokens=64",
        "teacher.validate_every=1",
    )
    last = run_command(words, project, tmp_path / "store", *short)[-1]
    settings = read_json(last.checkpoint.folder / "slim.json")["settings"]
    assert settings["loss"] == "alpha_divergence"
    assert settings["loss_settings"] == {"order": 0.3}


def test_help_knows_choices_of_ones_own(project, monkeypatch):
    type_in("docs/extending/pruner.md", project)
    monkeypatch.chdir(project)
    page = help_page("compress", ["--config-dir", "my_conf", "pruner=output_norm", "--help"])
    assert "attention_weight: 1.0" in page

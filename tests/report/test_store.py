"""The report's way to its runs: sweeps, experiments and failed points in a real MLflow store, and
the command line."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from slim.report.__main__ import main
from slim.report.chain_plot import _draw, plot_chain
from slim.report.find import find
from slim.report.runs import collect
from tests.support.reporting import quantized, source


class Store:
    """A SQLite store as slim writes it, and what was put into it."""

    def __init__(self, root: Path):
        from slim.tracking.connection import connect

        self.root = root
        self.client = connect(f"sqlite:///{root / 'mlflow.db'}")
        self.experiment = self.client.create_experiment(
            "study", artifact_location=(root / "artifacts").as_uri()
        )

    def run(
        self,
        name: str,
        status: str,
        records: list | None = None,
        parent: str | None = None,
        **tags: str,
    ) -> str:
        below = {"mlflow.parentRunId": parent} if parent else {}
        tags = {
            "slim.kind": "run",
            **{key.replace("__", "."): value for key, value in tags.items()},
            **below,
        }
        run_id = self.client.create_run(self.experiment, run_name=name, tags=tags).info.run_id
        if records is not None:
            self.client.log_text(run_id, json.dumps(records), "results.json")
        if status != "RUNNING":
            self.client.set_terminated(run_id, status)
        return run_id


def point(bits: int) -> list[dict]:
    return [source(), quantized(bits, {"bits": bits}, size=bits * 1e6, perplexity=10.0 - bits)]


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Store:
    found = Store(tmp_path_factory.mktemp("report") / "runs")
    sweep = found.run(
        "the sweep",
        "FINISHED",
        slim__kind="sweep",
        slim__sweep="s1",
        overrides="quant.bits=2,3,4",
        slim__published='["4.2"]',
    )
    for bits in (2, 3):
        found.run(
            f"p{bits}",
            "FINISHED",
            point(bits),
            sweep,
            slim__point=f"bits={bits}",
            overrides=f"bits={bits}",
        )
    found.run(
        "p4", "FAILED", None, sweep, slim__point="bits=4", overrides="bits=4", error="too many bits"
    )
    found.run("p4 again", "FINISHED", point(4), sweep, slim__point="bits=4", overrides="bits=4")
    found.run(
        "p5", "FAILED", None, sweep, slim__point="bits=5", overrides="bits=5", error="no such width"
    )
    found.run(
        "p8",
        "FAILED",
        None,
        sweep,
        slim__point="bits=8",
        overrides="bits=8",
        error="plan: 8 MB",
        slim__skipped="true",
    )
    found.run("p9", "RUNNING", None, sweep, slim__point="bits=9", overrides="bits=9")
    points = [
        {
            "number": 7,
            "overrides": {"bits": "x"},
            "run_id": None,
            "status": "FAILED",
            "error": "bits must be a number",
            "seconds": 0,
        }
    ]
    found.client.log_dict(sweep, {"overrides": [], "swept": {}, "points": points}, "sweep.json")
    found.run("alone", "FINISHED", point(3), overrides="bits=3 alone")  # the same chain once more
    found.run(
        "broken",
        "FAILED",
        overrides="tracking.uri=http://me:secret@host/x",
        error="no answer from http://me:secret@host",
    )
    found.run(
        "compared", "FINISHED", [source(), {**source(), "checkpoint": "second", "hash": "f" * 16}]
    )
    old = [{name: value for name, value in source().items() if name != "measured"}]
    found.run("old", "FINISHED", old)
    found.sweep = sweep
    return found


def finals(collection) -> list[str]:
    return [
        f"{one.final.label} {one.final.settings.get('bits', '')}".strip()
        for one in collection.chains
    ]


def test_a_sweep_stands_for_its_points_each_once(store):
    found = collect(store.client, [store.sweep])
    assert finals(found) == ["quantize gptq 2", "quantize gptq 3", "quantize gptq 4"]
    assert {(one.typed, one.reason, one.skipped) for one in found.failures} == {
        ("bits=5", "no such width", False), ("bits=8", "plan: 8 MB", True), ("bits=x", "bits must be a number", False)
    }  # fmt: skip
    assert found.title == "quant.bits=2,3,4" and found.published == ["4.2"]
    assert any("1 run had not ended" in note for note in found.notes)


def test_an_experiment_counts_a_repeated_chain_once_and_says_so(store):
    run_ids, title = find(store.client, "study")
    found = collect(store.client, run_ids, title)
    assert finals(found).count("quantize gptq 3") == 1 and any(
        "1 run repeated" in note for note in found.notes
    )
    assert {"base", "second"} <= set(finals(found))  # compared checkpoints are chains of one
    assert "secret" not in str(found) and any(
        "http://host/x" in failure.typed for failure in found.failures
    )
    assert any("old" in note and "cannot read" in note for note in found.notes)


@pytest.mark.parametrize("what", ["the sweep", "s1"])
def test_a_sweep_is_found_by_its_names(store, what):
    assert find(store.client, what) == ([store.sweep], None)


def test_the_command_writes_both_files(store, tmp_path, capsys):
    assert main([store.sweep, "--store", str(store.root), "--output", str(tmp_path / "out")]) == 0
    assert capsys.readouterr().out.split() == [
        str(tmp_path / "out" / name) for name in ("report.html", "report.md")
    ]
    assert "quant.bits=2,3,4" in (tmp_path / "out" / "report.md").read_text()
    assert (tmp_path / "out" / "report.html").read_text().count("<!DOCTYPE html>") == 1


def test_a_multirun_folder_names_store_and_sweep(store, tmp_path, capsys):
    (tmp_path / "sweep.json").write_text(
        json.dumps({"run_id": store.sweep, "store": str(store.root), "uri": None})
    )
    assert main([str(tmp_path), "--output", str(tmp_path)]) == 0
    assert "bits=5" in (tmp_path / "report.md").read_text()


def test_mistakes_are_one_line(store, tmp_path, capsys, monkeypatch):
    (tmp_path / "study").mkdir()
    monkeypatch.chdir(tmp_path)
    # a folder of that name is in nobody's way
    assert find(store.client, "study")[1] == "Experiment study"
    here = ["--store", str(store.root)]
    (tmp_path / "file").write_text("")
    for arguments, said in (
        (["stdy", *here], "Did you mean study?"),
        ([str(tmp_path), *here], "has no sweep.json"),
        (["study", "--store", str(tmp_path / "none")], "There are no tracked runs"),
        ([store.sweep, *here, "--output", str(tmp_path / "file" / "x")], "cannot be written"),
    ):
        assert main(arguments) == 2
        error = capsys.readouterr().err
        assert error.startswith("slim: ") and said in error and error.count("\n") == 1


def test_help_imports_nothing_heavy():
    code = "import sys, slim.report.__main__ as m; m.parser(); print(*{n.split('.')[0] for n in sys.modules})"
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.split()
    assert not {"torch", "mlflow", "transformers", "plotly", "jinja2"} & set(loaded)


# The picture of one chain


def result(record: dict) -> SimpleNamespace:
    """A result of the pipeline that ``results.json`` would show as ``record``."""
    quality = {"metrics": {name: record["metrics"][name] for name in record["measured"]["quality"]}}
    made = {
        "hash": record["hash"],
        **{name: record[name] for name in ("kind", "method", "settings", "curves")},
    }
    return SimpleNamespace(
        label=record["checkpoint"], digest=record["hash"], cached=False, seconds=0.0, metadata={}, metrics=record["metrics"],
        quality={**quality, "protocol": record["protocol"]["quality"]}, speed={},
        checkpoint=SimpleNamespace(folder=Path("f"), manifest={} if record["kind"] == "source" else made),
    )  # fmt: skip


def test_the_picture_of_a_chain_is_written_where_there_is_something_to_draw(tmp_path):
    path = tmp_path / "chain.png"
    assert plot_chain(path, [result(one) for one in point(3)])
    assert path.read_bytes().startswith(b"\x89PNG")
    assert (
        not plot_chain(tmp_path / "none.png", [result(source())])
        and not (tmp_path / "none.png").exists()
    )


def test_the_picture_of_a_chain_draws_the_figures_and_leaves_gaps():
    from slim.core.figures import new_figure
    from slim.report.chain_plot import chain_points
    from slim.report.pareto import quality_columns

    records = [
        source(),
        quantized(1, {"bits": 2}, perplexity=float("nan")),
        quantized(2, {"bits": 3}, perplexity=7.5),
    ]
    points = chain_points([result(one) for one in records])
    axes = new_figure(4, 3).subplots()
    _draw(axes, points, quality_columns(points)[:1])
    heights = axes.lines[0].get_ydata()
    assert [heights[0], heights[2]] == [5.0, 7.5] and heights[1] != heights[1]
    assert "NaN" in [text.get_text() for text in axes.texts]


def test_the_picture_of_classes_is_in_the_page(tmp_path):
    from slim.report.build import build_report

    store = Store(tmp_path)
    records = [source(accuracy=0.9), quantized(4, {"bits": 4}, accuracy=0.8)]
    run_id = store.run("headlines", "FINISHED", records)
    picture = tmp_path / "classes.png"
    picture.write_bytes(b"not really a picture")
    store.client.log_artifact(run_id, str(picture))
    page = build_report(store.client, [run_id]).html
    assert "data:image/png;base64,bm90IHJlYWxseSBhIHBpY3R1cmU=" in page
    assert '<a href="#classes">Classes</a>' in page


def test_runs_without_classes_have_no_such_section(store):
    from slim.report.build import build_report

    run_id = store.run("plain", "FINISHED", point(4))
    assert 'id="classes"' not in build_report(store.client, [run_id]).html

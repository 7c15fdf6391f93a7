"""The stage cache: what is there, which runs use it, what goes and what stays, what is damaged."""

from __future__ import annotations

import os
import re
import shutil
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest
from filelock import FileLock

from slim.cache.__main__ import main
from slim.cache.usage import Checkpointed, Run, read_runs
from slim.chain.pipeline import Pipeline
from slim.checkpoints.source import Source
from slim.checkpoints.store import Store
from slim.tracking.tracker import Tracker
from tests.conftest import ROOT
from tests.support.stages import Scale
from tests.support.tracked import client, fresh_store

# name of the run -> factors of its chain; "lost" has no run, since it was made without tracking
CHAINS = {
    "first": (2.0, 3.0),
    "second": (2.0, 5.0),
    "deleted": (2.0, 7.0),
    "broken": (2.0, 11.0),
    "lost": (13.0,),
}


def run_chain(
    root: Path, source: Path, *factors: float, name: str | None = None, evaluation=None
) -> list[Path]:
    """Run a chain of small stages in a store and return the folders of its results."""
    pipeline = Pipeline(
        Source(str(source)), [Scale(factor) for factor in factors], evaluation, Store(root)
    )
    if name is None:
        results = pipeline.run()
    else:
        with Tracker(root, "tests", name) as tracker:
            results = pipeline.run(tracker)
    return [result.checkpoint.folder for result in results[1:]]


@pytest.fixture(scope="module")
def whole(small_llama, tmp_path_factory) -> tuple[Path, dict[str, list[str]]]:
    """A store in which runs have been, and the names of the results of each."""
    root = fresh_store(tmp_path_factory.mktemp("cache") / "runs")
    names = {}
    for name, factors in CHAINS.items():
        folders = run_chain(root, small_llama, *factors, name=None if name == "lost" else name)
        names[name] = [folder.name for folder in folders]
    mlflow, runs = commands(root)
    mlflow.delete_run(runs["deleted"])  # the runs of its checkpoints stay
    mlflow.set_terminated(runs["broken"], "FAILED")
    settle(root)
    return root, names


def commands(root: Path):
    """Return an MLflow client of a store and run name -> id of the commands."""
    mlflow = client(root)
    found = mlflow.search_runs(
        [experiment.experiment_id for experiment in mlflow.search_experiments()]
    )
    return mlflow, {
        run.info.run_name: run.info.run_id
        for run in found
        if "mlflow.parentRunId" not in run.data.tags
    }


def settle(root: Path) -> None:
    """Write what the database keeps next to it into it, so that a copy is whole."""
    connection = sqlite3.connect(root / "mlflow.db")
    connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    connection.close()


@pytest.fixture
def store(whole, tmp_path) -> tuple[Path, dict[str, list[str]]]:
    """A copy, somewhere else than where it was made."""
    root, names = whole
    return shutil.copytree(root, tmp_path / "runs"), names


def there(root: Path) -> set[str]:
    return {path.name for path in (root / "stages").iterdir() if not path.name.startswith(".")}


def slim_cache(capsys, root: Path, *arguments: str) -> tuple[int, str, str]:
    code = main([arguments[0], "--store", str(root), *arguments[1:]])
    said = capsys.readouterr()
    return code, said.out, said.err


def test_the_list_names_the_runs_that_use_a_result(store, capsys, monkeypatch):
    root, names = store
    monkeypatch.setenv("COLUMNS", "200")
    code, out, _ = slim_cache(capsys, root, "list")
    assert code == 0
    shared = names["first"][0]
    rows = {name: [line for line in out.splitlines() if name in line] for name in there(root)}
    assert all(len(lines) == 1 for lines in rows.values()), out
    assert "tests: second" in rows[names["second"][1]][0]
    assert "no run" in rows[names["lost"][0]][0] and "no run" in rows[names["deleted"][1]][0]
    used = out[out.index(shared) :].split(names["lost"][0])[0]
    assert "Scale" in rows[shared][0] and "llama (" in rows[shared][0] and "tests: first" in used
    assert "prune scale (" in rows[names["first"][1]][0]


@pytest.mark.parametrize("columns", ["80", "100", "200"])
def test_the_list_fits_a_terminal_and_cuts_nothing(store, capsys, monkeypatch, columns):
    root, _ = store
    monkeypatch.setenv("COLUMNS", columns)
    out = slim_cache(capsys, root, "list")[1]
    assert max(len(line) for line in out.splitlines()[1:]) <= int(columns)
    assert all(name in out for name in there(root)) and "…" not in out


def test_prune_removes_what_no_run_uses_and_nothing_else(store, small_llama, capsys):
    root, names = store
    unused = {names["lost"][0], names["deleted"][1]}
    before = there(root)
    code, out, _ = slim_cache(capsys, root, "prune", "--dry-run")
    assert (
        code == 0
        and there(root) == before
        and all(name in out for name in unused)
        and "2 of 6 results" in out
    )
    code, _, error = slim_cache(capsys, root, "prune")
    assert code == 2 and "--yes" in error and there(root) == before, "nobody is there to be asked"
    code, _, _ = slim_cache(capsys, root, "prune", "--yes")
    assert code == 0 and there(root) == before - unused
    assert "Nothing to remove" in slim_cache(capsys, root, "prune", "--yes")[1]
    assert run_chain(root, small_llama, *CHAINS["lost"])[0].name in unused, "it can be made again"


def test_the_question_is_heeded(store, capsys, monkeypatch):
    root, _ = store
    before = there(root)
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True)
    monkeypatch.setattr("builtins.input", lambda question: "n")
    assert "Nothing was removed" in slim_cache(capsys, root, "prune")[1] and there(root) == before
    monkeypatch.setattr("builtins.input", lambda question: "y")
    assert slim_cache(capsys, root, "prune")[0] == 0 and len(there(root)) == len(before) - 2


def test_intermediate_and_failed(store, capsys):
    root, names = store
    ends = {names[name][-1] for name in ("first", "second", "broken")}
    slim_cache(capsys, root, "prune", "--yes", "--intermediate")
    assert there(root) == ends
    slim_cache(capsys, root, "prune", "--yes", "--intermediate", "--failed")
    assert there(root) == {names["first"][1], names["second"][1]}


def test_a_result_that_another_chain_began_with_is_needed(store, small_llama, capsys):
    root, names = store
    begun = root / "stages" / names["lost"][0]
    run_chain(root, begun, 17.0, name="from a folder")
    slim_cache(capsys, root, "prune", "--yes")
    assert begun.is_dir()


def test_what_a_running_run_may_be_at_work_on_stays(store, capsys):
    root, names = store
    tracker = Tracker(root, "tests", "at work")
    now = time.time()
    os.utime(root / "stages" / names["lost"][0], (now + 1, now + 1))
    os.utime(root / "stages" / names["deleted"][1], (now - 3600, now - 3600))
    _, out, _ = slim_cache(capsys, root, "prune", "--yes")
    assert (
        names["lost"][0] in there(root)
        and names["deleted"][1] not in there(root)
        and "'at work'" in out
    )
    tracker.__exit__(None, None, None)
    slim_cache(capsys, root, "prune", "--yes")
    assert names["lost"][0] not in there(root)


def test_finding_a_result_marks_it_as_used(small_llama, tmp_path):
    (folder,) = run_chain(tmp_path / "runs", small_llama, 2.0)
    os.utime(folder, (1, 1))
    run_chain(tmp_path / "runs", small_llama, 2.0)
    assert time.time() - folder.stat().st_mtime < 60


def test_what_another_process_holds_is_left_alone(store, capsys):
    root, names = store
    stages = root / "stages"
    for name in ("prune-aa.partial", "prune-bb.partial", "prune-bb.work", "quantize-cc.work"):
        (stages / name).mkdir()
        (stages / name / "file").write_bytes(bytes(1000))
    (root / "evaluations").mkdir()
    fresh, old = (
        root / "evaluations" / "new.json.partial",
        root / "evaluations" / "old.json.partial",
    )
    fresh.write_text("{")
    old.write_text("{")
    os.utime(old, (1, 1))
    with FileLock(stages / ".prune-bb.lock"), FileLock(stages / f".{names['lost'][0]}.lock"):
        _, out, _ = slim_cache(capsys, root, "prune", "--yes")
    assert (
        there(root) >= {"prune-bb.partial", "prune-bb.work", names["lost"][0]}
        and names["lost"][0] in out
    )
    assert not there(root) & {"prune-aa.partial", "quantize-cc.work", names["deleted"][1]}
    assert fresh.is_file() and not old.is_file()


def test_figures_go_when_asked_for(store, capsys):
    root, _ = store
    figures = Store(root).evaluation_file("abc")
    Store(root).write_evaluation(figures, {"metrics": {"perplexity": 2.0}})
    slim_cache(capsys, root, "prune", "--yes")
    assert figures.is_file()
    slim_cache(capsys, root, "prune", "--yes", "--evaluations")
    assert not figures.is_file()


def test_verify_finds_every_kind_of_damage(store, small_llama, capsys):
    root, names = store
    assert slim_cache(capsys, root, "verify")[:2] == (
        0,
        "6 results and 0 evaluations read, 0 damaged.\n",
    )
    first, second, third, fourth = (root / "stages" / name for name in sorted(there(root))[:4])
    weights = bytearray((first / "model.safetensors").read_bytes())
    weights[-5] ^= 1
    (first / "model.safetensors").write_bytes(weights)
    (second / "tokenizer.json").unlink()
    (third / "slim.json").write_text("{")
    (fourth / "model.safetensors").unlink()
    Store(root).write_evaluation(
        Store(root).evaluation_file("abc"), {"metrics": {"perplexity": 2.0}}
    )
    file = Store(root).evaluation_file("abc")
    file.write_text(file.read_text().replace("2.0", "1.0"))
    code, out, _ = slim_cache(capsys, root, "verify")
    assert code == 1 and out.endswith("6 results and 1 evaluation read, 5 damaged.\n")
    assert all(f"damaged: {path.name}" in out for path in (first, second, third, fourth, file))
    assert "model.safetensors differs" in out
    assert slim_cache(capsys, root, "verify", "--remove")[0] == 1
    assert (
        not any(path.exists() for path in (first, second, third, fourth, file))
        and len(there(root)) == 2
    )
    assert slim_cache(capsys, root, "verify")[0] == 0


def test_the_sizes_add_up(store, capsys):
    root, _ = store
    (root / "stages" / "prune-aa.work").mkdir()
    (root / "stages" / "prune-aa.work" / "file").write_bytes(bytes(123_456_789))
    (root / "notes.txt").write_bytes(bytes(200_000_000))
    _, out, _ = slim_cache(capsys, root, "size")
    lines = [re.split(r"  +", line) for line in out.splitlines()]
    rows = {cells[0]: cells[-1] for cells in lines if len(cells) > 1}
    everything = sum(path.stat().st_size for path in root.rglob("*") if path.is_file())
    assert rows["all"] == f"{everything / 1e9:.1f} GB"
    assert rows["work in progress or left behind"] == "0.1 GB" and rows["other"] == "0.2 GB"
    weights = sum(
        path.stat().st_size for path in root.glob("stages/prune-*[0-9a-f]/**/*") if path.is_file()
    )
    assert rows["results of prune"] == f"{weights / 1e6:.1f} MB"


def test_what_cannot_be_done_is_said(tmp_path, capsys):
    assert slim_cache(capsys, tmp_path / "nowhere", "list")[::2] == (2, f"slim: There is no store {tmp_path / 'nowhere'}. "
        "Give --store FOLDER, the one of store=FOLDER in the runs' commands.\n")  # fmt: skip
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "a.txt").write_text("a")
    code, _, error = slim_cache(capsys, tmp_path / "letters", "prune", "--yes")
    assert code == 2 and "is no store of slim" in error
    (tmp_path / "runs" / "stages").mkdir(parents=True)
    code, _, error = slim_cache(capsys, tmp_path / "runs", "prune", "--yes")
    assert code == 2 and "--uri" in error, "without runs everything would count as unused"
    assert "0 results" in slim_cache(capsys, tmp_path / "runs", "list")[1]
    (tmp_path / "runs" / "mlflow.db").write_bytes(b"no database" * 1000)
    code, _, error = slim_cache(capsys, tmp_path / "runs", "prune", "--yes")
    assert code == 2 and "mlflow.db cannot be used" in error and "Traceback" not in error
    (tmp_path / "runs" / "mlflow.db").unlink()
    (tmp_path / "runs" / "outbox" / "x").mkdir(parents=True)
    (tmp_path / "runs" / "outbox" / "x" / "state.json").write_text("{}")
    code, _, error = slim_cache(
        capsys, tmp_path / "runs", "prune", "--yes", "--uri", f"sqlite:///{tmp_path / 'other.db'}"
    )
    assert code == 2 and "not reached their tracking server" in error


def test_runs_of_another_tracking_store_count_too(store, small_llama, tmp_path, capsys):
    root, names = store
    other = f"sqlite:///{fresh_store(tmp_path / 'elsewhere') / 'mlflow.db'}"
    pipeline = Pipeline(Source(str(small_llama)), [Scale(13.0)], None, Store(root))
    with Tracker(root, "tests", "on a server", other) as tracker:
        pipeline.run(tracker)
    slim_cache(capsys, root, "prune", "--yes", "--uri", other)
    assert names["lost"][0] in there(root) and names["deleted"][1] not in there(root)


def test_the_end_of_a_chain():
    at = lambda name, *before: Checkpointed(name, "", frozenset({name, *before}))  # noqa: E731
    chain = [at("aa"), at("bb", "aa"), at("cc", "aa", "bb")]
    assert Run("x", "e", "FINISHED", 0.0, chain).finals() == [chain[2]]
    assert Run("x", "e", "FINISHED", 0.0, chain[::-1]).finals() == [chain[2]], "whatever the order"
    compared = [at("aa"), at("cc", "bb")]
    assert Run("x", "e", "FINISHED", 0.0, compared).finals() == compared


def test_what_stands_below_something_deleted_uses_nothing(tmp_path):
    """A sweep of one point with one checkpoint, deleted at each level."""
    from slim.tracking.connection import connect

    uri = f"sqlite:///{fresh_store(tmp_path) / 'mlflow.db'}"
    mlflow = connect(uri)
    create = lambda name, **tags: mlflow.create_run("0", run_name=name, tags=tags).info.run_id  # noqa: E731
    sweep = create("sweep")
    point = create("point", **{"mlflow.parentRunId": sweep})
    stage = create("prune", **{"mlflow.parentRunId": point, "hash": "abc"})
    for deleted in (sweep, point, stage):
        assert {run.name: len(run.chain) for run in read_runs([uri])} == {"sweep": 0, "point": 1}
        mlflow.delete_run(deleted)
        assert sum(len(run.chain) for run in read_runs([uri])) == 0
        mlflow.restore_run(deleted)


def test_help_answers_at_once_without_torch():
    code = "import sys; from slim.cache.__main__ import main\ntry: main(['--help'])\nexcept SystemExit: pass\n"
    code += "print([name for name in ('torch', 'transformers', 'mlflow') if name in sys.modules])"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=60
    )
    assert all(word in result.stdout for word in ("list", "size", "prune", "verify"))
    assert result.stdout.strip().endswith("[]"), result.stderr

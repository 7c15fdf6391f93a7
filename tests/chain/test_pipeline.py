"""The chain of stages: naming, reuse, resumption, damage, limits, two processes at once."""

from __future__ import annotations

import json
import multiprocessing
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from slim.chain.pipeline import Pipeline
from slim.checkpoints.checkpoint import open_checkpoint
from slim.checkpoints.source import Source
from slim.checkpoints.store import Store, digest
from slim.core.errors import SlimError
from tests.support.stages import Scale


@pytest.fixture
def source(small_llama, tmp_path) -> Path:
    return shutil.copytree(small_llama, tmp_path / "source")


def chain(source: Path, tmp_path: Path, *stages: Scale, **settings) -> Pipeline:
    return Pipeline(Source(str(source)), list(stages), None, Store(tmp_path / "runs"), **settings)


def runs(log: Path) -> list[str]:
    return log.read_text().split() if log.exists() else []


def test_what_is_there_is_not_made_again(source, tmp_path):
    log = tmp_path / "log"
    first = chain(source, tmp_path, Scale(2.0, str(log)), Scale(3.0, str(log))).run()
    again = chain(
        source, tmp_path, Scale(2.0, str(log)), Scale(3.0, str(log)), Scale(4.0, str(log))
    ).run()
    assert runs(log) == ["2.0", "3.0", "4.0"]
    assert [result.cached for result in again] == [True, True, True, False]
    assert [result.digest for result in again[:3]] == [result.digest for result in first]


def test_the_name_depends_on_settings_version_and_the_whole_chain(source, tmp_path, monkeypatch):
    def names(*stages):
        return [step.digest for step in chain(source, tmp_path, *stages).plan()]

    base = names(Scale(2.0), Scale(3.0))
    assert names(Scale(2.0), Scale(3.0)) == base
    assert names(Scale(2.5), Scale(3.0))[2] != base[2], "a change before a stage must rename it"
    assert names(Scale(2.0), Scale(3.5))[:2] == base[:2]
    monkeypatch.setattr(Scale, "version", 2)
    assert names(Scale(2.0))[1] != base[1]
    (source / "tokenizer_config.json").write_text("{}")
    assert names(Scale(2.0))[0] != base[0]


def test_the_plan_does_nothing(source, tmp_path):
    pipeline = chain(source, tmp_path, Scale(2.0))
    steps = pipeline.plan()
    assert [step.cached for step in steps] == [True, False]
    assert not (tmp_path / "runs").exists()
    pipeline.run()
    assert [step.cached for step in pipeline.plan()] == [True, True]


def test_lineage_and_curves_are_recorded(source, tmp_path):
    results = chain(source, tmp_path, Scale(2.0), Scale(3.0)).run()
    manifest = json.loads((results[-1].checkpoint.folder / "slim.json").read_text())
    assert [step["label"] for step in manifest["lineage"]] == [
        "source",
        "prune scale",
        "prune scale",
    ]
    assert [step["hash"] for step in manifest["lineage"]] == [result.digest for result in results]
    assert manifest["settings"] == {"factor": 3.0}
    assert manifest["facts"] == {"factor": 3.0}
    assert manifest["curves"] == [["loss", 1.5, 1], ["loss", 0.5, 2]]
    assert manifest["parameters"] == results[0].parameters


@pytest.mark.parametrize("error", [RuntimeError("broken"), KeyboardInterrupt()])
def test_a_stage_that_ends_early_leaves_nothing_and_loses_nothing(source, tmp_path, error):
    log = tmp_path / "log"
    with pytest.raises(type(error)):
        chain(source, tmp_path, Scale(2.0, str(log)), Scale(3.0, fail=error)).run()
    left = [path.name for path in (tmp_path / "runs" / "stages").iterdir() if path.is_dir()]
    assert len(left) == 1, "only the finished first stage"
    chain(source, tmp_path, Scale(2.0, str(log)), Scale(3.0, str(log))).run()
    assert runs(log) == ["2.0", "3.0"]


def damage_bytes(folder: Path) -> None:
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-7] ^= 255
    path.write_bytes(data)


def truncate(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize(
    "damage",
    [
        damage_bytes,
        truncate,
        lambda folder: (folder / "slim.json").write_text("{"),
        lambda folder: (folder / "config.json").unlink(),
    ],
)
def test_a_damaged_result_is_made_again(source, tmp_path, damage, capsys):
    log = tmp_path / "log"
    result = chain(source, tmp_path, Scale(2.0, str(log))).run()[-1]
    before = result.checkpoint.manifest["checksums"]
    damage(result.checkpoint.folder)
    again = chain(source, tmp_path, Scale(2.0, str(log))).run()[-1]
    assert runs(log) == ["2.0", "2.0"]
    assert open_checkpoint(again.checkpoint.folder).manifest["checksums"] == before
    assert "Damaged result" in capsys.readouterr().err


def test_a_damaged_source_made_by_slim_is_refused(source, tmp_path):
    made = chain(source, tmp_path, Scale(2.0)).run()[-1].checkpoint.folder
    damage_bytes(made)
    with pytest.raises(SlimError, match="model.safetensors differs from its recorded checksum"):
        chain(made, tmp_path, Scale(3.0)).plan()


def test_a_damaged_file_in_the_hubs_cache_is_refused(source, tmp_path):
    from slim.core.io import sha256

    blobs = tmp_path / "hub" / "blobs"
    blobs.mkdir(parents=True)
    blob = blobs / sha256(source / "model.safetensors")
    (source / "model.safetensors").rename(blob)
    (source / "model.safetensors").symlink_to(blob)
    chain(source, tmp_path, Scale(3.0)).plan()
    damage_bytes(source)
    with pytest.raises(SlimError, match="recorded checksum"):
        chain(source, tmp_path, Scale(3.0)).plan()


def test_too_little_memory_is_said_before_any_work(source, tmp_path):
    log = tmp_path / "log"
    pipeline = chain(source, tmp_path, Scale(2.0, str(log), needs=10**15))
    with pytest.raises(SlimError, match="1000000.0 GB of memory"):
        pipeline.run()
    assert not runs(log)
    chain(source, tmp_path, Scale(2.0, str(log), needs=10**15), ignore_limits=True).run()
    assert runs(log)


def test_too_little_disk_is_said_before_any_work(source, tmp_path, monkeypatch):
    monkeypatch.setattr("slim.chain.pipeline.free_disk", lambda folder: 10)
    with pytest.raises(SlimError, match="on disk, and 0.0 MB are free"):
        chain(source, tmp_path, Scale(2.0)).run()


def _run_once(source: str, tmp_path: str, log: str) -> None:
    chain(Path(source), Path(tmp_path), Scale(2.0, log)).run()


def test_two_processes_share_one_result(source, tmp_path):
    log = tmp_path / "log"
    context = multiprocessing.get_context("spawn")
    both = [
        context.Process(target=_run_once, args=(str(source), str(tmp_path), str(log)))
        for _ in range(2)
    ]
    for process in both:
        process.start()
    for process in both:
        process.join(120)
    assert [process.exitcode for process in both] == [0, 0]
    assert runs(log) == ["2.0"]


HOLD = """
import sys, time
from pathlib import Path
from slim.checkpoints.store import Store
store = Store(sys.argv[1])
folder = store.stage_folder("prune", "x")
with store.lock(folder), store.writing(folder) as partial:
    (partial / "half").write_text("written")
    print("holding", flush=True)
    time.sleep(60)
"""


def test_what_a_killed_process_left_is_cleared(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "holding\n"
    process.kill()
    process.wait()
    store = Store(tmp_path)
    folder = store.stage_folder("prune", "x")
    assert folder.with_name(folder.name + ".partial").exists()
    assert not folder.exists()
    started = time.monotonic()
    with store.lock(folder), store.writing(folder) as partial:
        assert list(partial.iterdir()) == []
    assert time.monotonic() - started < 5
    assert folder.is_dir()


def test_a_full_disk_is_an_error_that_leaves_nothing(tmp_path):
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)], capture_output=True
    )
    if mounted.returncode:
        pytest.skip("mounting a small file system needs root")
    try:
        import torch

        from slim.core.io import save_tensors

        store = Store(folder)
        stage = store.stage_folder("prune", "x")
        with (
            pytest.raises(SlimError, match="The disk is full"),
            store.lock(stage),
            store.writing(stage) as partial,
        ):
            save_tensors({"weight": torch.zeros(100_000)}, partial / "model.safetensors")
        assert [path.name for path in (folder / "stages").iterdir() if path.is_dir()] == []
        with pytest.raises(SlimError, match="The disk is full"):
            store.write_evaluation(store.evaluation_file("y"), {"text": "x" * 200_000})
        assert list((folder / "evaluations").iterdir()) == []
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def test_altered_evaluations_are_not_used(tmp_path):
    store = Store(tmp_path)
    path = store.evaluation_file("x")
    store.write_evaluation(path, {"metrics": {"perplexity": 3.0}})
    assert store.find_evaluation(path) == {"metrics": {"perplexity": 3.0}}
    path.write_text(path.read_text().replace("3.0", "2.0"))
    assert store.find_evaluation(path) is None


def test_digest_ignores_the_order_of_keys():
    assert digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1}) != digest({"a": 1, "b": 3})

"""Environments: whole or absent, once, named by their pins; and what is said where they cannot be
made."""

from __future__ import annotations

import json
import threading
from importlib.metadata import distribution
from pathlib import Path

import pytest

from slim.backends import making
from slim.backends.__main__ import main
from slim.backends.environment import MARKER, read_pins, variables_for
from slim.backends.making import (
    installer_error,
    link_torch,
    make,
    problems,
    remove_environment,
    torch_distributions,
)
from slim.backends.tools import TOOLS, find_tool
from slim.core.errors import SlimError
from tests.support.tools import commands, environment, install_uv


def test_an_environment_is_made_once(tmp_path, monkeypatch):
    log = install_uv(monkeypatch, tmp_path / "bin")
    fake = environment(tmp_path / "made", "nobody==1.0")
    make(fake)
    assert make(fake) == 0.0
    assert commands(log) == ["venv", "pip"]
    assert fake.made
    assert fake.record["identity"]["packages"] == ["nobody==1.0"]


def test_what_is_installed_is_what_is_pinned_and_nothing_more(tmp_path, monkeypatch):
    log = install_uv(monkeypatch, tmp_path / "bin")
    make(environment(tmp_path / "made", "nobody==1.0", "none==2.0"))
    install = log.read_text().splitlines()[1]
    assert "--no-deps" in install
    assert install.endswith("nobody==1.0 none==2.0")


def test_two_at_once_make_one(tmp_path, monkeypatch):
    log = install_uv(monkeypatch, tmp_path / "bin", seconds=0.3)
    fake = environment(tmp_path / "made", "nobody==1.0")
    both = [threading.Thread(target=make, args=(fake,)) for _ in range(2)]
    for thread in both:
        thread.start()
    for thread in both:
        thread.join()
    assert commands(log) == ["venv", "pip"]
    assert fake.made


def test_an_environment_that_cannot_be_made_leaves_nothing(tmp_path, monkeypatch):
    install_uv(monkeypatch, tmp_path / "bin", says="it rained", code=1)
    fake = environment(tmp_path / "made", "nobody==1.0")
    with pytest.raises(SlimError, match="could not be made.*it rained"):
        make(fake)
    assert not fake.folder.exists()


def test_what_a_killed_process_left_is_made_again(tmp_path, monkeypatch):
    install_uv(monkeypatch, tmp_path / "bin")
    fake = environment(tmp_path / "made", "nobody==1.0")
    fake.folder.mkdir(parents=True)
    (fake.folder / "half").write_text("a part")
    assert not fake.made
    make(fake)
    assert fake.made
    assert not (fake.folder / "half").exists()


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ("WARNING: NewConnectionError: Failed to establish a new connection", "no package index"),
        ("ERROR: No matching distribution found for nobody==9", "there is no nobody==9"),
        ("OSError: [Errno 28] No space left on device", "The disk is full"),
        ("error: Failed to fetch; dns error: failed to lookup", "no package index"),
    ],
)
def test_an_installer_that_fails_is_explained(said, expected, tmp_path):
    error = installer_error(environment(tmp_path, "nobody==9"), ["Collecting nobody", said], 1)
    assert expected in str(error)
    assert len(str(error).splitlines()) <= 2


def test_modules_that_cannot_be_imported_are_an_error(tmp_path, monkeypatch):
    install_uv(monkeypatch, tmp_path / "bin")
    fake = environment(tmp_path / "made", "nobody==1.0", modules=("nobody",))
    with pytest.raises(SlimError, match="No module named 'nobody'"):
        make(fake)
    assert not fake.folder.exists()


def test_a_check_finds_what_is_not_as_pinned(tmp_path, monkeypatch):
    install_uv(monkeypatch, tmp_path / "bin")
    fake = environment(tmp_path / "made", "nobody==1.0")
    make(fake)
    assert problems(fake) == ["nobody is missing, not 1.0"]


def test_another_pin_is_another_environment(tmp_path):
    first, second = (environment(tmp_path, f"nobody=={number}") for number in (1, 2))
    assert first.folder != second.folder


def test_the_plan_names_packages_size_and_place(tmp_path):
    sentence = TOOLS["llmcompressor"].environment(tmp_path).plan()
    assert "llmcompressor==" in sentence
    assert "0.1 GB" in sentence
    assert str(tmp_path) in sentence


@pytest.mark.parametrize("name", [name for name in TOOLS])
def test_pins_are_pinned_and_have_sizes(name):
    pins = read_pins(name)
    assert all("==" in package for package in pins.packages)
    assert pins.bytes > 1e7
    assert not any(package.startswith("torch==") for package in pins.packages)


def test_a_tool_that_is_not_known_is_named():
    with pytest.raises(SlimError, match="Did you mean autoawq"):
        find_tool("autowq")


def test_torch_is_shared_by_links(tmp_path, monkeypatch):
    # of a small package: torch has ten thousand files
    shared = distribution("filelock")
    monkeypatch.setattr(making, "torch_distributions", lambda: [shared])
    link_torch(tmp_path)
    source, linked = (Path(shared.locate_file("filelock")), tmp_path / "filelock")
    assert {path.name for path in linked.glob("*.py")} == {
        path.name for path in source.glob("*.py")
    }
    file = linked / "__init__.py"
    assert file.read_bytes() == (source / "__init__.py").read_bytes()
    if source.stat().st_dev == tmp_path.stat().st_dev:
        assert file.stat().st_ino == (source / "__init__.py").stat().st_ino


def test_torch_brings_only_what_belongs_to_it():
    names = [shared.metadata["Name"].lower() for shared in torch_distributions()]
    assert names[0] == "torch"
    assert all(name.startswith(("nvidia", "triton", "cuda")) for name in names[1:])


def test_a_worker_sees_no_keys_and_no_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "secret")
    monkeypatch.setenv("PYTHONPATH", "/somewhere")
    variables = variables_for(environment(tmp_path, "nobody==1"), tmp_path / "scratch")
    assert "HF_TOKEN" not in variables
    assert "PYTHONPATH" not in variables
    assert variables["HOME"] == variables["TMPDIR"] == str(tmp_path / "scratch")


def test_removing_takes_the_folder_and_old_ones_too(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("SLIM_ENVIRONMENTS", str(tmp_path))
    for name in ("autoawq-0123456789", "autoawq-9876543210"):
        (tmp_path / name).mkdir()
        (tmp_path / name / MARKER).write_text("{}")
    assert main(["remove", "autoawq"]) == 0
    assert not list(tmp_path.glob("autoawq-*"))
    assert main(["remove", "autoawq"]) == 2
    assert "no environment of autoawq" in capsys.readouterr().err


def test_what_is_being_made_is_not_removed(tmp_path):
    from slim.checkpoints.store import Store

    folder = tmp_path / "autoawq-0123456789"
    folder.mkdir()
    with Store(tmp_path).lock(folder):
        assert not remove_environment(folder)
    assert folder.is_dir()


def test_the_list_names_every_tool_and_what_is_to_fetch(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("SLIM_ENVIRONMENTS", str(tmp_path))
    monkeypatch.setenv("COLUMNS", "200")
    (tmp_path / "mine-0123456789").mkdir()
    (tmp_path / "mine-0123456789" / MARKER).write_text(json.dumps({"bytes": 5e8}))
    assert main(["list"]) == 0
    shown = capsys.readouterr().out
    for name in TOOLS:
        assert f"quant={name}" in shown
    assert "0.1 GB to fetch" in shown
    assert "0.5 GB" in shown


def test_make_says_first_what_it_would_fetch(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("SLIM_ENVIRONMENTS", str(tmp_path))
    assert main(["make", "autoround", "--dry-run"]) == 0
    assert "auto-round==" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_a_check_of_what_is_not_made_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("SLIM_ENVIRONMENTS", str(tmp_path))
    assert main(["check", "autoround"]) == 1
    assert "python -m slim.backends make autoround" in capsys.readouterr().out

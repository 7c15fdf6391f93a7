"""The wheel: what is installed from it works in an empty folder, outside the checkout."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

from tests.conftest import ROOT

# what a wheel is built from: the rest of a checkout may be large
SOURCES = ("slim", "hydra_plugins", "pyproject.toml", "README.md", "LICENSE")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The wheel, built without a network from a copy, so that nothing is left in the checkout."""
    folder = tmp_path_factory.mktemp("wheel")
    ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / "source" / name, ignore=ignored)
        else:
            shutil.copy(ROOT / name, folder / "source" / name)
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-q"]
    result = subprocess.run(
        [*build, "--wheel-dir", str(folder), str(folder / "source")],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    (path,) = folder.glob("*.whl")
    return path


def test_the_wheel_holds_choices_assets_and_plugins(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    conf = [path.relative_to(ROOT).as_posix() for path in (ROOT / "slim/conf").rglob("*.yaml")]
    assert set(conf) <= set(names)
    assert "hydra_plugins/slim_sweeper/grid.py" in names
    assert "hydra_plugins/slim_search/sweeper.py" in names
    assert "slim/assets/tiny/config.json" in names


def test_an_installed_wheel_compresses_outside_the_checkout(wheel, tmp_path):
    home, empty = tmp_path / "venv", tmp_path / "empty"
    venv.create(home, with_pip=False, symlinks=True)
    site = Path(sysconfig.get_path("purelib", "venv", {"base": str(home)}))
    zipfile.ZipFile(wheel).extractall(site)
    # the libraries come from this environment; addsitedir would also read its .pth files, one of
    # which leads to the checkout
    (site / "libraries.pth").write_text(sysconfig.get_path("purelib") + "\n")
    empty.mkdir()
    start = "from slim.cli.commands import compress; compress()"
    arguments = ["model=tiny", "pruner=none", "quant=rtn", "eval=none", "store=results"]
    environment = {**os.environ, "PYTHONPATH": ""}
    result = subprocess.run(
        [str(home / "bin" / "python"), "-c", start, *arguments],
        cwd=empty,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    assert "final checkpoint:" in result.stdout
    assert [path.name for path in empty.iterdir()] == ["results"]
    assert len(list((empty / "results" / "stages").glob("quantize-*/model.safetensors"))) == 1
    where = subprocess.run(
        [str(home / "bin" / "python"), "-c", "import slim; print(slim.__file__)"],
        cwd=empty,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert where.stdout.startswith(str(home)), "the checkout was used instead of the wheel"

"""The house stands: packages import only from lower ones, and no files import one another in a
circle."""

from __future__ import annotations

import ast
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import ROOT


def test_packages_import_only_from_lower_ones():
    command = shutil.which("lint-imports", path=Path(sys.executable).parent)
    if command is None:
        pytest.skip("import-linter is not installed: pip install -e '.[test]'")
    result = subprocess.run(
        [command, "--no-cache"], capture_output=True, text=True, cwd=ROOT, timeout=120
    )
    assert result.returncode == 0, result.stdout


def module_files(root: Path) -> dict[str, Path]:
    """Return module name -> file of slim's code below ``root``."""
    modules = {}
    for folder in ("slim", "hydra_plugins"):
        for path in (root / folder).rglob("*.py"):
            parts = path.relative_to(root).with_suffix("").parts
            modules[".".join(part for part in parts if part != "__init__")] = path
    return modules


def imported(tree: ast.AST, modules: dict[str, Path]) -> Iterator[str]:
    """Yield the modules of ours that a file imports anywhere, for types and lazily too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in modules)
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, "imports are absolute"
            for alias in node.names:
                submodule = f"{node.module}.{alias.name}"
                yield submodule if submodule in modules else node.module
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") == "LazyModule":
            yield from lazily_named(node.args[0])


def lazily_named(name: ast.expr) -> Iterator[str]:
    """Yield a module's name where it is written out: one that is computed cannot be followed."""
    if isinstance(name, ast.Constant):
        yield name.value


def in_circles(edges: dict[str, set[str]]) -> dict[str, set[str]]:
    """Return what is left of a graph when all nodes are taken away that lie on no circle."""
    left = dict(edges)
    while True:
        targets = set().union(*left.values()) if left else set()
        kept = {node for node in left if left[node] and node in targets}
        if kept == set(left):
            return left
        left = {node: left[node] & kept for node in kept}


def test_no_files_import_one_another_in_a_circle():
    modules = module_files(ROOT)
    edges = {}
    for name, path in modules.items():
        targets = set(imported(ast.parse(path.read_text(encoding="utf-8")), modules))
        edges[name] = targets & set(modules) - {name}
    assert len(edges) > 200
    assert in_circles(edges) == {}


def test_a_circle_is_seen(tmp_path):
    (tmp_path / "slim" / "x").mkdir(parents=True)
    sources = {
        "a": "def f():\n    from slim.x import b",
        "b": "from slim.core.lazy import LazyModule\nc = LazyModule('slim.x.c')",
        "c": "if TYPE_CHECKING:\n    from slim.x.a import f",
        "d": "import slim.x.a",
    }
    for name, source in sources.items():
        (tmp_path / "slim" / "x" / f"{name}.py").write_text(source)
    modules = module_files(tmp_path)
    edges = {
        name: set(imported(ast.parse(path.read_text()), modules)) & set(modules)
        for name, path in modules.items()
    }
    assert set(in_circles(edges)) == {"slim.x.a", "slim.x.b", "slim.x.c"}

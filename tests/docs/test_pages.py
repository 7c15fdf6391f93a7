"""The documentation as a whole: links lead somewhere, commands compose, paths exist."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

from slim.chain.compose import CONF, compose
from slim.cli.experiments import check_experiments
from tests.conftest import ROOT
from tests.support.pages import PAGES, anchors, commands, relative_links


def page_name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_links_lead_somewhere(page):
    for link in relative_links(page):
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{page_name(page)} links to {link}"
        if anchor and target.suffix == ".md":
            assert anchor in anchors(target), f"{page_name(page)} links to {link}"


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_paths_exist(page):
    text = page.read_text(encoding="utf-8")
    if "extending" in page.parts:  # the guides' own files are new
        text = re.sub(r"^\+.*$", "", text, flags=re.MULTILINE)
    named = re.findall(
        r"(?<![\w/.-])((?:slim|tests|benchmarks|docs)/[\w/.-]+\.(?:py|yaml|md))", text
    )
    missing = sorted({path for path in named if not (ROOT / path).exists()})
    assert not missing


def layers() -> list[str]:
    """Return the packages, lowest first, as the contract in pyproject.toml has them."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    (contract,) = project["tool"]["importlinter"]["contracts"]
    return contract["layers"][::-1]


def test_architecture_lists_the_packages_in_order():
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    table = text.partition("| package |")[2].partition("\n\n")[0]
    assert re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE) == layers()


def test_contributing_lists_the_packages_in_order():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    assert " ".join(layers()) in " ".join(text.split())


def composed_commands() -> list:
    known = []
    for page in PAGES:
        for words in commands(page.read_text(encoding="utf-8")):
            known.append(pytest.param(words, id=f"{page.stem}: {' '.join(words)}"[:150]))
    return known


def points(overrides: list[str]) -> list[list[str]]:
    """Return the overrides of enough points of a sweep that every value is in one of them."""
    from hydra.core.override_parser.overrides_parser import OverridesParser

    parsed = OverridesParser.create().parse_overrides(overrides)
    swept = {
        item.input_line: list(item.sweep_string_iterator())
        for item in parsed
        if item.is_sweep_override()
    }
    count = max(map(len, swept.values()), default=1)
    rows = []
    for number in range(count):
        row = []
        for item in parsed:
            values = swept.get(item.input_line)
            key = item.get_key_element()
            row.append(f"{key}={values[number % len(values)]}" if values else item.input_line)
        rows.append(row)
    return rows


@pytest.mark.parametrize("words", composed_commands())
def test_commands_compose(words):
    """Every setting and choice that a page has people type exists."""
    command = words[0].removesuffix(".py")
    overrides = [word for word in words[1:] if not word.startswith("-")]
    if "--config-dir" in words:
        pytest.skip("choices of one's own: tests/docs/test_extending.py")
    check_experiments(overrides, CONF, command)
    for point in points(overrides):
        composed = [item for item in point if not item.startswith("hydra")]
        assert compose(command, composed).store

"""The page of all settings."""

from __future__ import annotations

import re

import pytest

from slim.chain.compose import CONF, compose
from slim.cli import settings_page
from tests.conftest import ROOT

PAGE = ROOT / "docs" / "settings.md"


def test_page_is_what_the_generator_makes():
    assert PAGE.read_text(encoding="utf-8") == settings_page.page(), (
        "run: python -m slim.cli.settings_page docs/settings.md"
    )


def rows() -> dict[str, list[str]]:
    """Return setting -> its cells for type, default and meaning."""
    found: dict[str, list[str]] = {}
    for line in settings_page.page().splitlines():
        cells = re.split(r"(?<!\\)\|", line)
        if len(cells) == 6 and cells[1].startswith(" `"):
            name = cells[1].strip(" `")
            assert name not in found, f"{name} stands twice"
            found[name] = [cell.strip() for cell in cells[2:5]]
    return found


def test_every_setting_has_a_type_a_default_and_a_meaning():
    for name, cells in rows().items():
        assert all(cells), name


def leaves(node: dict, path: str = "") -> list[str]:
    found = []
    for key, value in node.items():
        full = f"{path}.{key}" if path else key
        if isinstance(value, dict) and value:
            found += leaves(value, full)
        elif not key.startswith("_"):
            found.append(full)
    return found


GROUPS = ["model", "pruner", "tuner", "teacher", "quantizer", "eval", "data", "trainer"]


@pytest.mark.parametrize("group", GROUPS)
def test_every_setting_of_every_choice_is_on_the_page(group):
    from omegaconf import OmegaConf

    known = rows()
    for choice in settings_page.choice_names(group):
        config = compose("compress", [f"{group}={choice}"])
        settings = OmegaConf.to_container(config[group], resolve=False)
        for name in leaves(settings or {}, group):
            # what is below a mapping that has no section of its own is no setting
            assert any(name == row or name.startswith(f"{row}.") for row in known), name


CHOICE = """# Title.
# python compress.py x
_target_: a.B
# For both.
a: 1
b: 2
c: 'x # y' # after

d: 4
"""


def test_comments_above_and_after():
    entries = settings_page.read_entries(CHOICE)
    assert entries["a"].comment == "For both."
    assert entries["b"].comment == "For both."
    assert entries["c"].comment == "after"
    assert entries["c"].value == "x # y"
    assert entries["d"].comment == ""


def test_summary_leaves_commands_out():
    assert settings_page.summary("# One.\n# Two.\n# python compress.py\n# no\n") == "One. Two."


def test_choices_that_differ_are_named():
    default, meaning = rows()["pruner.protect_first"][1:]
    assert default == "`null`"
    assert meaning.endswith("(`angular`)")


def test_folder_of_choices_is_inside_the_package():
    assert CONF.parent.name == "slim"


def test_types_of_what_a_function_makes():
    assert rows()["teacher.learning_rate"][0] == "number or null"


def test_types_of_a_class():
    assert rows()["pruner.blocks"][0] == "integer or number or null"

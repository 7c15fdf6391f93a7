"""The page of all settings, docs/settings.md, made from the choice files and the settings classes.

    python -m slim.cli.settings_page docs/settings.md

Names, defaults and meanings come from ``slim/conf``, where every setting has a comment; types come
from the fields of the class that a choice file names as its ``_target_``.
"""

from __future__ import annotations

import dataclasses
import json
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from slim.chain.compose import CONF

# group -> what it chooses; in the order in which people meet them
GROUPS = {
    "model": "where the chain begins",
    "pruner": "what is removed",
    "tuner": "how the model heals, or learns something new",
    "teacher": "distillation",
    "student_init": "a student made from some of the model's blocks",
    "quantizer": "how weights are rounded; `quant` is short for it",
    "calibration": "the text that pruners and quantizers measure inputs on",
    "data": "what tuning and distillation train on",
    "trainer": "the devices they train on",
    "eval": "how every checkpoint is measured",
    "task": "what an encoder does",
    "hparams_search": "a search for the best settings",
}
# groups that experiment files are made of, and that few people type
HELPERS = ("texts", "chain", "sizes", "command", "experiment")
# how the page names what a field's annotation says
TYPES = {
    "int": "integer",
    "float": "number",
    "bool": "true, false",
    "str": "text",
    "list": "list",
    "list[int]": "list of integers",
    "list[str]": "list of texts",
    "list[float]": "list of numbers",
    "dict": "mapping",
    "Path": "path",
    "None": "null",
}
BAR = "\\|"  # a bar inside a cell
HEADER = """# All settings

Generated from the choice files in `slim/conf` \
by `python -m slim.cli.settings_page docs/settings.md`; do not edit.

Choose with `group=choice`, set with `group.setting=value`. \
A default of `${name}` is the value of that setting or group.
Where choices of one group differ, the choice stands next to the default or the meaning. \
`quant.` is short for `quantizer.`.
"""
COMMAND = re.compile(r"(python|torchrun|pip) |docs/|[a-z ]+: ?(eval|quant)")


@dataclass
class Entry:
    """A key of a choice file.

    Attributes:
        value: its plain value; None for a section.
        comment: what the file says about it, one line.
        children: the keys below it, where it is a section.
    """

    value: Any = None
    comment: str = ""
    children: dict[str, Entry] = field(default_factory=dict)


@dataclass
class Choice:
    """A choice of a group.

    Attributes:
        name: as it is typed.
        summary: what its file says first.
        entries: its settings.
        chooses: other choices that it makes, such as ``texts=hub``.
    """

    name: str
    summary: str
    entries: dict[str, Entry]
    chooses: list[str]


def read_entries(text: str) -> dict[str, Entry]:
    """Parse a choice file together with its comments.

    A comment belongs to a setting if it stands directly above it or after it on the same line.
    Settings that follow without a comment of their own share the one above.

    Args:
        text: content of the file.

    Returns:
        key -> entry, in the file's order.
    """
    root = yaml.compose(text)
    if not isinstance(root, yaml.MappingNode):  # a file of comments
        return {}
    return _section(root, text.splitlines())


def _section(node: yaml.MappingNode, lines: list[str]) -> dict[str, Entry]:
    entries: dict[str, Entry] = {}
    above, previous_line = "", -2
    for key, value in node.value:
        line = key.start_mark.line
        # a comment above also speaks of the settings that follow at once without one
        if line != previous_line + 1 or _comment_above(lines, line):
            above = _comment_above(lines, line)
        entry = Entry(comment=_comment_after(lines[line], value, line) or above)
        if isinstance(value, yaml.MappingNode) and not value.flow_style:
            entry.children = _section(value, lines)
        else:
            entry.value = yaml.safe_load(yaml.serialize(value))
        entries[key.value] = entry
        previous_line = line
    return entries


def _comment_above(lines: list[str], line: int) -> str:
    first = line
    while first > 0 and lines[first - 1].lstrip().startswith("#"):
        first -= 1
    if first == 0:  # what stands at the top speaks of the whole file
        return ""
    return " ".join(row.lstrip().removeprefix("#").strip() for row in lines[first:line])


def _comment_after(row: str, value: yaml.Node, line: int) -> str:
    if value.end_mark.line == line:  # a "#" inside a quoted value begins no comment
        row = row[value.end_mark.column :]
    return row.partition("#")[2].strip()


def summary(text: str) -> str:
    """Return the first sentences of a choice file: the comment at its top without commands."""
    words: list[str] = []
    for row in text.splitlines():
        if not row.startswith("#"):
            break
        content = row.removeprefix("#").strip()
        if content.startswith("@package"):
            continue
        if COMMAND.match(content):
            break
        words.append(content.partition(": python")[0])
    return re.sub(r" ?\(docs/[\w/.]+\)| docs/[\w/.]+$", "", " ".join(words))


def read_choice(group: str, name: str) -> Choice:
    """Read a choice of a group with everything its defaults list brings.

    Args:
        group: such as ``"pruner"``.
        name: such as ``"taylor"``.

    Returns:
        the choice; settings of the file itself win over those it builds on.
    """
    entries, chooses = _compose(group, name)
    text = (CONF / group / f"{name}.yaml").read_text(encoding="utf-8")
    return Choice(name, summary(text), entries, chooses)


def _compose(group: str, name: str) -> tuple[dict[str, Entry], list[str]]:
    """Return the entries of a file merged over those of its defaults list, and what it chooses."""
    entries = read_entries((CONF / group / f"{name}.yaml").read_text(encoding="utf-8"))
    defaults = entries.pop("defaults", Entry(value=[])).value
    entries.pop("hydra", None)
    merged: dict[str, Entry] = {}
    chooses: list[str] = []
    notes = True  # whether comments of the file win over those it builds on
    for item in defaults:
        if isinstance(item, dict):
            chooses += _chosen(item)
        elif item != "_self_":
            path, _, package = item.partition("@")
            folder, _, base = path.rpartition("/")
            below, more = _compose(folder.strip("/") or group, base)
            if package not in ("", "_here_"):
                below = {package: Entry(children=below)}
            merged = _merge(merged, below)
            chooses += more
            # a preset says why it sets a value; what the setting means stands in the full file
            notes = base.startswith("_")
    # whatever the order in the list: a file that builds on another wants its own values
    return _merge(merged, entries, notes), chooses


def _chosen(item: dict) -> list[str]:
    chosen = []
    for key, choice in item.items():
        target = key.removeprefix("override ").strip("/").partition("@")[0]
        if not target.startswith("hydra"):
            chosen.append(f"{target}={choice}")
    return chosen


def _merge(base: dict[str, Entry], over: dict[str, Entry], notes: bool = True) -> dict[str, Entry]:
    merged = dict(base)
    for key, entry in over.items():
        below = base.get(key, Entry())
        comment = entry.comment or below.comment
        if not notes:
            comment = below.comment or entry.comment
        merged[key] = Entry(entry.value, comment, _merge(below.children, entry.children, notes))
    return merged


def type_of(target: Any, name: str, value: Any) -> list[str]:
    """Return a setting's types in words.

    Args:
        target: the class that takes the setting, or None.
        name: the setting.
        value: its default, which speaks where the class does not.
    """
    annotation = type(value).__name__
    if value is None:
        annotation = "str | None"
    for known in _fields(target):
        if known.name == name:
            annotation = str(known.type)
    types = []
    for part in annotation.split("|"):
        types.append(TYPES.get(part.strip()) or _setting_class(part.strip()))
    return types


def _fields(target: Any) -> list[dataclasses.Field]:
    """Return the fields of a class, or of the classes that a function chooses between."""
    if dataclasses.is_dataclass(target):
        return list(dataclasses.fields(target))
    if target is None:
        return []
    fields = []
    for known in vars(sys.modules[target.__module__]).values():
        if dataclasses.is_dataclass(known) and known.__module__ == target.__module__:
            fields += dataclasses.fields(known)
    return fields


def _setting_class(annotation: str) -> str:
    if annotation.startswith(("list", "tuple", "Sequence")):
        return "list"
    if annotation.startswith(("dict", "Mapping")):
        return "mapping"
    return "settings"


@dataclass
class Row:
    """A setting on the page.

    Attributes:
        types: its types, several where choices differ.
        defaults: default -> the choices that have it.
        meanings: meaning -> the choices that have it.
    """

    types: list[str] = field(default_factory=list)
    defaults: dict[str, list[str]] = field(default_factory=dict)
    meanings: dict[str, list[str]] = field(default_factory=dict)

    def add(self, choice: str, types: list[str], default: str, meaning: str) -> None:
        """Take what one choice says of the setting.

        Args:
            choice: its name.
            types: that its value may have.
            default: its value as the page shows it.
            meaning: its comment; empty where it has none.
        """
        self.types = list(dict.fromkeys([*self.types, *types]))  # without repeats, in order
        self.defaults.setdefault(default, []).append(choice)
        if meaning:
            self.meanings.setdefault(meaning, []).append(choice)

    def cells(self) -> list[str]:
        """Return the cells for type, default and meaning."""
        types = sorted(self.types, key=lambda name: name == "null")
        return [" or ".join(types), _by_choice(self.defaults), _by_choice(self.meanings)]


def _by_choice(values: dict[str, list[str]]) -> str:
    """Join different values of several choices; the commonest one stands without their names."""
    if len(values) < 2:
        return "".join(values)
    commonest = max(values, key=lambda value: len(values[value]))
    lines = [commonest]
    for value, choices in values.items():
        if value != commonest:
            lines.append(f"{value} (`{'`, `'.join(choices)}`)")
    return "<br>".join(lines)


def collect(rows: dict[str, Row], choice: str, path: str, entries: dict[str, Entry]) -> None:
    """Add the settings of a choice to the rows of its group.

    Args:
        rows: full name -> row; filled here.
        choice: its name.
        path: what stands in front of the names, such as ``"eval.perplexity"``.
        entries: the settings at this place.
    """
    target = _target(entries)
    for name, entry in entries.items():
        if name.startswith("_"):
            continue
        full = f"{path}.{name}".removeprefix(".")
        if entry.children:
            collect(rows, choice, full, entry.children)
            continue
        types = type_of(target, name, entry.value)
        if "settings" in types and not entry.comment:
            entry.comment = "null: none of the settings below"
        rows.setdefault(full, Row()).add(choice, types, shown(entry.value), entry.comment)


def _target(entries: dict[str, Entry]) -> Any:
    from hydra.utils import get_object

    if "_target_" not in entries:
        return None
    return get_object(entries["_target_"].value)


def shown(value: Any) -> str:
    """Show a default as it is typed."""
    if isinstance(value, str) and value.strip():
        return f"`{value}`"
    return f"`{json.dumps(value)}`"


def table(rows: dict[str, Row]) -> list[str]:
    """Return the lines of a group's table."""
    lines = ["| setting | type | default | meaning |", "| --- | --- | --- | --- |"]
    sections = list(dict.fromkeys(section(name) for name in rows))
    for name in sorted(rows, key=lambda name: sections.index(section(name))):
        kind, default, meaning = rows[name].cells()
        lines.append(f"| `{name}` | {kind} | {default} | {meaning.replace('|', BAR)} |")
    return lines


def section(name: str) -> str:
    """Return the first two parts of a setting's name: rows below a section stay together."""
    return ".".join(name.split(".")[:2])


def choice_names(group: str) -> list[str]:
    """Return the choices that people type: neither bases nor those that experiments alone use."""
    paths = sorted((CONF / group).glob("*.yaml"))
    return [path.stem for path in paths if not path.stem.startswith("_")]


def group_lines(group: str) -> list[str]:
    """Return the lines of a group: its choices and its settings."""
    lines = [f"## {group}: {GROUPS[group]}", "", "| choice | what it is |", "| --- | --- |"]
    rows: dict[str, Row] = {}
    for name in choice_names(group):
        choice = read_choice(group, name)
        text = choice.summary.rstrip(".") + "."
        if choice.chooses:
            text += f" Chooses `{'`, `'.join(choice.chooses)}`."
        lines.append(f"| `{name}` | {text.replace('|', BAR)} |")
        # files for the whole configuration name their group themselves
        placed = choice.entries
        if group != "hparams_search" and not (group in placed and placed[group].children):
            placed = {group: Entry(children=placed)}
        for key, entry in placed.items():
            if entry.children:
                collect(rows, name, key, entry.children)
    return [*lines, "", *table(rows), ""]


def general_lines() -> list[str]:
    """Return the lines of the settings outside groups."""
    rows: dict[str, Row] = {}
    entries = read_entries((CONF / "base.yaml").read_text(encoding="utf-8"))
    for key in ("defaults", "hydra"):  # how the file is composed, and Hydra's own settings
        entries.pop(key, None)
    collect(rows, "", "", entries)
    return ["## General", "", *table(rows), ""]


def helper_lines() -> list[str]:
    """Return the lines of the groups that experiment files are made of."""
    lines = ["## What experiments are made of", ""]
    lines += ["[The studies as experiments](studies.md) has more on these groups.", ""]
    for group in HELPERS:
        names = []
        for path in sorted((CONF / group).rglob("*.yaml")):
            names.append(path.relative_to(CONF / group).with_suffix("").as_posix())
        lines.append(f"- `{group}`: `{'`, `'.join(names)}`")
    lines.append("")
    return lines


def page() -> str:
    """Return the page as Markdown."""
    lines = [HEADER, *general_lines()]
    for group in GROUPS:
        lines += group_lines(group)
    return "\n".join([*lines, *helper_lines()])


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(page(), encoding="utf-8")

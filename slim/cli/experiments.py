"""Experiment files are read by people and by Hydra, which merges a misspelt setting without a word:
names are checked here.

Looked at are the groups and choices of the defaults list, the settings in the body, and what the
sweep varies."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from slim.chain.compose import config_dirs
from slim.core.errors import SlimError, did_you_mean

ENTRY = re.compile(r"^(?:override\s+)?(?:optional\s+)?/?([\w/]+)(?:@[\w.]+)?$")
INTERPOLATION = re.compile(r"\$\{[^}]*\}")
COMMANDS = ("base", "compress", "train", "evaluate")
# some ten times faster where PyYAML was built with it
LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def check_experiments(arguments: list[str], conf: Path, command: str = "compress") -> None:
    """Check the files of ``experiment=...`` on a command line.

    ``--config-dir FOLDER`` adds files of one's own; with ``hydra.searchpath`` Hydra alone knows
    where to look.

    Args:
        arguments: what was typed.
        conf: slim's own folder of choices.
        command: ``compress``, ``train`` or ``evaluate``.

    Raises:
        SlimError: naming the file and what is unknown in it, or the experiments there are.
    """
    folders = [conf, *config_dirs(arguments)]
    # then a name that is not found here may still exist, and Hydra has to tell
    elsewhere = any(argument.lstrip("+").startswith("hydra.searchpath") for argument in arguments)
    for name in chosen_experiments(arguments):
        exists = False
        for folder in folders:
            path = folder / "experiment" / f"{name}.yaml"
            if path.is_file():
                exists = True
                ExperimentFile(path, folders, command).check()
        if not exists and not elsewhere:
            known = known_experiments(folders)
            hint = did_you_mean(name, known)
            raise SlimError(
                f"experiment={name} does not exist. There are: {', '.join(known)}.{hint}"
            )


def chosen_experiments(arguments: list[str]) -> list[str]:
    """Return the experiments that are typed, several with ``-m``."""
    names = []
    for argument in arguments:
        key, _, value = argument.lstrip("+").partition("=")
        if key != "experiment":
            continue
        for name in value.split(","):
            if name.strip() not in ("null", ""):  # no experiment is a choice, too
                names.append(name.strip())
    return names


def known_experiments(folders: list[Path]) -> list[str]:
    """Return the names of all experiments in some folders of choices."""
    names = []
    for folder in folders:
        for path in sorted(folder.glob("experiment/**/*.yaml")):
            names.append(path.relative_to(folder / "experiment").with_suffix("").as_posix())
    return names


class ExperimentFile:
    """One experiment file.

    Args:
        path: of the file.
        folders: where groups and choices are looked for.
        command: the one it is to run under.
    """

    def __init__(self, path: Path, folders: list[Path], command: str):
        self.path = path
        self.folders = folders
        self.command = command
        content = load(path)
        defaults = content.pop("defaults", None) or []
        # a plain text (_self_) names no choice
        self.entries = [entry for entry in defaults if isinstance(entry, dict)]
        self.hydra = content.pop("hydra", None) or {}
        self.body = content

    @cached_property
    def groups(self) -> list[str]:
        """The groups there are."""
        names = set()
        for folder in self.folders:
            # a folder of one's own may bring groups that slim does not have
            names |= {path.name for path in folder.iterdir() if path.is_dir()}
        return sorted(names - {"hydra", "experiment", "__pycache__"})

    def check(self) -> None:
        """Raise ``SlimError`` for the first name that does not exist."""
        for entry in self.entries:
            for key, choices in entry.items():
                self.check_entry(str(key), choices)
        for key, value in self.body.items():
            if key not in self.groups and key not in self.top_level():
                self.fail(
                    f"there is no group or setting '{key}'", [*self.groups, *self.top_level()], key
                )
            known = self.settings(key)
            # nothing is known of a group that has no settings, such as one of strings
            if isinstance(value, dict) and known:
                for name in value:
                    self.check_setting(key, name, known)
        params = (self.hydra.get("sweeper") or {}).get("params") or {}
        for key, values in params.items():
            self.check_swept(str(key), values)

    def check_entry(self, key: str, choices) -> None:
        """Check one entry of the defaults list.

        Args:
            key: such as ``override /pruner``.
            choices: the choice, or a list of several.
        """
        entry = ENTRY.match(key)
        if entry is None or entry.group(1).startswith("hydra/"):  # Hydra checks its own
            return
        group = entry.group(1)
        if group.split("/")[0] not in [*self.groups, "experiment"]:
            self.fail(f"there is no group '{group}'", self.groups, group)
        if key.startswith("override") and group not in self.used_groups(self.command):
            fitting = []
            for command in COMMANDS[1:]:
                if group in self.used_groups(command):
                    fitting.append(f"{command}.py")
            self.fail(
                f"{self.command}.py has no group '{group}', so this experiment is none for it",
                fitting,
                "",
                "Use",
            )
        if not isinstance(choices, list):
            choices = [choices]
        for choice in choices:
            self.check_choice(group, choice)

    def used_groups(self, command: str) -> set[str]:
        """Return the groups a command has."""
        groups = set()
        for path in self.files(command):
            for entry in load(path).get("defaults", []):
                if not isinstance(entry, dict):
                    continue
                for key in entry:
                    groups.add(str(key).removeprefix("/").split("@")[0])
        return groups

    def check_choice(self, group: str, choice) -> None:
        """Check that a group has a choice.

        Args:
            group: its name.
            choice: one that depends on another group's may be any that fits.
        """
        # ${model} in a choice stands for any name: which one is known when all are chosen
        if choice is None or any(self.files(f"{group}/{INTERPOLATION.sub('*', str(choice))}")):
            return
        known = sorted(path.stem for path in self.files(f"{group}/*"))
        self.fail(f"there is no {group}={choice}", known, str(choice).rpartition("/")[2])

    def check_setting(self, group: str, name: str, known: list[str]) -> None:
        """Check that some choice of a group has a setting.

        Args:
            group: its name.
            name: of the setting.
            known: all settings of the group's choices.
        """
        if name not in known:
            self.fail(f"{group} has no setting '{name}'", known, name)

    def check_swept(self, key: str, values) -> None:
        """Check a setting of the sweep, and its values where they are choices of a group.

        Args:
            key: such as ``quant.bits``.
            values: as the file has them.
        """
        group, _, setting = re.sub(r"^quant(?=\.|$)", "quantizer", key.lstrip("+")).partition(".")
        if group not in self.groups and group not in self.top_level():
            self.fail(
                f"the sweep varies '{key}', which does not exist",
                [*self.groups, *self.top_level()],
                group,
            )
        elif setting and self.settings(group):
            self.check_setting(group, setting.split(".")[0], self.settings(group))
        # with "(" it is a function of Hydra's, such as choice(...) or range(...)
        elif not setting and group in self.groups and isinstance(values, str) and "(" not in values:
            for choice in values.split(","):
                self.check_choice(group, choice.strip())

    def files(self, pattern: str) -> Iterator[Path]:
        """Yield the files of choices that fit a pattern such as ``eval/*/thesis``."""
        for folder in self.folders:
            yield from folder.glob(f"{pattern}.yaml")

    def top_level(self) -> list[str]:
        """Return the settings outside groups: those of the commands, and those that choices for all
        groups bring."""
        names = {"quant"}
        for path in self.command_files():
            names |= set(load(path))
        for path in self.files("*/*"):
            if path.parent.name != "experiment" and is_global(path):
                names |= set(load(path))
        return sorted(names - {"defaults", "hydra"} - set(self.groups))

    def command_files(self) -> Iterator[Path]:
        """Yield the files of the commands and what they share."""
        for name in COMMANDS:
            yield from self.files(name)

    def settings(self, key: str) -> list[str]:
        """Return the settings that any choice of a group has, or those below a setting of the
        commands; empty if unknown."""
        group = key
        if key == "quant":
            group = "quantizer"
        names = set()
        for settings in self.bodies(group):
            if isinstance(settings, dict):
                names |= set(settings)
        names.discard("defaults")
        return sorted(name for name in names if not name.startswith("_"))

    def bodies(self, group: str) -> Iterator[Any]:
        """Yield what the files of a group say of it, or the commands of what is no group."""
        if group not in self.groups:
            for path in self.command_files():
                yield load(path).get(group)
            return
        for pattern in (f"{group}/*", f"{group}/*/*"):
            for path in self.files(pattern):
                content = load(path)
                yield content.get(group) if is_global(path) else content

    def fail(
        self, problem: str, known: Iterable[str], word: str, there_are: str = "There are"
    ) -> None:
        """Refuse the file.

        Args:
            problem: what is wrong in it.
            known: names that would do.
            word: the name that does not exist.
            there_are: what stands in front of the names.

        Raises:
            SlimError: always, with the file's name.
        """
        shown = "/".join(self.path.parts[self.path.parts.index("experiment") - 1 :])
        hint = did_you_mean(word, known)
        raise SlimError(f"{shown}: {problem}. {there_are}: {', '.join(known)}.{hint}")


def load(path: Path) -> dict:
    """Return the content of a configuration file. Raises ``SlimError`` where it is no mapping in
    YAML."""
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), LOADER)
    except yaml.YAMLError as error:
        raise SlimError(f"{path}: not YAML: {' '.join(str(error).split())[:300]}") from error
    if content is not None and not isinstance(content, dict):
        raise SlimError(
            f"{path}: settings (key: value) are needed, and this is a {type(content).__name__}."
        )
    return content or {}


def is_global(path: Path) -> bool:
    """Whether a choice's file speaks for all groups."""
    with path.open(encoding="utf-8") as file:
        return "_global_" in file.readline()

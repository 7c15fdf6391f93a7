"""Finding the YAML file of a task, without lm-eval's index of all tasks, which takes a quarter of a
minute to build.

A task is an embedded one (``tiny_facts``), a YAML file of one's own, or one that lm-eval ships. The
first two read their questions from JSON Lines next to the YAML file. Nothing here imports lm-eval,
so a wrong name is answered at once."""

from __future__ import annotations

import difflib
import importlib.metadata
import importlib.util
import re
from collections.abc import Iterable
from functools import cache
from pathlib import Path

import yaml

from slim.core.errors import SlimError
from slim.core.io import sha256
from slim.data.files import json_rows
from slim.data.text import ASSETS

EMBEDDED = ASSETS / "tiny_world"
ENDINGS = (".yaml", ".yml")
# names of tasks and groups are read by lines: parsing fourteen thousand files would take minutes
TASK_LINE = re.compile(r"""^task:[ \t]*["']?([\w.:-]+)["']?[ \t]*(?:#.*)?$""", re.MULTILINE)
GROUP_LINE = re.compile(r"""^group:[ \t]*["']?([\w.:-]+)["']?[ \t]*(?:#.*)?$""", re.MULTILINE)
# a Python function in a file next to the task file; the group is its module
FUNCTION = re.compile(r"!function\s+([\w.]+)\.\w+")


class _PlainLoader(yaml.SafeLoader):
    """Reads a task file without running the code that its ``!function`` tags name."""


_PlainLoader.add_multi_constructor("!", lambda loader, suffix, node: f"!{suffix} {node.value}")


def find_task(name: str) -> Path:
    """Find the YAML file of a task.

    Args:
        name: of a task, or a YAML file.

    Returns:
        The file: embedded tasks come before those that lm-eval ships.

    Raises:
        SlimError: with the nearest names, when there is none.
    """
    if name.endswith(ENDINGS):
        path = Path(name).expanduser()
        if not path.is_file():
            raise SlimError(f"There is no task file {name}.")
        return path.resolve()  # "./task.yaml" and "task.yaml" are one task
    return embedded_tasks().get(name) or _shipped_task(name)


def is_local(path: Path) -> bool:
    """Return whether a task file is embedded or the user's own, rather than one that lm-eval
    ships."""
    return shipped_folder() not in path.parents


def embedded_tasks() -> dict[str, Path]:
    """Return name -> YAML file of the tasks that come with slim."""
    tasks = {}
    for path in sorted(EMBEDDED.glob("*.yaml")):
        for name in _names(path, TASK_LINE):
            tasks[name] = path
    return tasks


@cache
def shipped_folder() -> Path:
    """Return the folder of lm-eval's task files, found without importing it."""
    package = importlib.util.find_spec("lm_eval")
    if package is None:
        raise SlimError("The tasks need lm-eval, which is not installed: pip install lm-eval")
    return Path(package.submodule_search_locations[0]).resolve() / "tasks"


def harness_version() -> str:
    """Return the installed version of lm-eval."""
    return importlib.metadata.version("lm_eval")


@cache
def _shipped_task(name: str) -> Path:
    files = sorted(shipped_folder().rglob("*.yaml"))
    # most tasks are named like their file; reading all fourteen thousand takes longer
    for path in files:
        if path.stem == name and name in _names(path, TASK_LINE):
            return path
    tasks, groups = _index(files)
    if name not in tasks:
        raise _unknown(name, [*embedded_tasks(), *sorted(tasks)], groups)
    return tasks[name]


def _index(files: list[Path]) -> tuple[dict[str, Path], set[str]]:
    """Read all files; return task -> the first file that defines it, and the names of groups."""
    tasks: dict[str, Path] = {}
    groups: set[str] = set()
    for path in files:
        content = path.read_text(encoding="utf-8", errors="replace")
        groups.update(GROUP_LINE.findall(content))
        for name in TASK_LINE.findall(content):
            tasks.setdefault(name, path)  # in the order of paths, so the same every time
    return tasks, groups


def _unknown(name: str, known: list[str], groups: set[str]) -> SlimError:
    if name in groups:
        return _group_named(name, known)
    nearest = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    hint = ""
    if nearest:
        hint = f" Nearest: {', '.join(nearest)}."
    embedded = ", ".join(embedded_tasks()) or "none"
    return SlimError(
        f"There is no task '{name}'.{hint} Embedded: {embedded}. A YAML file of your own works too."
    )


def _group_named(name: str, known: list[str]) -> SlimError:
    # a group's tasks are mostly named after it
    members = [task for task in known if task.startswith(name + "_")]
    examples = ""
    if members:
        examples = f", such as {', '.join(members[:3])}"
    return SlimError(f"'{name}' is a group of tasks in lm-eval. Name its single tasks{examples}.")


def _names(path: Path, pattern: re.Pattern) -> list[str]:
    """Return what a line of a YAML file names; parsing all of them would take minutes."""
    return pattern.findall(path.read_text(encoding="utf-8", errors="replace"))


def read_plain(path: Path) -> dict:
    """Read a task file with what it includes, its functions as plain text.

    Args:
        path: the YAML file.

    Returns:
        Its settings, which come before those of included files.

    Raises:
        SlimError: when it cannot be read or holds no settings.
    """
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=_PlainLoader)
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise SlimError(
            f"Cannot read the task file {path}: {str(error).splitlines()[0]}"
        ) from error
    if not isinstance(content, dict):
        raise SlimError(f"{path} is not a task file: it holds no settings.")
    # lm-eval's order: what the file itself says overrides what it includes
    merged: dict = {}
    for included in _as_list(content.pop("include", [])):
        merged.update(read_plain(path.parent / included))
    merged.update(content)
    return merged


def task_name(path: Path) -> str:
    """Return the name that a task file gives its task.

    Raises:
        SlimError: when it gives none.
    """
    name = read_plain(path).get("task")
    if not isinstance(name, str):
        raise SlimError(f"{path} is not a task file: it has no line 'task: NAME'.")
    return name


def data_files(path: Path) -> dict[str, list[Path]]:
    """Return the local data files of a task file.

    ``data_files`` are relative to the task file, and as ``dataset_path: json`` of the datasets
    library takes them: a name, a list, or one of both per split.

    Args:
        path: the YAML file.

    Returns:
        Split -> files; empty where the data come from the hub.

    Raises:
        SlimError: when a file is missing.
    """
    config = read_plain(path)
    files = (config.get("dataset_kwargs") or {}).get("data_files")
    if config.get("dataset_path") != "json" or not files:
        return {}
    # files without a split are the training split, as the datasets library reads them
    if not isinstance(files, dict):
        files = {"train": files}
    by_split = {}
    for split, names in files.items():
        by_split[split] = [path.parent / name for name in _as_list(names)]
        for file in by_split[split]:
            if not file.is_file():
                raise SlimError(
                    f"The task file {path} names the data file {file}, which is not there."
                )
    return by_split


def read_rows(files: Iterable[Path]) -> list[dict]:
    """Read JSON Lines files.

    Args:
        files: one after the other.

    Returns:
        Their rows, which all have the fields of the first.

    Raises:
        SlimError: naming file and line of what is no JSON object or has other fields; also when
            there are no rows.
    """
    rows: list[dict] = []
    for path in files:
        for place, row in json_rows(path):
            # datasets would fill the gaps with None, and a template would ask "None"
            if rows and row.keys() != rows[0].keys():
                raise SlimError(
                    f"{path}, {place}: expected a JSON object with the fields: "
                    f"{', '.join(rows[0])}. It has: {', '.join(row) or 'none'}."
                )
            rows.append(row)
    if not rows:
        raise SlimError(f"There are no questions in {', '.join(map(str, files))}.")
    return rows


def fingerprint(name: str) -> dict:
    """Return what determines a task's questions and scoring, as plain JSON values.

    For one that lm-eval ships its name; for a local one the checksums of its YAML, data and code
    files."""
    path = find_task(name)
    # its files come with lm-eval, whose version is part of the key
    if not is_local(path):
        return {"task": name}
    files = {path} | _included(path)
    for data in data_files(path).values():
        files.update(data)
    checksums = {file.name: sha256(file) for file in sorted(files)}
    return {"task": task_name(path), "files": checksums}


def _included(path: Path) -> set[Path]:
    """Return the YAML and Python files that a task file refers to, at any depth."""
    content = yaml.load(path.read_text(encoding="utf-8"), Loader=_PlainLoader) or {}
    files = set()
    for module in _names(path, FUNCTION):
        files.add(path.parent / f"{module.replace('.', '/')}.py")
    for name in _as_list(content.get("include", [])):
        included = path.parent / name
        files |= {included} | _included(included)
    # a function may also come from an installed package
    return {file for file in files if file.is_file()}


def _as_list(value) -> list:
    if isinstance(value, list):
        return list(value)
    return [value]

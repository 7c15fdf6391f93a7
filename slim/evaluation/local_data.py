"""Questions of stock tasks from local files, one JSON Lines file per task in the schema of its data
set on the hub.

In a folder, ``<task>.jsonl`` holds the questions that are asked (the task's test split, else its
validation split) and ``<task>_train.jsonl``, if it is there, the examples for few-shot prompts.
Nothing here imports lm-eval: what is missing is said before any work, with the file and the line.
"""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

from slim.core.errors import SlimError
from slim.evaluation.task_files import FUNCTION, read_plain, read_rows

# names under which a task's questions are known besides its own
OTHER_NAMES = {"wikitext": ("wikitext2_raw_test",)}
SPLITS = ("training_split", "validation_split", "test_split", "fewshot_split")
TEMPLATES = ("doc_to_text", "doc_to_target", "doc_to_choice")


def local_files(task: str, folder: str | Path, config: dict) -> dict[str, list[Path]]:
    """Find the local files of a stock task.

    Args:
        task: its name.
        folder: where ``<task>.jsonl`` and, if there are examples, ``<task>_train.jsonl`` lie.
        config: the task's settings, of which the names of its splits are read.

    Returns:
        Split -> files.

    Raises:
        SlimError: when the folder or the file with the questions is not there.
    """
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise SlimError(
            f"eval.local_data={folder} is not a folder. Give one with a file TASK.jsonl for each "
            "task."
        )
    questions = _questions_file(task, folder)
    if questions is None:
        there = ", ".join(sorted(path.name for path in folder.glob("*.jsonl"))) or "no .jsonl file"
        raise SlimError(
            f"eval.local_data={folder} has no {task}.jsonl for the task '{task}'. There: {there}. "
            "Add the file, name other tasks, or eval.local_data=null to take the hub's data."
        )
    # as lm-eval does: questions are those of the test split where a task has one
    asked_split = config.get("test_split") or config["validation_split"]
    examples_split = config.get("fewshot_split") or config.get("training_split")
    files = {asked_split: [questions]}
    examples = folder / f"{task}_train.jsonl"
    # a task that draws its examples from the questions themselves needs no other file
    if examples.is_file() and examples_split and examples_split not in files:
        files[examples_split] = [examples]
    return files


def _questions_file(task: str, folder: Path) -> Path | None:
    for name in (task, *OTHER_NAMES.get(task, ())):
        path = folder / f"{name}.jsonl"
        if path.is_file():
            return path
    return None


def use_local_files(config: dict, files: dict[str, list[Path]]) -> dict:
    """Make a task read local files instead of the hub's data.

    Args:
        config: the task's settings, which stay as they are.
        files: split -> files.

    Returns:
        A copy of the settings without what names the hub's data, and without the splits that have
        no file: lm-eval would look for their questions.
    """
    local = dict(config)
    for key in ("dataset_kwargs", "dataset_name"):
        local.pop(key, None)
    for key in SPLITS:
        if local.get(key) and local[key] not in files:
            del local[key]
    return local


def check_rows(path: Path, files: dict[str, list[Path]]) -> None:
    """Check the questions of a task before anything else is loaded.

    Args:
        path: the task file.
        files: split -> files with its questions.

    Raises:
        SlimError: naming file, line and field, when a row lacks a field that the task file reads,
            or has an empty answer to choose.
    """
    needed = required_fields(path)
    config = read_plain(path)
    for paths in files.values():
        rows = read_rows(paths)  # all rows have the fields of the first
        choices = _named_field(config, "doc_to_choice", rows[0])
        if choices is not None:
            check_choices(paths, rows, choices, _named_field(config, "doc_to_target", rows[0]))
        missing = sorted(needed.difference(rows[0]))
        if missing:
            raise SlimError(
                f"{paths[0]}, line 1: the field '{missing[0]}' is missing (has: "
                f"{', '.join(rows[0])}). "
                f"The task {config.get('task')} needs: {', '.join(sorted(needed))}."
            )


def _named_field(config: dict, setting: str, row: dict) -> str | None:
    """Return the field that a setting names, where it is a name and no template, else None."""
    name = config.get(setting)
    if isinstance(name, str) and name in row:
        return name
    return None


def check_choices(paths: list[Path], rows: list[dict], name: str, target: str | None) -> None:
    """Raise ``SlimError`` for a row whose answers are no texts, or of which none is the right one.

    Args:
        paths: the files that the rows are from.
        rows: the questions.
        name: field of the answers to choose from.
        target: field that says which is right, None where no field does.
    """
    for number, row in enumerate(rows, 1):
        problem = choices_problem(row, name, target)
        if problem is not None:
            raise SlimError(
                f"{', '.join(map(str, paths))}, row {number}: {problem}. "
                "Correct it, or leave the question out."
            )


def choices_problem(row: dict, name: str, target: str | None) -> str | None:
    """Say what is wrong with the answers of a question.

    Args:
        row: the question.
        name: field of the answers to choose from.
        target: field that says which is right, by its text or its number; None where none does.

    Returns:
        The problem as a clause for a message; None if there is none.
    """
    answers = row[name]
    if not isinstance(answers, list) or not answers:
        return f"the field '{name}' is no list of answers"
    for answer in answers:
        if not isinstance(answer, str) or not answer.strip():
            return f"the field '{name}' has an answer that is empty or no text"
    if not target:
        return None
    right = row[target]
    # numbers are also written as texts: "2"
    if isinstance(right, str) and right.isdigit():
        right = int(right)
    if right in answers or (isinstance(right, int) and 0 <= right < len(answers)):
        return None
    return f"the field '{target}' is {right!r}, which is none of the {len(answers)} choices"


@cache
def required_fields(path: Path) -> frozenset[str]:
    """Return the fields of a row that the task file reads, as far as its templates and functions
    say so plainly."""
    config = read_plain(path)
    if config.get("process_docs"):  # the templates read what this function makes of a row
        return frozenset(_function_fields(path, config["process_docs"]))
    fields: set[str] = set()
    for key in (*TEMPLATES, "process_results"):
        value = config.get(key)
        if not isinstance(value, str):
            continue
        if FUNCTION.match(value):
            fields |= _function_fields(path, value)
        # a template that asks whether a field is there works without it
        elif "{{" in value and " is defined" not in value:
            fields |= _template_fields(value)
        elif value.isidentifier():
            fields.add(value)
    return frozenset(fields)


def _template_fields(template: str) -> set[str]:
    from jinja2 import Environment, TemplateError, meta

    try:
        return meta.find_undeclared_variables(Environment().parse(template))
    except TemplateError:
        return set()


def _function_fields(path: Path, tag: str) -> set[str]:
    """Return the constant keys by which a function in a Python file next to the task reads rows;
    it is not run."""
    module, _, name = tag.removeprefix("!function").strip().rpartition(".")
    source = path.parent / f"{module.replace('.', '/')}.py"
    if not source.is_file():
        return set()
    tree = ast.parse(source.read_text(encoding="utf-8"))
    for statement in tree.body:
        if isinstance(statement, ast.FunctionDef) and statement.name == name:
            keys = map(_key, ast.walk(statement))
            return set(keys) - {None}
    return set()


def _key(node: ast.AST) -> str | None:
    """Return k for ``doc["k"]``, and None for anything else."""
    # doc["k"] = ... sets a field of its own and needs none
    if not isinstance(node, ast.Subscript) or not isinstance(node.ctx, ast.Load):
        return None
    of_row = isinstance(node.value, ast.Name) and node.value.id == "doc"
    if of_row and isinstance(node.slice, ast.Constant):
        return node.slice.value
    return None

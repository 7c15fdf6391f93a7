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
    """Return split -> files for the stock task ``task`` with the settings ``config``.

    Raises ``SlimError`` if the folder or the file with the questions is not there.
    """
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise SlimError(
            f"eval.local_data={folder} is not a folder. Give one with a file TASK.jsonl for each "
            "task."
        )
    candidates = [folder / f"{name}.jsonl" for name in (task, *OTHER_NAMES.get(task, ()))]
    asked = next((path for path in candidates if path.is_file()), None)
    if asked is None:
        there = ", ".join(sorted(path.name for path in folder.glob("*.jsonl"))) or "no .jsonl file"
        raise SlimError(
            f"eval.local_data={folder} has no {candidates[0].name} for the task '{task}'. There: "
            f"{there}. "
            "Add the file, name other tasks, or eval.local_data=null to take the hub's data."
        )
    files = {config.get("test_split") or config["validation_split"]: [asked]}
    examples, training = (
        folder / f"{task}_train.jsonl",
        config.get("fewshot_split") or config.get("training_split"),
    )
    if examples.is_file() and training and training not in files:
        files[training] = [examples]
    return files


def use_local_files(config: dict, files: dict[str, list[Path]]) -> dict:
    """Return a task's settings with those splits taken out that have no file."""
    config = {
        key: value for key, value in config.items() if key not in ("dataset_kwargs", "dataset_name")
    }
    missing = [key for key in SPLITS if config.get(key) and config[key] not in files]
    return {key: value for key, value in config.items() if key not in missing}


def check_rows(path: Path, files: dict[str, list[Path]]) -> None:
    """Raise ``SlimError`` naming file, line and field if a row lacks a field that the task file
    ``path`` reads, or has an empty answer to choose."""
    needed = required_fields(path)
    config = read_plain(path)
    choices, target = config.get("doc_to_choice"), config.get("doc_to_target")
    for paths in files.values():
        rows = read_rows(paths)  # all rows have the fields of the first
        if isinstance(choices, str) and choices in rows[0]:
            known = isinstance(target, str) and target in rows[0]
            check_choices(paths, rows, choices, target if known else None)
        missing = [name for name in sorted(needed) if name not in rows[0]]
        if missing:
            raise SlimError(
                f"{paths[0]}, line 1: the field '{missing[0]}' is missing (has: "
                f"{', '.join(rows[0])}). "
                f"The task {read_plain(path).get('task')} needs: {', '.join(sorted(needed))}."
            )


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
                f"{', '.join(str(path) for path in paths)}, row {number}: {problem}. "
                "Correct it, or leave the question out."
            )


def choices_problem(row: dict, name: str, target: str | None) -> str | None:
    """Return what is wrong with the answers of a question, or None."""
    answers = row[name]
    if not isinstance(answers, list) or not answers:
        return f"the field '{name}' is no list of answers"
    if not all(isinstance(answer, str) and answer.strip() for answer in answers):
        return f"the field '{name}' has an answer that is empty or no text"
    right = row[target] if target else 0
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
    found: set[str] = set()
    for key in (*TEMPLATES, "process_results"):
        value = config.get(key)
        if isinstance(value, str) and FUNCTION.match(value):
            found |= _function_fields(path, value)
        elif isinstance(value, str) and "{{" in value and " is defined" not in value:
            found |= _template_fields(value)
        elif isinstance(value, str) and value.isidentifier():
            found.add(value)
    return frozenset(found)


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
    body = next(
        (node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == name),
        None,
    )
    return set() if body is None else {_key(node) for node in ast.walk(body)} - {None}


def _key(node: ast.AST) -> str | None:
    """Return k for ``doc["k"]``, and None for anything else."""
    plain = (
        isinstance(node, ast.Subscript)
        and isinstance(node.value, ast.Name)
        and isinstance(node.slice, ast.Constant)
    )
    return (
        node.slice.value
        if plain and node.value.id == "doc" and isinstance(node.ctx, ast.Load)
        else None
    )

"""The files shipped with the package: held-out and calibration text, task sets for lm-eval,
conversations."""

from __future__ import annotations

import json
from collections.abc import Iterable
from itertools import islice
from pathlib import Path

from slim.tiny_world.world import World

FOLDER = Path(__file__).resolve().parent.parent / "assets" / "tiny_world"
TRAIN_CONVERSATIONS = 2000

# `data_files` is relative to the task file: whoever loads it makes it absolute.
TASK_FILE = """\
task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: multiple_choice
doc_to_text: "Question: {{{{question}}}}\\nAnswer:"
doc_to_choice: choices
doc_to_target: answer
target_delimiter: " "
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
  - metric: acc_norm
    aggregation: mean
    higher_is_better: true
metadata:
  version: 1.0
"""


def asset_files(world: World) -> dict[str, str]:
    """Return name and content of every file. The content depends on the world's seed alone."""
    files = {}
    for split in ("heldout", "calibration"):
        files[f"{split}.txt"] = "\n\n".join(world.documents(split)) + "\n"
    for name, questions in world.tasks().items():
        files[f"{name}.jsonl"] = _lines(questions)
        files[f"{name}.yaml"] = TASK_FILE.format(name=name, data=f"{name}.jsonl")
    files["conversations_train.jsonl"] = _conversations(_training_pairs(world))
    files["conversations_validation.jsonl"] = _conversations(world.conversations("validation"))
    return files


def _training_pairs(world: World) -> list[tuple[str, str]]:
    """Return the first distinct conversations of the endless ones."""
    # twice as many hold enough that are distinct
    drawn = islice(world.conversations("train"), 2 * TRAIN_CONVERSATIONS)
    return list(dict.fromkeys(drawn))[:TRAIN_CONVERSATIONS]


def _conversations(pairs: Iterable[tuple[str, str]]) -> str:
    records = []
    for question, answer in pairs:
        records.append({"instruction": question, "answer": answer})
    return _lines(records)


def write_assets(world: World, folder: Path = FOLDER) -> list[Path]:
    """Write the files of ``asset_files`` and return their paths.

    Args:
        world: gives their content.
        folder: made if it does not exist.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, content in asset_files(world).items():
        path = folder / name
        # bytes: on Windows a text file would get other ends of lines, and other checksums
        path.write_bytes(content.encode("utf-8"))
        paths.append(path)
    return paths


def _lines(records: Iterable[dict[str, object]]) -> str:
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)

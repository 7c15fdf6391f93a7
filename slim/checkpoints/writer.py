"""Writing a checkpoint folder: its configuration, its companions, and a copy with some blocks
only."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

from slim.checkpoints.checkpoint import COMPANIONS, Checkpoint
from slim.checkpoints.reader import TensorReader
from slim.checkpoints.shards import ShardWriter
from slim.core.io import read_json
from slim.models.heterogeneous import write_card


def copy_companions(source: Path, target: Path) -> None:
    """Copy tokenizer, chat templates, generation settings and licences unchanged.

    Where the config in ``target`` says that blocks differ, a model card is added that says how to
    load such a model.

    Args:
        source: The checkpoint folder to copy from.
        target: An existing folder.
    """
    for pattern in COMPANIONS:
        for path in source.glob(pattern):
            if path.is_file():
                copy = target / path.relative_to(source)
                copy.parent.mkdir(exist_ok=True)
                shutil.copyfile(path, copy)
    config = target / "config.json"
    if config.is_file() and read_json(config).get("per_layer_config"):
        write_card(target)


def write_config(config: dict, target: Path) -> None:
    """Write ``config.json``.

    Args:
        config: Its content.
        target: An existing folder.
    """
    (target / "config.json").write_text(
        json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8"
    )


def write_blocks(source: Checkpoint, target: Path, kept: list[int]) -> None:
    """Write a checkpoint with only some blocks, renumbered, their tensors unchanged.

    Args:
        source: The checkpoint.
        target: An existing, empty folder.
        kept: Numbers of the blocks that stay, in their new order.
    """
    spec = source.spec.with_blocks(kept)
    reader, writer = TensorReader(source), ShardWriter(target)
    for old, new in renumbered(source, kept):
        writer.add(new, reader.read(old))
    writer.close()
    write_config(spec.config, target)
    copy_companions(source.folder, target)


def renumbered(source: Checkpoint, kept: list[int]) -> Iterator[tuple[str, str]]:
    """Say which tensors stay when only some blocks do.

    Args:
        source: The checkpoint.
        kept: Numbers of the blocks that stay, in their new order.

    Yields:
        (old name, new name).
    """
    position = {old: new for new, old in enumerate(kept)}
    prefix = source.spec.family.blocks + "."
    for name in source.tensors:
        if not name.startswith(prefix):
            yield name, name
            continue
        block, rest = name[len(prefix) :].split(".", 1)
        if int(block) in position:
            yield name, f"{prefix}{position[int(block)]}.{rest}"

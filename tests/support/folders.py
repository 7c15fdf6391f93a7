"""Changing checkpoint folders: tensors, entries of the config, other JSON files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file


def change_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], dict]) -> Path:
    """Write the folder's only weight file again with other tensors.

    Args:
        folder: A checkpoint folder with ``model.safetensors``.
        change: Takes name -> tensor and returns what shall be written.
    """
    path = folder / "model.safetensors"
    tensors = change(load_file(path))
    tensors = {name: tensor.contiguous().clone() for name, tensor in tensors.items()}
    save_file(tensors, path, metadata={"format": "pt"})
    return folder


def rename_tensors(folder: Path, rename: Callable[[str], str]) -> Path:
    """Give every tensor of a folder another name."""
    return change_tensors(folder, lambda old: {rename(name): old[name] for name in old})


def change_json(path: Path, **entries) -> Path:
    """Set entries of a JSON file; ... removes one."""
    content = json.loads(path.read_text(encoding="utf-8"))
    for key, value in entries.items():
        if value is ...:
            content.pop(key, None)
        else:
            content[key] = value
    path.write_text(json.dumps(content), encoding="utf-8")
    return path.parent

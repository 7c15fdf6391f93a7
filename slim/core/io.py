"""Files: JSON, safetensors headers, SHA-256, and writing so that a file appears whole or not at
all."""

from __future__ import annotations

import hashlib
import json
import time
from pathlib import Path
from typing import TYPE_CHECKING

from slim.core.errors import SlimError

if TYPE_CHECKING:
    import torch

_sums: dict[tuple[int, int, int, int], str] = {}  # device, inode, size, time of change -> SHA-256


def read_json(path: Path) -> dict:
    """Read a JSON file. Raises ``SlimError`` naming the file if it cannot be read."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SlimError(f"Cannot read {path}: {error}") from error


def read_header(path: Path) -> dict[str, dict]:
    """Return the header of a safetensors file: tensor name -> dtype, shape, data_offsets.

    Raises ``SlimError`` if the file is shorter or longer than its header says, or is no safetensors
    file."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8:
            raise SlimError(
                f"{path} is truncated or no safetensors file ({size} bytes). Fetch or make it again."
            )
        try:
            header = json.loads(file.read(length))
        except ValueError as error:
            raise SlimError(f"{path} has a damaged header. Fetch or make it again.") from error
    header.pop("__metadata__", None)
    end = 8 + length + max((entry["data_offsets"][1] for entry in header.values()), default=0)
    if end != size:
        raise SlimError(
            f"{path} has {size} bytes where its header asks for {end}. Fetch or make it again."
        )
    return header


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file as 64 hex digits; read once per process, as long as the file
    keeps its time of change.

    A file that changed less than two seconds ago is read again: clocks of file systems may not tell
    two changes apart."""
    state = path.stat()
    key = (state.st_dev, state.st_ino, state.st_size, state.st_mtime_ns)
    if key in _sums:
        return _sums[key]
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if time.time() - state.st_mtime > 2:
        _sums[key] = found
    return found


def save_tensors(tensors: dict[str, torch.Tensor], path: Path) -> None:
    """Write a safetensors file. A full disk raises ``OSError`` like any other file operation."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file(tensors, path, metadata={"format": "pt"})
    except SafetensorError as error:  # the library hides the operating system's error in its text
        raise OSError(f"{error} while writing {path}") from error


def write_json(path: Path, value: dict) -> None:
    """Write a file, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    partial.replace(path)

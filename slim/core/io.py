"""Files: JSON, safetensors headers, SHA-256, and writing so that a file appears whole or not at
all."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from slim.core.errors import SlimError

if TYPE_CHECKING:
    import torch

# of safetensors' types; files may hold others
ITEM_BYTES = {
    "F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2,
    "U16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "I8": 1, "U8": 1, "BOOL": 1,
}  # fmt: skip
COMPARED_AT_ONCE = 2**24  # bytes
_same: dict[tuple, bool] = {}  # what same_data compared, by the files' states
PARTIAL = ".partial"  # end of the name of what is being written

_sums: dict[tuple[int, int, int, int], str] = {}  # device, inode, size, time of change -> SHA-256


def read_json(path: Path) -> dict:
    """Read a JSON file. Raises ``SlimError`` naming the file if it cannot be read."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SlimError(f"Cannot read {path}: {error}") from error


def read_object(path: Path) -> dict:
    """Return the content of a JSON file that must be an object.

    Args:
        path: The file.

    Raises:
        SlimError: It cannot be read, or holds something else.
    """
    content = read_json(path)
    if not isinstance(content, dict):
        raise SlimError(f"{path} must hold a JSON object. Fetch or make it again.")
    return content


def read_header(path: Path) -> dict[str, dict]:
    """Return the header of a safetensors file: tensor name -> dtype, shape, data_offsets.

    Raises ``SlimError`` if the file is shorter or longer than its header says, or is no safetensors
    file."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        # checked before it is read: in another kind of file the length may be anything
        if size < 8 or length > size - 8:
            raise SlimError(
                f"{path} is truncated or no safetensors file ({size} bytes). "
                "Fetch or make it again."
            )
        try:
            header = json.loads(file.read(length))
        except ValueError as error:
            raise SlimError(f"{path} has a damaged header. Fetch or make it again.") from error
    if not isinstance(header, dict):
        raise SlimError(f"{path} has a damaged header. Fetch or make it again.")
    header.pop("__metadata__", None)
    end = 8 + length + _end_of_data(path, header)
    if end != size:
        raise SlimError(
            f"{path} has {size} bytes where its header asks for {end}. Fetch or make it again."
        )
    return header


def _end_of_data(path: Path, header: dict[str, dict]) -> int:
    """Return where the last tensor ends; the library reads only tensors that follow one another.

    Raises:
        SlimError: An entry is incomplete, or there is a gap or an overlap.
    """
    spans = []
    sizes = {}  # name -> numbers that the tensor holds
    items = {}  # name -> bytes of one; None for types that later versions may add
    try:
        for name, entry in header.items():
            spans.append((*entry["data_offsets"], name))
            sizes[name] = math.prod(entry["shape"])
            items[name] = ITEM_BYTES.get(entry["dtype"])
        spans.sort()
    except (KeyError, TypeError, ValueError) as error:
        raise SlimError(f"{path} has a damaged header. Fetch or make it again.") from error
    end = 0
    for start, stop, name in spans:
        if start != end or stop < start:
            raise SlimError(
                f"{path} has invalid offsets: '{name}' begins at {start} where {end} is next. "
                "Fetch or make it again."
            )
        if items[name] is not None and stop - start != sizes[name] * items[name]:
            raise SlimError(
                f"{path} is damaged: '{name}' has {stop - start} bytes for {sizes[name]} numbers "
                f"of {items[name]}. Fetch or make it again."
            )
        end = stop
    return end


def same_data(first: Path, first_name: str, second: Path, second_name: str) -> bool:
    """Whether two tensors of safetensors files are the same bytes; read once per process.

    Args:
        first: A file.
        first_name: A tensor in it.
        second: Another file, or the same.
        second_name: A tensor in that.
    """
    key = (_state(first), first_name, _state(second), second_name)
    if key not in _same:
        _same[key] = _compare(first, first_name, second, second_name)
    return _same[key]


def _compare(first: Path, first_name: str, second: Path, second_name: str) -> bool:
    left, right = _data_of(first, first_name), _data_of(second, second_name)
    with left as (left_file, length), right as (right_file, right_length):
        if length != right_length:
            return False
        while length > 0:
            part = min(length, COMPARED_AT_ONCE)
            if left_file.read(part) != right_file.read(part):
                return False
            length -= part
    return True


def _state(path: Path) -> tuple[int, int, int, int]:
    """Return what tells one content of a file from another without reading it."""
    state = path.stat()
    return state.st_dev, state.st_ino, state.st_size, state.st_mtime_ns


@contextmanager
def _data_of(path: Path, name: str) -> Iterator[tuple[BinaryIO, int]]:
    """Open a file at the first byte of a tensor, and say how many it has."""
    start, stop = read_header(path)[name]["data_offsets"]
    with path.open("rb") as file:
        header = int.from_bytes(file.read(8), "little")
        file.seek(8 + header + start)
        yield file, stop - start


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file as 64 hex digits; read once per process, as long as the file
    keeps its time of change.

    A file that changed less than two seconds ago is read again: clocks of file systems may not tell
    two changes apart."""
    key = _state(path)
    if key in _sums:
        return _sums[key]
    with path.open("rb") as file:
        checksum = hashlib.file_digest(file, "sha256").hexdigest()
    if time.time() - path.stat().st_mtime > 2:
        _sums[key] = checksum
    return checksum


def save_tensors(tensors: dict[str, torch.Tensor], path: Path) -> None:
    """Write a safetensors file.

    Args:
        tensors: Name -> tensor of any shape and type that the format has.
        path: The file.

    Raises:
        OSError: The disk is full, as for any other file operation.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file(tensors, path, metadata={"format": "pt"})
    except SafetensorError as error:  # the library hides the operating system's error in its text
        raise OSError(f"{error} while writing {path}") from error


def write_json(path: Path, value: dict) -> None:
    """Write a JSON file, complete or not at all.

    Args:
        path: The file; folders above it are made.
        value: What it shall hold.
    """
    with atomic_path(path) as partial:
        partial.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


@contextmanager
def atomic_path(path: Path, partial: Path | None = None) -> Iterator[Path]:
    """Yield a path to write to that takes the place of ``path`` if the body succeeds.

    What the body wrote, a file or a folder, is removed where it fails. Where others may read at the
    same time they see the old content or the new, never a part.

    Args:
        path: Where the content shall be; folders above it are made.
        partial: Where to write until then, on the same disk; None: next to ``path``, under a name
            that is the same for all processes, which need a lock if they write at the same time.
    """
    partial = partial or path.with_name(path.name + PARTIAL)
    partial.parent.mkdir(parents=True, exist_ok=True)
    remove(partial)
    try:
        yield partial
        partial.replace(path)
    except BaseException:
        remove(partial)
        raise


def remove(path: Path) -> None:
    """Remove a file or a folder with all it holds, where it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)

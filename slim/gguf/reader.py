"""Reading GGUF: the header of a file, and its tensors one at a time.

A GGUF file is metadata (typed key/value pairs), a list of tensors (name, shape, type, place) and
their data. The layout is described in https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
The numbers of types, their block sizes and the arithmetic of dequantization come from the ``gguf``
library. Its ``GGUFReader`` is not used: it makes several objects for each entry of the vocabulary,
which takes two seconds for 49,000 entries where a plan should be there at once, and it answers a
file that is cut off with an error of numpy's.
"""

from __future__ import annotations

import math
import mmap
import re
import struct
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slim.core.errors import SlimError

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch

MAGIC = b"GGUF"
# The formats before GGUF (ggml, ggmf, ggjt, ggla), as their names stand in the file.
OLD_MAGICS = (b"lmgg", b"fmgg", b"tjgg", b"algg")
VERSIONS = (2, 3)
ALIGNMENT = 32  # of the data, where the metadata names no other
# Types of metadata values -> their struct codes. Besides these: 7 is a bool, 8 a string, 9 an
# array.
NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 10: "Q", 11: "q", 12: "d"}
BOOL, STRING, ARRAY = 7, 8, 9
PART = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")
CHUNK_ELEMENTS = 2**22  # weights that are dequantized at a time


@dataclass(frozen=True)
class TensorEntry:
    """Where a tensor is and how it is stored.

    Args:
        path: The file that holds it.
        shape: As torch counts, rows first: (out_features, in_features). The file lists it the other
            way round.
        type: Number of its type, as in ``gguf.GGMLQuantizationType``.
        start: Its first byte in the file.
        size: Its length in bytes.
    """

    path: Path
    shape: tuple[int, ...]
    type: int
    start: int
    size: int

    @property
    def elements(self) -> int:
        """The number of weights."""
        return math.prod(self.shape)


class Header:
    """The metadata and the list of tensors of one file.

    Attributes:
        path: The file.
        metadata: Key -> value. Arrays are lists.
        tensors: Name -> :class:`TensorEntry`.

    Raises:
        SlimError: The file is not GGUF, is big-endian, has another version, is cut off, or holds a
            tensor of unknown type.
    """

    def __init__(self, path: Path):
        self.path = path
        self.metadata: dict[str, Any] = {}
        self.tensors: dict[str, TensorEntry] = {}
        self._position = 0
        size = path.stat().st_size
        with path.open("rb") as file:
            check_beginning(path, file.read(8))
            # A map reads only the pages that are looked at: the header, not the weights.
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as self._data:
                try:
                    self._read(size)
                except (struct.error, IndexError, OverflowError) as error:
                    raise _cut_off(path, size) from error
                except UnicodeDecodeError as error:
                    raise SlimError(
                        f"{path} has a damaged header. Fetch or make it again."
                    ) from error
                finally:
                    del self._data

    def _read(self, size: int) -> None:
        self._position = 8
        tensors, pairs = self._unpack("<QQ")
        for _ in range(pairs):
            key = self._string()
            self.metadata[key] = self._value(self._unpack("<I")[0])
        entries = []
        for _ in range(tensors):
            name = self._string()
            dimensions = self._unpack("<I")[0]
            if dimensions > 4:
                raise SlimError(
                    f"{self.path} is damaged: tensor {name} has {dimensions} dimensions. Fetch or "
                    "make it again."
                )
            shape = self._unpack(f"<{dimensions}Q")
            number, offset = self._unpack("<IQ")
            entries.append((name, tuple(reversed(shape)), number, offset))
        alignment = self.metadata.get("general.alignment", ALIGNMENT)
        begin = -(-self._position // alignment) * alignment
        for name, shape, number, offset in entries:
            length = stored_bytes(self.path, name, shape, number)
            if begin + offset + length > size:
                raise _cut_off(self.path, size, begin + offset + length)
            self.tensors[name] = TensorEntry(self.path, shape, number, begin + offset, length)

    def _unpack(self, code: str) -> tuple:
        values = struct.unpack_from(code, self._data, self._position)
        self._position += struct.calcsize(code)
        return values

    def _string(self) -> str:
        (length,) = self._unpack("<Q")
        end = self._position + length
        if end > len(self._data):
            raise IndexError
        text = self._data[self._position : end].decode("utf-8")
        self._position = end
        return text

    def _value(self, kind: int) -> Any:
        if kind in NUMBERS:
            return self._unpack("<" + NUMBERS[kind])[0]
        if kind == BOOL:
            return self._unpack("<B")[0] != 0
        if kind == STRING:
            return self._string()
        if kind == ARRAY:
            item, count = self._unpack("<IQ")
            return self._array(item, count)
        raise SlimError(
            f"{self.path} has metadata of the unknown type {kind}: the file is damaged, or newer "
            "than slim."
        )

    def _array(self, kind: int, count: int) -> list:
        if count > len(self._data):  # every item takes a byte or more
            raise IndexError
        if kind in NUMBERS:
            return list(self._unpack(f"<{count}{NUMBERS[kind]}"))
        return [self._value(kind) for _ in range(count)]


def check_beginning(path: Path, beginning: bytes) -> None:
    """Look at the first eight bytes of a file: the magic, and the version, which also tells the
    byte order.

    Raises:
        SlimError: It is not GGUF, big-endian, or of another version.
    """
    if beginning[:4] in OLD_MAGICS:
        raise SlimError(
            f"{path} is of a format before GGUF, which slim does not read. Fetch the model as GGUF."
        )
    if beginning[:4] != MAGIC:
        raise SlimError(
            f"{path} is not a GGUF file: it does not begin with 'GGUF'. Fetch it again, or give "
            "another file."
        )
    if len(beginning) < 8:
        raise _cut_off(path, len(beginning))
    (version,) = struct.unpack("<I", beginning[4:])
    if version & 0xFFFF == 0:  # the bytes of a small number stand in the opposite order
        raise SlimError(
            f"{path} is big-endian; slim reads little-endian GGUF. To convert a copy: "
            f"gguf-convert-endian {path} little"
        )
    if version not in VERSIONS:
        shown = " and ".join(map(str, VERSIONS))
        raise SlimError(
            f"{path} is GGUF version {version}; slim reads versions {shown}. Convert the model "
            "again."
        )


def _cut_off(path: Path, size: int, needed: int | None = None) -> SlimError:
    wanted = "its header goes on" if needed is None else f"{needed} are needed"
    return SlimError(f"{path} is cut off: it has {size} bytes, and {wanted}. Fetch it again.")


def type_name(number: int) -> str:
    """Return the name of a tensor type, such as ``Q4_1``, or its number where the ``gguf`` library
    does not know it.
    """
    from gguf import GGMLQuantizationType

    if number in set(GGMLQuantizationType):
        return GGMLQuantizationType(number).name
    return f"number {number}"


def readable_types() -> list[str]:
    """Return the names of all tensor types that can be dequantized."""
    from gguf import GGMLQuantizationType

    return [kind.name for kind in GGMLQuantizationType if _can_read(kind)]


@cache
def _can_read(kind) -> bool:
    """Whether the ``gguf`` library dequantizes a type: tried on one block of zeros."""
    import numpy
    from gguf import GGML_QUANT_SIZES, dequantize

    try:
        with numpy.errstate(all="ignore"):
            dequantize(numpy.zeros((1, GGML_QUANT_SIZES[kind][1]), dtype=numpy.uint8), kind)
    except NotImplementedError:
        return False
    return True


def stored_bytes(path: Path, name: str, shape: tuple[int, ...], number: int) -> int:
    """Return how many bytes a tensor takes.

    Raises:
        SlimError: The type is unknown, cannot be dequantized, or its blocks do not divide a row.
    """
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    if number not in set(GGMLQuantizationType) or not _can_read(GGMLQuantizationType(number)):
        raise SlimError(
            f"{path}: tensor {name} is of type {type_name(number)}, which slim cannot read. "
            f"It reads {', '.join(readable_types())}; give another file of the same model."
        )
    block, size = GGML_QUANT_SIZES[GGMLQuantizationType(number)]
    if not shape or shape[-1] % block:
        raise SlimError(
            f"{path} is damaged: tensor {name} has the shape {shape} and the type "
            f"{type_name(number)}."
        )
    return math.prod(shape) // block * size


class GgufModel:
    """A model in one GGUF file, or in several that belong together.

    Args:
        path: The file; any one of the parts where there are several (``NAME-00001-of-00003.gguf``).

    Raises:
        SlimError: As :class:`Header`, or a part is missing.
    """

    def __init__(self, path: Path):
        self.path = path
        self.parts = find_parts(path)
        self.headers = [Header(part) for part in self.parts]
        _check_count(path, self.headers)

    @cached_property
    def metadata(self) -> dict[str, Any]:
        """Key -> value. The first part holds what is common to all."""
        metadata: dict[str, Any] = {}
        for header in reversed(self.headers):
            metadata |= header.metadata
        return metadata

    @cached_property
    def tensors(self) -> dict[str, TensorEntry]:
        """Name -> entry, over all parts."""
        return {name: entry for header in self.headers for name, entry in header.tensors.items()}

    def read(self, name: str, dtype: torch.dtype, offset: float = 0.0) -> torch.Tensor:
        """Read one tensor, dequantized some rows at a time, so that only the result is in memory as
        a whole.

        Args:
            name: As in the file.
            dtype: Type of the result.
            offset: Added in float32 before the result is rounded to ``dtype``.

        Returns:
            The tensor, in the shape its entry says.
        """
        import torch

        entry = self.tensors[name]
        result, row = torch.empty(entry.shape, dtype=dtype), 0
        rows = result.view(-1, entry.shape[-1])
        for values in self._dequantized_rows(entry):
            rows[row : row + len(values)] = torch.from_numpy(values) + offset
            row += len(values)
        return result

    def _dequantized_rows(self, entry: TensorEntry) -> Iterator:
        """Yield the weights in float32, as arrays of (some rows, in_features)."""
        import numpy
        from gguf import GGMLQuantizationType, dequantize

        columns = entry.shape[-1]
        row_bytes = entry.size * columns // entry.elements
        step = max(1, CHUNK_ELEMENTS // columns)
        with entry.path.open("rb") as file:
            file.seek(entry.start)
            for first in range(0, entry.elements // columns, step):
                count = min(step, entry.elements // columns - first)
                data = numpy.frombuffer(file.read(count * row_bytes), dtype=numpy.uint8)
                data = data.reshape(count, row_bytes)
                values = dequantize(data, GGMLQuantizationType(entry.type))
                yield values.reshape(count, columns).astype(numpy.float32)


def find_parts(path: Path) -> list[Path]:
    """Return all files of a model, in order, given any one of them.

    Raises:
        SlimError: A part is missing; the message names it.
    """
    if not path.is_file():
        raise SlimError(
            f"There is no file {path}. Give model.source=FILE.gguf, a folder or a hub id."
        )
    named = PART.fullmatch(path.name)
    if named is None:
        return [path]
    count = int(named["count"])
    parts = [
        path.with_name(f"{named['stem']}-{number:05d}-of-{count:05d}.gguf")
        for number in range(1, count + 1)
    ]
    missing = [part.name for part in parts if not part.is_file()]
    if missing:
        raise SlimError(
            f"{path} is one of {count} parts, and next to it there is no {', no '.join(missing)}. "
            "Put all parts into one folder, and give any one of them."
        )
    return parts


def _check_count(path: Path, headers: list[Header]) -> None:
    """Raise ``SlimError`` for a part of a model whose other parts its name does not tell."""
    count = headers[0].metadata.get("split.count", 0)
    if count > 1 and count != len(headers):
        raise SlimError(
            f"{path} is part {headers[0].metadata.get('split.no', 0) + 1} of {count}, and its name "
            "does not tell the others.\n"
            f"Name the parts NAME-00001-of-{count:05d}.gguf and so on, in one folder."
        )
    numbers = [header.metadata.get("split.no", index) for index, header in enumerate(headers)]
    if numbers != list(range(len(headers))):
        raise SlimError(
            f"{path}: the parts say they are numbers {numbers} of the model. Fetch all parts of "
            "one model again."
        )

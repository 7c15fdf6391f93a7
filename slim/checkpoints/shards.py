"""Writing a checkpoint's tensors as they come, without collecting them in memory first.

The safetensors library writes a file from tensors that are all there. Here a file is begun with
room for its header, tensors follow one after another, and the header is filled in at the end
(spaces behind the JSON are part of the format: https://github.com/huggingface/safetensors#format).
Small tensors wait for the end of their file and stand there by the size of their numbers, so that
everything is aligned and there are no gaps."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from slim.checkpoints.files import INDEX, SINGLE

if TYPE_CHECKING:
    import torch

SHARD_BYTES = 2**31  # a file gets no more tensors once it has this many bytes
HEADER_BYTES = 2**18  # room for the header: some 2000 tensors
COMPACT_BYTES = 2**26  # files below this are written again without the room that was not needed
COMPACT = ".compact"  # end of the name of the copy without that room
ENTRY_BYTES = 128  # more than the entry of a tensor takes besides its name
LARGE_BYTES = 2**16  # tensors of at least this size are written at once
NAMES = {
    "float64": "F64", "float32": "F32", "bfloat16": "BF16", "float16": "F16",
    "float8_e4m3fn": "F8_E4M3", "int64": "I64", "int32": "I32", "int16": "I16", "int8": "I8",
    "uint8": "U8", "bool": "BOOL",
}  # fmt: skip


class ShardWriter:
    """Writes tensors into ``model-*.safetensors`` below ``target``, with an index where there are
    several files.

    Attributes:
        pending: Small tensors that wait for the end of the present file.
    """

    def __init__(self, target: Path, shard_bytes: int = SHARD_BYTES, work: Path | None = None):
        """Begin to write.

        Args:
            target: The checkpoint folder.
            shard_bytes: Size from which another file is begun.
            work: Folder in which files are kept until ``close``, so that an interrupted writer can
                be resumed there (see ``state``); None: they are written in place.
        """
        self.target = target
        self.folder = work or target
        self.shard_bytes = shard_bytes
        self.pending: dict[str, torch.Tensor] = {}
        self._entries: dict[str, dict] = {}  # of the file being written
        self._offset = 0
        self._header = 0  # bytes its header will take, at most
        self._shards: list[list[str]] = []
        self._names: set[str] = set()  # of all files
        self._total = 0
        self._file = None

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Add a tensor.

        Args:
            name: Its full name.
            tensor: Its numbers, on any device.

        Raises:
            OSError: The disk is full, as with any other file operation.
            ValueError: The name was added before.
        """
        if name in self._names:
            raise ValueError(f"'{name}' was added twice: a file can hold it once only.")
        self._names.add(name)
        tensor = tensor.detach().to("cpu").contiguous()
        room = len(name) + ENTRY_BYTES
        if self._header + room > HEADER_BYTES:
            self._finish()
        self._header += room
        # a size that is no multiple of 8 would leave the next tensor unaligned
        if tensor.nbytes >= LARGE_BYTES and tensor.nbytes % 8 == 0:
            self._write(name, tensor)
        else:
            self.pending[name] = tensor.clone()  # without the larger storage it may be part of
        if self._offset + sum(small.nbytes for small in self.pending.values()) >= self.shard_bytes:
            self._finish()

    def _write(self, name: str, tensor: torch.Tensor) -> None:
        import torch

        if self._file is None:
            path = self._path(len(self._shards))
            for stale in (path, path.with_suffix(COMPACT)):  # of an interrupted writer
                stale.unlink(missing_ok=True)
            self._file = path.open("wb")
            # the header stands in front of the data, and is known only at the end
            self._file.seek(8 + HEADER_BYTES)
        self._file.write(memoryview(tensor.reshape(-1).view(torch.uint8).numpy()))
        end = self._offset + tensor.nbytes
        dtype = NAMES[str(tensor.dtype).removeprefix("torch.")]
        self._entries[name] = {
            "dtype": dtype,
            "shape": list(tensor.shape),
            "data_offsets": [self._offset, end],
        }
        self._offset = end

    def _path(self, number: int) -> Path:
        return self.folder / f"shard-{number}.safetensors"

    def _finish(self) -> None:
        """Write the small tensors and the header of the present file, if it has any tensors."""
        # by the size of their numbers: everything stays aligned without gaps
        by_size = sorted(self.pending, key=lambda name: (-self.pending[name].element_size(), name))
        for name in by_size:
            self._write(name, self.pending[name])
        self.pending = {}
        if self._file is None:
            return
        header = json.dumps(
            {"__metadata__": {"format": "pt"}, **self._entries}, separators=(",", ":")
        ).encode()
        if self._offset < COMPACT_BYTES:
            self._compact(header.ljust(len(header) + -len(header) % 8))
        else:
            self._file.seek(0)
            # blanks at the end of a header are allowed
            self._file.write(HEADER_BYTES.to_bytes(8, "little") + header.ljust(HEADER_BYTES))
            self._file.close()
        self._shards.append(list(self._entries))
        self._total += self._offset
        self._file = None
        self._entries = {}
        self._offset = 0
        self._header = 0

    def _compact(self, header: bytes) -> None:
        """Write the present file again without unused room: it would be a good part of a small
        file."""
        self._file.close()
        path = self._path(len(self._shards))
        with path.open("rb") as data, path.with_suffix(COMPACT).open("wb") as file:
            data.seek(8 + HEADER_BYTES)
            file.write(len(header).to_bytes(8, "little") + header)
            shutil.copyfileobj(data, file)
        if self.folder == self.target:  # nothing is resumed there
            path.with_suffix(COMPACT).replace(path)

    def close(self) -> None:
        """Finish the last file, and give all of them their final names and place."""
        self._finish()
        # only now: a file's name says how many there are
        count = len(self._shards)
        weight_map: dict[str, str] = {}
        for number, tensors in enumerate(self._shards):
            name = f"model-{number + 1:05d}-of-{count:05d}.safetensors"
            if count == 1:
                name = SINGLE
            self._deliver(number, self.target / name)
            weight_map.update(dict.fromkeys(tensors, name))
        if count > 1:
            index = {"metadata": {"total_size": self._total}, "weight_map": weight_map}
            (self.target / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")

    def _deliver(self, number: int, path: Path) -> None:
        """Give a finished file its final name.

        From a work folder it is only linked: the result may still be lost before it is complete,
        and the writer must then be able to resume.
        """
        written = self._path(number)
        if self.folder == self.target:
            written.rename(path)
            return
        compact = written.with_suffix(COMPACT)
        if compact.is_file():
            written = compact
        try:
            path.hardlink_to(written)
        except OSError:  # not every file system has links
            shutil.copyfile(written, path)

    def state(self) -> dict:
        """Return what a later writer in the same ``work`` folder needs besides ``pending``, as
        plain JSON values."""
        if self._file is not None:
            self._file.flush()
        return {
            "shards": self._shards,
            "total": self._total,
            "entries": self._entries,
            "offset": self._offset,
            "header": self._header,
            "open": self._file is not None,
        }

    def can_resume(self, state: dict) -> bool:
        """Whether the files that a state speaks of are still there.

        Args:
            state: What :meth:`state` returned.
        """
        needed = [self._path(number) for number in range(len(state["shards"]))]
        if state["open"]:
            file = self._path(len(state["shards"]))
            if not file.is_file() or file.stat().st_size < 8 + HEADER_BYTES + state["offset"]:
                return False
        return all(path.is_file() for path in needed)

    def resume(self, state: dict, pending: dict[str, torch.Tensor]) -> None:
        """Continue where a state was taken; what was written since is cut off.

        Args:
            state: What :meth:`state` returned then.
            pending: The small tensors of that moment.
        """
        self._shards = state["shards"]
        self._total = state["total"]
        self._entries = state["entries"]
        self._offset = state["offset"]
        self._header = state["header"]
        self.pending = pending
        self._names = self._entries.keys() | pending.keys()
        for shard in self._shards:
            self._names.update(shard)
        if state["open"]:
            path = self._path(len(self._shards))
            # made when the interrupted writer was closed, of the file as it was then
            path.with_suffix(COMPACT).unlink(missing_ok=True)
            self._file = path.open("r+b")
            self._file.truncate(8 + HEADER_BYTES + self._offset)
            self._file.seek(0, 2)

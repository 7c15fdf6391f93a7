"""A checkpoint folder: config, tokenizer, safetensors, and ``slim.json`` where slim made it.

Opening and checking needs neither torch nor transformers; loading for use and writing import them when called.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from slim.architecture import ADAPTER, ModelDescription
from slim.errors import SlimError
from slim.perlayer import write_card

if TYPE_CHECKING:
    import torch

MANIFEST = "slim.json"
INDEX = "model.safetensors.index.json"
ADAPTER_FILES = ("adapter/adapter_config.json", "adapter/adapter_model.safetensors")  # an adapter beside the weights
REPORT = "report"  # folder inside a checkpoint with plots and tables for people
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
# Files that belong to a model but hold neither weights nor its configuration: copied along unchanged.
COMPANIONS = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "spiece.model",
    "chat_template*", "generation_config.json", "LICENSE*", "NOTICE*",
)  # fmt: skip


_sums: dict[tuple[int, int, int, int], str] = {}  # device, inode, size, time of change -> SHA-256


@dataclass(frozen=True)
class Checkpoint:
    """A folder that has been looked at and found to be a usable checkpoint. Make one with :func:`open_checkpoint`."""

    folder: Path

    @cached_property
    def config(self) -> dict:
        return read_json(self.folder / "config.json")

    @cached_property
    def description(self) -> ModelDescription:
        return ModelDescription(self.config, name=str(self.folder))

    @cached_property
    def manifest(self) -> dict:
        """The content of ``slim.json``, or an empty dict for a checkpoint that slim did not make."""
        path = self.folder / MANIFEST
        return read_json(path) if path.is_file() else {}

    @cached_property
    def tensors(self) -> dict[str, tuple[str, str, tuple[int, ...]]]:
        """Map tensor name -> (file name, safetensors dtype, shape), from the headers alone."""
        found = {}
        for path in self.weight_files:
            for name, entry in read_header(path).items():
                found[name] = (path.name, entry["dtype"], tuple(entry["shape"]))
        return found

    @property
    def weight_files(self) -> list[Path]:
        index = self.folder / INDEX
        if index.is_file():
            return [self.folder / name for name in sorted(set(read_json(index)["weight_map"].values()))]
        return [self.folder / "model.safetensors"]

    @property
    def adapter_files(self) -> list[Path]:
        """Configuration and weights of the adapter beside the weights; empty without one."""
        return [] if self.config.get(ADAPTER) is None else [self.folder / name for name in ADAPTER_FILES]

    @property
    def bytes_on_disk(self) -> int:
        """Bytes of the weight files, those of an adapter included."""
        return sum(path.stat().st_size for path in [*self.weight_files, *self.adapter_files[1:]])


def read_json(path: Path) -> dict:
    """Read a JSON file. Raises ``SlimError`` naming the file if it cannot be read."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SlimError(f"Cannot read {path}: {error}") from error


def open_checkpoint(folder: Path | str) -> Checkpoint:
    """Look at ``folder`` and return it as a checkpoint.

    Raises ``SlimError`` if it is missing, empty, has no config, no tokenizer, only pickled weights, or a safetensors file
    whose length does not fit its header.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise SlimError(f"There is no folder {folder}. Give a checkpoint folder or a model id of the hub.")
    if not any(folder.iterdir()):
        raise SlimError(f"The folder {folder} is empty. A checkpoint has config.json, a tokenizer and *.safetensors.")
    if not (folder / "config.json").is_file():
        raise SlimError(f"{folder} has no config.json, so it is not a checkpoint folder.")
    checkpoint = Checkpoint(folder)
    missing = [path.name for path in checkpoint.weight_files if not path.is_file()]
    if missing:
        _refuse_pickles(folder)
        raise SlimError(f"{folder} lacks the weights {', '.join(missing)}.")
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        raise SlimError(f"{folder} has no tokenizer ({' or '.join(TOKENIZER_FILES)}). Save one into it.")
    missing = [path for path in checkpoint.adapter_files if not path.is_file()]
    if missing:
        raise SlimError(f"{folder} lacks {missing[0].relative_to(folder)}: its config.json says that an adapter belongs to it.")
    for path in [*checkpoint.weight_files, *checkpoint.adapter_files[1:]]:
        read_header(path)
    return checkpoint


def _refuse_pickles(folder: Path) -> None:
    pickles = sorted(path.name for pattern in PICKLES for path in folder.glob(pattern))
    if pickles and not list(folder.glob("*.safetensors")):
        raise SlimError(
            f"{folder} holds pickled weights only ({pickles[0]}), which can run code when loaded; slim reads safetensors. "
            "Convert them with transformers: model.save_pretrained(folder) writes safetensors."
        )


def read_header(path: Path) -> dict[str, dict]:
    """Return the header of a safetensors file: tensor name -> dtype, shape, data_offsets.

    Raises ``SlimError`` if the file is shorter or longer than its header says, or is no safetensors file.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8:
            raise SlimError(f"{path} is truncated or no safetensors file ({size} bytes). Fetch or make it again.")
        try:
            header = json.loads(file.read(length))
        except ValueError as error:
            raise SlimError(f"{path} has a damaged header. Fetch or make it again.") from error
    header.pop("__metadata__", None)
    end = 8 + length + max((entry["data_offsets"][1] for entry in header.values()), default=0)
    if end != size:
        raise SlimError(f"{path} has {size} bytes where its header asks for {end}. Fetch or make it again.")
    return header


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file as 64 hex digits; read once per process, as long as the file keeps its time of change.

    A file that changed less than two seconds ago is read again: clocks of file systems may not tell two changes apart.
    """
    state = path.stat()
    key = (state.st_dev, state.st_ino, state.st_size, state.st_mtime_ns)
    if key in _sums:
        return _sums[key]
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if time.time() - state.st_mtime > 2:
        _sums[key] = found
    return found


def checksums(folder: Path) -> dict[str, str]:
    """Return file name -> SHA-256 for everything that determines what the checkpoint computes."""
    names = {path.name for pattern in COMPANIONS for path in folder.glob(pattern) if path.is_file()}
    names |= {path.name for path in Checkpoint(folder).weight_files} | {"config.json"}
    names |= {INDEX} if (folder / INDEX).is_file() else set()
    names |= {str(path.relative_to(folder)) for path in Checkpoint(folder).adapter_files}
    return {name: sha256(folder / name) for name in sorted(names)}


def copy_companions(source: Path, target: Path) -> None:
    """Copy tokenizer, chat template, generation settings and licences unchanged.

    Where the config in ``target`` says that blocks differ, add a model card that says how to load such a model.
    """
    for pattern in COMPANIONS:
        for path in source.glob(pattern):
            if path.is_file():
                shutil.copyfile(path, target / path.name)
    if (target / "config.json").is_file() and read_json(target / "config.json").get("per_layer_config"):
        write_card(target)


def write_config(config: dict, target: Path) -> None:
    """Write ``config.json``."""
    (target / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


class TensorReader:
    """Reads single tensors of a checkpoint from its safetensors files, without loading the rest."""

    def __init__(self, checkpoint: Checkpoint):
        self.checkpoint = checkpoint
        self._open: dict[str, object] = {}

    def __contains__(self, name: str) -> bool:
        return name in self.checkpoint.tensors

    def read(self, name: str, device: str = "cpu") -> torch.Tensor:
        """Read one tensor. Raises ``SlimError`` if the checkpoint does not have it."""
        if name not in self:
            raise SlimError(f"{self.checkpoint.folder} has no tensor '{name}'.")
        file = self.checkpoint.tensors[name][0]
        if file not in self._open:
            from safetensors import safe_open

            self._open[file] = safe_open(self.checkpoint.folder / file, framework="pt", device=device)
        return self._open[file].get_tensor(name)

    def release(self) -> None:
        """Close the files: what was read of them no longer counts as this process's memory."""
        self._open.clear()

    def read_module(self, prefix: str, device: str = "cpu") -> Iterator[tuple[str, torch.Tensor]]:
        """Yield (name relative to ``prefix``, tensor) for all tensors under it (``"model.layers.3"``), one at a time."""
        for name in self.checkpoint.tensors:
            if name.startswith(prefix + "."):
                yield name[len(prefix) + 1 :], self.read(name, device)


def save_tensors(tensors: dict[str, torch.Tensor], path: Path) -> None:
    """Write a safetensors file. A full disk raises ``OSError`` like any other file operation."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file(tensors, path, metadata={"format": "pt"})
    except SafetensorError as error:  # the library hides the operating system's error in its text
        raise OSError(f"{error} while writing {path}") from error


def write_blocks(source: Checkpoint, target: Path, kept: list[int]) -> None:
    """Write ``source`` with only the blocks ``kept``, in that order and renumbered, tensors unchanged."""
    from slim.shards import ShardWriter

    description = source.description.with_blocks(kept)
    reader, writer = TensorReader(source), ShardWriter(target)
    for old, new in renumbered(source, kept):
        writer.add(new, reader.read(old))
    writer.close()
    write_config(description.config, target)
    copy_companions(source.folder, target)


def renumbered(source: Checkpoint, kept: list[int]) -> Iterator[tuple[str, str]]:
    """Yield (old name, new name) for every tensor that stays when only the blocks ``kept`` do."""
    position = {old: new for new, old in enumerate(kept)}
    prefix = source.description.family.blocks + "."
    for name in source.tensors:
        if not name.startswith(prefix):
            yield name, name
            continue
        block, rest = name[len(prefix) :].split(".", 1)
        if int(block) in position:
            yield name, f"{prefix}{position[int(block)]}.{rest}"


def load_tokenizer(folder: Path | str):
    """Load the tokenizer of a checkpoint folder."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise SlimError(f"The tokenizer in {folder} cannot be loaded: {str(error).splitlines()[0]}") from error


def load_model(folder: Path | str, dtype: str = "auto", device: str = "cpu", trainable: bool = False):
    """Load a checkpoint for use, in evaluation mode; packed weights as ``QuantLinear`` layers, an adapter applied.

    dtype: ``"float32"``, ``"bfloat16"``, ``"float16"``, or ``"auto"``: float32 on a CPU, the stored type elsewhere.
    trainable: keep packed weights in a layout that gradients can pass, for adapters on top of them.
    Raises ``SlimError`` where weights are missing from the file or have other shapes than the config says.
    """
    hide_library_bars()
    checkpoint = open_checkpoint(folder)
    model = _load_base(checkpoint, resolve_dtype(checkpoint.description, dtype, device), device, trainable)
    if checkpoint.description.adapter is not None:
        from slim.training.beside import attach_adapter

        attach_adapter(model, checkpoint)
    return model


def _load_base(checkpoint: Checkpoint, wanted: str, device: str, trainable: bool):
    """Load the weights of :func:`load_model` in the type ``wanted``."""
    import torch
    from transformers import AutoModelForCausalLM

    folder = checkpoint.folder
    if checkpoint.description.quantization is not None:
        from slim.quantization.bnb import is_bitsandbytes

        if is_bitsandbytes(checkpoint.description.quantization):
            from slim.quantization.bnb_model import load_bitsandbytes

            return load_bitsandbytes(checkpoint, wanted, device)
        from slim.quantization.load import load_quantized

        return load_quantized(checkpoint, wanted, device, kernels=not trainable).eval()
    check_shapes(checkpoint)
    model, info = AutoModelForCausalLM.from_pretrained(
        folder, dtype=getattr(torch, wanted), local_files_only=True, use_safetensors=True, output_loading_info=True
    )
    missing = sorted(info["missing_keys"])
    if missing:  # transformers would go on with random values
        raise SlimError(f"{folder} lacks {len(missing)} weights its config asks for, first '{missing[0]}'.")
    return model.to(device).eval()


def check_shapes(checkpoint: Checkpoint) -> None:
    """Raise ``SlimError`` if a block's linear layer has another shape in the file than the config says."""
    model = checkpoint.description
    for block in range(model.blocks if model.known else 0):
        for name, shape in model.block_linears(block).items():
            full = f"{model.family.blocks}.{block}.{name}.weight"
            found = checkpoint.tensors.get(full, ("", "", shape))[2]
            if found != shape:
                raise SlimError(
                    f"{full} in {checkpoint.folder} is {' x '.join(map(str, found))}, but config.json asks for "
                    f"{' x '.join(map(str, shape))}. The config and the weights are not of the same model."
                )


def hide_library_bars() -> None:
    """Switch off transformers' bars for reading and writing shards, which would break up our own."""
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()


def resolve_dtype(description: ModelDescription, dtype: str, device: str) -> str:
    """Return the type to compute in: ``"auto"`` is float32 on a CPU and the stored type elsewhere."""
    if dtype != "auto":
        return dtype
    return "float32" if device == "cpu" else description.dtype


def save_model(model, source: Path, target: Path, dtype: str | None = None) -> None:
    """Write a plain model as safetensors, with tokenizer and companions copied from ``source``.

    dtype: type to store the weights in; None keeps the one ``source`` stores.
    """
    import torch

    hide_library_bars()
    stored = getattr(torch, dtype or open_checkpoint(source).description.dtype)
    model.to(stored).save_pretrained(target)
    copy_companions(Path(source), target)

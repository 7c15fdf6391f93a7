"""A checkpoint folder: config, tokenizer, safetensors, and ``slim.json`` where slim made it.

Opening and checking needs neither torch nor transformers; loading for use and writing import them
when called."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from slim.core.errors import SlimError
from slim.core.io import read_header, read_json, sha256
from slim.models.spec import ADAPTER, ModelSpec

if TYPE_CHECKING:
    pass

MANIFEST = "slim.json"
INDEX = "model.safetensors.index.json"
# an adapter beside the weights
ADAPTER_FILES = ("adapter/adapter_config.json", "adapter/adapter_model.safetensors")
REPORT = "report"  # folder inside a checkpoint with plots and tables for people
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
# Files that belong to a model but hold neither weights nor its configuration: copied along
# unchanged.
COMPANIONS = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "spiece.model",
    "chat_template*", "additional_chat_templates/*", "generation_config.json", "LICENSE*", "NOTICE*",
)  # fmt: skip


@dataclass(frozen=True)
class Checkpoint:
    """A folder that has been looked at and found to be a usable checkpoint. Make one with
    :func:`open_checkpoint`."""

    folder: Path

    @cached_property
    def config(self) -> dict:
        return read_json(self.folder / "config.json")

    @cached_property
    def spec(self) -> ModelSpec:
        return ModelSpec(self.config, name=str(self.folder))

    @cached_property
    def manifest(self) -> dict:
        """The content of ``slim.json``, or an empty dict for a checkpoint that slim did not
        make."""
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
            return [
                self.folder / name for name in sorted(set(read_json(index)["weight_map"].values()))
            ]
        return [self.folder / "model.safetensors"]

    @property
    def adapter_files(self) -> list[Path]:
        """Configuration and weights of the adapter beside the weights; empty without one."""
        return (
            []
            if self.config.get(ADAPTER) is None
            else [self.folder / name for name in ADAPTER_FILES]
        )

    @property
    def bytes_on_disk(self) -> int:
        """Bytes of the weight files, those of an adapter included."""
        return sum(path.stat().st_size for path in [*self.weight_files, *self.adapter_files[1:]])


def open_checkpoint(folder: Path | str) -> Checkpoint:
    """Look at ``folder`` and return it as a checkpoint.

    Raises ``SlimError`` if it is missing, empty, has no config, no tokenizer, only pickled weights,
    or a safetensors file whose length does not fit its header."""
    folder = Path(folder)
    if not folder.is_dir():
        raise SlimError(
            f"There is no folder {folder}. Give a checkpoint folder or a model id of the hub."
        )
    if not any(folder.iterdir()):
        raise SlimError(
            f"The folder {folder} is empty. A checkpoint has config.json, a tokenizer and *.safetensors."
        )
    if not (folder / "config.json").is_file():
        _name_gguf_files(folder)
        raise SlimError(f"{folder} has no config.json, so it is not a checkpoint folder.")
    checkpoint = Checkpoint(folder)
    missing = [path.name for path in checkpoint.weight_files if not path.is_file()]
    if missing:
        _refuse_pickles(folder)
        raise SlimError(f"{folder} lacks the weights {', '.join(missing)}.")
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        raise SlimError(
            f"{folder} has no tokenizer ({' or '.join(TOKENIZER_FILES)}). Save one into it."
        )
    missing = [path for path in checkpoint.adapter_files if not path.is_file()]
    if missing:
        raise SlimError(
            f"{folder} lacks {missing[0].relative_to(folder)}: its config.json says that an adapter belongs to it."
        )
    for path in [*checkpoint.weight_files, *checkpoint.adapter_files[1:]]:
        read_header(path)
    return checkpoint


def _name_gguf_files(folder: Path) -> None:
    files = sorted(path.name for path in folder.glob("*.gguf"))
    if files:
        shown = ", ".join(files)
        raise SlimError(
            f"{folder} is no checkpoint folder but holds GGUF files ({shown}). "
            f"Give one: model.source={folder / files[0]}"
        )


def _refuse_pickles(folder: Path) -> None:
    pickles = sorted(path.name for pattern in PICKLES for path in folder.glob(pattern))
    if pickles and not list(folder.glob("*.safetensors")):
        raise SlimError(
            f"{folder} holds pickled weights only ({pickles[0]}), which can run code when loaded; slim reads safetensors. "
            "Convert them with transformers: model.save_pretrained(folder) writes safetensors."
        )


def checksums(folder: Path) -> dict[str, str]:
    """Return file name -> SHA-256 for everything that determines what the checkpoint computes."""
    companions = [path for pattern in COMPANIONS for path in folder.glob(pattern)]
    names = {str(path.relative_to(folder)) for path in companions if path.is_file()}
    names |= {path.name for path in Checkpoint(folder).weight_files} | {"config.json"}
    names |= {INDEX} if (folder / INDEX).is_file() else set()
    names |= {str(path.relative_to(folder)) for path in Checkpoint(folder).adapter_files}
    return {name: sha256(folder / name) for name in sorted(names)}

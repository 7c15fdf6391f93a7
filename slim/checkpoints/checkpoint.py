"""A checkpoint folder: config, tokenizer, safetensors, and ``slim.json`` where slim made it.

Opening and checking needs neither torch nor transformers. What a folder may hold and how it is read
is in docs/inputs.md; the rules themselves are in ``files.py``, ``stored.py`` and
``configuration.py``."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from slim.checkpoints.configuration import check_entries, read_config
from slim.checkpoints.files import (
    ADAPTER_CONFIG,
    INDEX,
    SINGLE,
    quantization_file,
    refuse_gguf_files,
    refuse_lone_adapter,
    refuse_missing,
    weight_files,
)
from slim.checkpoints.stored import StoredTensor, normalize, stored_tensors
from slim.core.errors import SlimError
from slim.core.io import read_header, read_json, read_object, sha256
from slim.models.encoders import family_of
from slim.models.spec import ADAPTER, ModelSpec

MANIFEST = "slim.json"
# an adapter next to the weights, as slim writes it
ADAPTER_FILES = ("adapter/adapter_config.json", "adapter/adapter_model.safetensors")
REPORT = "report"  # folder inside a checkpoint with plots and tables for people
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")
# the same weights for other engines, next to slim's own files (slim/gguf/export.py)
EXPORTS = ("model.gguf", "Modelfile")
# Files that belong to a model but hold neither weights nor its configuration: copied along
# unchanged.
COMPANIONS = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt",
    "spiece.model", "chat_template*", "additional_chat_templates/*", "generation_config.json",
    "LICENSE*", "NOTICE*",
    # how sentence-transformers makes one vector of a text
    "modules.json", "sentence_bert_config.json", "config_sentence_transformers.json",
    "1_Pooling/*", "2_Normalize/*",
)  # fmt: skip


@dataclass(frozen=True)
class Checkpoint:
    """A folder that has been looked at and found to be a usable checkpoint. Make one with
    :func:`open_checkpoint`.

    Attributes:
        folder: The checkpoint folder.
    """

    folder: Path

    @cached_property
    def _content(self) -> tuple[dict, dict[str, StoredTensor], list[str]]:
        """The config, the tensors, and what was changed in reading them."""
        raw = self._raw_config
        check_entries(raw, self.folder)
        tensors, notes = normalize(stored_tensors(self.weight_files), raw, self.folder)
        config = read_config(self.folder, tensors, notes)
        family = family_of(config)
        if family is not None and ModelSpec(config, str(self.folder)).tied:
            # a second copy of the embedding; whoever writes the head would write it twice
            tensors.pop(f"{family.head}.weight", None)
        return config, tensors, notes

    @cached_property
    def _raw_config(self) -> dict:
        """``config.json`` as it stands in the file."""
        raw = read_json(self.folder / "config.json")
        if not isinstance(raw, dict):
            raise SlimError(f"{self.folder / 'config.json'} is not a JSON object: not a config.")
        return raw

    @property
    def config(self) -> dict:
        """``config.json``, completed by what the other files say."""
        return self._content[0]

    @property
    def stored(self) -> dict[str, StoredTensor]:
        """Name in the model -> tensor in the files."""
        return self._content[1]

    @property
    def notes(self) -> list[str]:
        """A sentence for everything that is read in another way than it is stored."""
        return self._content[2]

    @cached_property
    def spec(self) -> ModelSpec:
        """The model as far as its config tells."""
        return ModelSpec(self.config, name=str(self.folder))

    @cached_property
    def manifest(self) -> dict:
        """The content of ``slim.json``, or an empty dict for a checkpoint that slim did not
        make."""
        path = self.folder / MANIFEST
        if not path.is_file():
            return {}
        return read_object(path)

    @cached_property
    def tensors(self) -> dict[str, tuple[str, str, tuple[int, ...]]]:
        """Tensor name -> (file name, safetensors dtype, shape), from the headers alone."""
        return {name: tensor.entry for name, tensor in self.stored.items()}

    @cached_property
    def is_plain(self) -> bool:
        """Whether other programs that follow the files alone read the same model."""
        if self.config != self._raw_config:
            return False
        if (self.folder / ADAPTER_CONFIG).is_file():
            return False
        for name, tensor in self.stored.items():
            if tensor.changed or tensor.name != name:
                return False
        index = self.folder / INDEX
        if not index.is_file():
            return self.weight_files[0].name == SINGLE
        # transformers needs both entries, and looks for tensors where the index says they are
        files = {}
        for tensor in stored_tensors(self.weight_files).values():
            files[tensor.name] = tensor.file
        content = read_json(index)
        return "metadata" in content and content["weight_map"] == files

    @cached_property
    def weight_files(self) -> list[Path]:
        """The files that hold the weights."""
        return weight_files(self.folder)

    @property
    def adapter_files(self) -> list[Path]:
        """Configuration and weights of the adapter next to the weights; empty without one."""
        if self._raw_config.get(ADAPTER) is None:
            return []
        return [self.folder / name for name in ADAPTER_FILES]

    @property
    def bytes_on_disk(self) -> int:
        """Bytes of the weight files, those of an adapter included."""
        return sum(path.stat().st_size for path in [*self.weight_files, *self.adapter_files[1:]])


def open_checkpoint(folder: Path | str) -> Checkpoint:
    """Look at a folder and return it as a checkpoint.

    Args:
        folder: The folder.

    Raises:
        SlimError: It is missing or empty, has no config or tokenizer, only pickled weights or an
            adapter, weights of two models, a safetensors file that does not fit its header, or a
            config that no model can be built with.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise SlimError(
            f"There is no folder {folder}. Give a checkpoint folder or a model id of the hub."
        )
    if not any(folder.iterdir()):
        raise SlimError(
            f"The folder {folder} is empty. "
            "A checkpoint has config.json, a tokenizer and *.safetensors."
        )
    refuse_lone_adapter(folder)
    if not (folder / "config.json").is_file():
        refuse_gguf_files(folder)
        raise SlimError(f"{folder} has no config.json, so it is not a checkpoint folder.")
    checkpoint = Checkpoint(folder)
    missing = [path.name for path in checkpoint.weight_files if not path.is_file()]
    if missing:
        refuse_missing(folder, missing)
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        raise SlimError(
            f"{folder} has no tokenizer ({' or '.join(TOKENIZER_FILES)}). Save one into it."
        )
    for path in checkpoint.adapter_files:
        if not path.is_file():
            raise SlimError(
                f"{folder} lacks {path.relative_to(folder)}: "
                "its config.json says that an adapter belongs to it."
            )
    for path in checkpoint.adapter_files[1:]:
        read_header(path)
    checkpoint.config  # noqa: B018 - reads the headers and checks the entries
    return checkpoint


def checksums(folder: Path) -> dict[str, str]:
    """Return file name -> SHA-256 for everything that determines what the checkpoint computes.

    Args:
        folder: The checkpoint folder. Files are taken as they are, however they are read.
    """
    checkpoint = Checkpoint(folder)
    paths = [*checkpoint.weight_files, *checkpoint.adapter_files, folder / INDEX]
    for pattern in COMPANIONS:
        paths.extend(folder.glob(pattern))
    for name in EXPORTS:
        paths.append(folder / name)
    described = quantization_file(folder)
    # read only where config.json itself says nothing, so only there it changes the result
    if described is not None and "quantization_config" not in read_json(folder / "config.json"):
        paths.append(described)
    names = {"config.json"}
    for path in paths:
        if path.is_file():
            names.add(path.relative_to(folder).as_posix())
    return {name: sha256(folder / name) for name in sorted(names)}

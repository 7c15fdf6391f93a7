"""The import of a GGUF file: a stage without a parent, which writes a plain checkpoint folder."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import ClassVar

from slim.checkpoints.checkpoint import Checkpoint, open_checkpoint
from slim.checkpoints.stage import Context, Stage
from slim.checkpoints.store import Store, digest
from slim.core.errors import SlimError
from slim.core.io import sha256
from slim.core.settings import require_choice
from slim.gguf.architecture import Layout
from slim.gguf.reader import CHUNK_ELEMENTS, GgufModel, type_name
from slim.gguf.tokenizer import Vocabulary, write_tokenizer
from slim.models.spec import DTYPE_BYTES, ModelSpec

DTYPES = ("bfloat16", "float16", "float32")
TOKENIZER_BYTES = 2**11  # of memory for each token while the tokenizer is built and written


@dataclass
class ImportGguf(Stage):
    """The model of a GGUF file as a plain checkpoint: weights dequantized, config and tokenizer
    from the metadata.

    The result is named by the content of the file, not by where it is.

    Args:
        path: The file; of several parts any one.
        dtype: Type to store the weights in.
        name: What to call the model in tables; by default the file's name.
        store: Folder of results, where the imported checkpoint is found by whoever else needs it (a
            teacher).
    """

    kind: ClassVar[str] = "import"
    cache_name: ClassVar[str] = "ImportGguf"
    path: Path
    dtype: str = "bfloat16"
    name: str | None = None
    store: str | None = None

    def __post_init__(self) -> None:
        require_choice("model.dtype", self.dtype, DTYPES)
        self.path = Path(self.path)

    @property
    def label(self) -> str:
        """Short name for tables."""
        return self.name or self.path.stem

    @property
    def file(self) -> Path:
        """What engines measure instead of the imported checkpoint."""
        return self.path

    @cached_property
    def model(self) -> GgufModel:
        """The open file. Raises ``SlimError`` for one that cannot be read."""
        return GgufModel(self.path)

    @cached_property
    def layout(self) -> Layout:
        """Its config and tensors. Raises ``SlimError`` for an architecture that slim does not
        import.
        """
        return Layout(self.model)

    @cached_property
    def vocabulary(self) -> Vocabulary:
        """Its tokenizer. Raises ``SlimError`` where there is none, or an unknown one."""
        return Vocabulary.of(self.model)

    def cache_key(self) -> dict:
        """The content of all parts, and the type of the result."""
        return {
            "class": self.cache_name,
            "files": [verified_sha256(part) for part in self.model.parts],
            "dtype": self.dtype,
        }

    def content_digest(self) -> str:
        """Return the name of the result, which is known before the import."""
        return digest([self.cache_key(), self.version])

    def local_folder(self) -> Path | None:
        """Return the folder of the result, or None while it is not imported."""
        folder = self._folder()
        return folder if folder is not None and folder.is_dir() else None

    def resolve(self) -> Checkpoint:
        """Return the imported checkpoint.

        Raises:
            SlimError: It is not imported yet. In a chain it is, since the import is the chain's
                first stage.
        """
        folder = self.local_folder()
        if folder is None:
            raise SlimError(
                f"{self.label} is not imported yet: begin the chain with it (model=hf "
                f"model.source={self.path})."
            )
        return open_checkpoint(folder)

    def _folder(self) -> Path | None:
        if self.store is None:
            return None
        return Store(self.store).stage_folder(self.kind, self.content_digest())

    def describe(self) -> ModelSpec:
        """Describe the result by the header of the file. Raises ``SlimError`` for whatever cannot
        be imported.
        """
        config = {**self.layout.config, "dtype": self.dtype}
        self.vocabulary  # noqa: B018 - looked at before any work
        return ModelSpec(config, name=self.label)

    def peak_bytes(self, spec: ModelSpec, device: str) -> int:
        """Estimate the peak memory: the largest tensor twice, some rows in float32, and the
        tokenizer.
        """
        largest = max(entry.elements for entry in self.model.tensors.values())
        return (
            2 * largest * DTYPE_BYTES[self.dtype]
            + 16 * CHUNK_ELEMENTS
            + TOKENIZER_BYTES * spec.vocab_size
        )

    def run(self, source: Path | None, target: Path, context: Context) -> dict:
        """Write the checkpoint; there is no parent.

        Returns:
            Facts: the file's names, its architecture, how many tensors are of which type, and its
                licence where it names one.
        """
        from slim.checkpoints.shards import ShardWriter
        from slim.checkpoints.writer import write_config

        spec, writer = self.describe(), ShardWriter(target)
        for name, tensor in self.tensors():
            writer.add(name, tensor)
        writer.close()
        write_config(spec.config, target)
        write_generation_settings(self.vocabulary, target)
        write_tokenizer(self.vocabulary, target, self.layout.prefix)
        write_readme(self.model.metadata, target)
        return self.facts()

    def tensors(self) -> Iterator[tuple]:
        """Yield (name, tensor) in the checkpoint's names and order of rows, one at a time, with a
        bar of progress.
        """
        import torch

        from slim.core.console import track

        dtype, targets = getattr(torch, self.dtype), list(self.layout.targets())
        for name, target in track(targets, "import"):
            yield target, self.layout.read(name, dtype)

    def facts(self) -> dict:
        """Return what the manifest keeps of where the model comes from."""
        metadata, counts = (
            self.model.metadata,
            Counter(entry.type for entry in self.model.tensors.values()),
        )
        named = {key: metadata.get(f"general.{key}") for key in ("architecture", "name", "license")}
        return {
            "files": [part.name for part in self.model.parts],
            "tensor_types": {type_name(number): count for number, count in sorted(counts.items())},
            **{key: value for key, value in named.items() if value is not None},
        }


def write_generation_settings(vocabulary: Vocabulary, target: Path) -> None:
    """Write ``generation_config.json``: begin and padding token, and the tokens at which a text or
    a turn ends.
    """
    from slim.core.io import write_json

    stops = vocabulary.stops()
    ids = {"bos": vocabulary.entry("bos_token_id"), "pad": vocabulary.entry("padding_token_id")}
    settings = {f"{name}_token_id": number for name, number in ids.items() if number is not None}
    if stops:
        settings["eos_token_id"] = stops if len(stops) > 1 else stops[0]
    write_json(target / "generation_config.json", settings)


def write_readme(metadata: Mapping, target: Path) -> None:
    """Write ``README.md`` with the licence that the file names, where the cards of later
    checkpoints look for it.
    """
    import yaml

    name = metadata.get("general.name", "a model without a name")
    keys = {"license": "license", "license_name": "license.name", "license_link": "license.link"}
    stated = {entry: metadata.get(f"general.{key}") for entry, key in keys.items()}
    stated = {entry: value for entry, value in stated.items() if value}
    head = f"---\n{yaml.safe_dump(stated, sort_keys=False)}---\n\n" if stated else ""
    what = "weights dequantized, config and tokenizer from the file's metadata"
    text = f"{head}# {name}\n\nImported from GGUF by slim: {what}.\n"
    (target / "README.md").write_text(text, encoding="utf-8")


def verified_sha256(path: Path) -> str:
    """Return the SHA-256 of a file, compared with the name of its blob where it lies in the hub's
    cache.

    Raises:
        SlimError: They differ: the file is damaged.
    """
    found, blob = sha256(path), path.resolve()
    if blob.parent.name == "blobs" and len(blob.name) == 64 and blob.name != found:
        raise SlimError(
            f"{path} differs from its recorded checksum (altered or damaged). Delete it there and "
            "fetch it again."
        )
    return found

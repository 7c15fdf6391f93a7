"""``quant=gguf``: weights rounded to a GGUF type by the ``gguf`` library's own quantizers, without
calibration text, and the GGUF file.

Q4_0, Q4_1, Q5_0, Q5_1 and Q8_0 are blocks of 32 weights (``blocks.py``); F32, F16 and BF16 are
plain, for a model that is to be run by another engine as it is.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from slim.checkpoints.checkpoint import open_checkpoint
from slim.checkpoints.stage import Context, Stage
from slim.core.errors import SlimError, did_you_mean
from slim.gguf.blocks import BLOCK, BLOCK_TYPES, PLAIN_TYPES
from slim.gguf.format import gguf_config
from slim.gguf.metadata import check_model
from slim.gguf.reader import CHUNK_ELEMENTS
from slim.gguf.stage import TOKENIZER_BYTES
from slim.models.spec import DTYPE_BYTES, ModelSpec
from slim.quantization.assign import check_plain
from slim.quantization.storage import packed_bits

if TYPE_CHECKING:
    import torch

    from slim.checkpoints.checkpoint import Checkpoint

AUTO = "auto"
TYPES = ("Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0", "BF16", "F16", "F32")
# begin of llama.cpp's names of types that slim does not write yet -> what fits
LATER = {
    "Q2_K": "Q4_0",
    "Q3_K": "Q4_0",
    "Q4_K": "Q4_1",
    "Q5_K": "Q5_1",
    "Q6_K": "Q8_0",
    "IQ": "Q4_0",
}
FALLBACK = "F16"  # of matrices whose rows blocks do not divide


@dataclass
class Gguf(Stage):
    """Settings of the quantization by the ``gguf`` library.

    Attributes:
        type: Of the blocks' linear layers, one of ``TYPES``.
        embeddings: Type of the embedding and the head; ``"auto"``: Q8_0, or ``type`` where that is
            not one of blocks.
        overrides: Layer name with ``*`` -> type of its own.
    """

    type: str = "Q8_0"
    embeddings: str = AUTO
    overrides: dict | None = None

    kind: ClassVar[str] = "quantize"
    cache_name: ClassVar[str] = "Gguf"
    version: ClassVar[int] = 1

    def __post_init__(self) -> None:
        require_type("quant.type", self.type)
        if self.embeddings != AUTO:
            require_type("quant.embeddings", self.embeddings)
        self.overrides = self.overrides or {}
        if not isinstance(self.overrides, dict):
            raise SlimError(
                f"quant.overrides={self.overrides} must map layer names to types, such as "
                "'quant.overrides={*.down_proj:Q8_0}'."
            )
        for pattern, name in self.overrides.items():
            require_type(f"quant.overrides: the type of '{pattern}'", name)

    def types(self, spec: ModelSpec) -> dict[str, str]:
        """Return full name -> type for every linear layer and embedding.

        Raises:
            SlimError: An override fits no layer.
        """
        ends = self.type if self.type in PLAIN_TYPES else "Q8_0"
        if self.embeddings != AUTO:
            ends = self.embeddings
        matrices, types = spec.matrices(), {}
        for name in matrices:
            types[name] = self.type if name.startswith(f"{spec.family.blocks}.") else ends
        for pattern, wanted in self.overrides.items():
            names = [name for name in types if fnmatchcase(name, pattern)]
            if not names:
                raise SlimError(
                    f"quant.overrides: '{pattern}' is not the name of any layer of {spec.name}. "
                    f"Names look like '{next(iter(types))}'; * stands for anything."
                )
            types.update(dict.fromkeys(names, wanted))
        for name, (_, columns) in matrices.items():
            if types[name] in BLOCK_TYPES and columns % BLOCK:
                types[name] = FALLBACK
        return types

    def check(self, spec: ModelSpec) -> None:
        check_plain(spec)
        check_model(spec)
        self.types(spec)

    def output_spec(self, spec: ModelSpec) -> ModelSpec:
        types = self.types(spec)
        packed = {name: kind for name, kind in types.items() if kind in BLOCK_TYPES}
        if packed:
            return spec.with_config(quantization_config=gguf_config(packed))
        return spec.with_config(dtype=PLAIN_TYPES[self.type])

    def peak_bytes(self, spec: ModelSpec, device: str) -> int:
        """The largest tensor as it was and in blocks, some rows in float32, and the tokenizer."""
        largest = max(rows * columns for rows, columns in spec.matrices().values())
        stored = DTYPE_BYTES.get(spec.dtype, 4) * largest
        return 2 * stored + 32 * CHUNK_ELEMENTS + TOKENIZER_BYTES * spec.vocab_size

    def run(self, source: Path, target: Path, context: Context) -> dict:
        from slim.checkpoints.shards import ShardWriter
        from slim.checkpoints.writer import copy_companions, write_config
        from slim.core.console import warn
        from slim.gguf.export import export_gguf
        from slim.gguf.vocabulary import vocabulary_entries

        checkpoint = open_checkpoint(source)
        spec = checkpoint.spec
        self.check(spec)
        vocabulary_entries(checkpoint.folder, spec)  # refuses tokenizers before any work
        types, result, writer = self.types(spec), self.output_spec(spec), ShardWriter(target)
        for name, tensor in rounded_tensors(checkpoint, types):
            writer.add(name, tensor)
        writer.close()
        write_config(result.config, target)
        copy_companions(checkpoint.folder, target)
        notes = [*self.notes(spec, types), *export_gguf(target)]
        for note in notes:
            warn(note)
        facts = {"tensor_types": dict(Counter(types.values()))}
        if result.quantization is not None:
            facts["bits_per_weight"] = round(packed_bits(result), 4)
        return {**facts, **({"notes": notes} if notes else {})}

    def notes(self, spec: ModelSpec, types: dict[str, str]) -> list[str]:
        """Return which layers could not get the type that was asked for, in sentences."""
        names = [name for name, (_, columns) in spec.matrices().items() if columns % BLOCK]
        names = [name for name in names if types[name] == FALLBACK and self.type in BLOCK_TYPES]
        if not names:
            return []
        return [
            f"{len(names)} layers are stored as {FALLBACK}: blocks of {BLOCK} weights do not "
            f"divide their inputs (first {names[0]})."
        ]


def require_type(setting: str, name: str) -> None:
    """Raise ``SlimError`` where slim does not write a type.

    Args:
        setting: For the message.
        name: The type, as llama.cpp calls it.
    """
    if name in TYPES:
        return
    for begin, nearest in LATER.items():
        if str(name).startswith(begin):
            raise SlimError(
                f"{setting}={name}: slim does not write this type yet. It writes "
                f"{', '.join(TYPES)}; the nearest is {nearest}."
            )
    raise SlimError(
        f"{setting}={name}: must be one of {', '.join(TYPES)}.{did_you_mean(str(name), TYPES)}"
    )


def rounded_tensors(
    checkpoint: Checkpoint, types: dict[str, str]
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield (name, tensor) of the result, one at a time, with a bar of progress.

    Raises:
        SlimError: A weight is beyond the range of its type.
    """
    from slim.checkpoints.reader import TensorReader
    from slim.core.console import track

    reader = TensorReader(checkpoint)
    for name in track(list(checkpoint.tensors), "gguf"):
        layer = name.removesuffix(".weight")
        if layer not in types:
            # a head in the file of a model whose head is the embedding would be written twice
            if not (checkpoint.spec.tied and layer == checkpoint.spec.family.head):
                yield name, reader.read(name)
            continue
        yield round_tensor(layer, reader.read(name), types[layer])
        reader.release()


def round_tensor(layer: str, weight: torch.Tensor, type_name: str) -> tuple[str, torch.Tensor]:
    """Return (name, tensor) of a matrix in a type: blocks, or plain weights."""
    import torch

    from slim.gguf.blocks import round_to_blocks

    if type_name in BLOCK_TYPES:
        return f"{layer}.weight_blocks", round_to_blocks(weight, type_name)
    rounded = weight.to(getattr(torch, PLAIN_TYPES[type_name]))
    if not torch.isfinite(rounded).all():
        raise SlimError(
            f"{layer} has weights that {type_name} cannot hold, or NaN. Use quant.type=BF16."
        )
    return f"{layer}.weight", rounded

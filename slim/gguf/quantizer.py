"""``quant=gguf``: weights rounded to GGUF's types, and the GGUF file.

Types of 32 weights (Q8_0, Q5_1, Q5_0, Q4_1, Q4_0) are rounded by the ``gguf`` library's own
quantizers unless ``quant.calibrated=true``; the mixes of K types (Q4_K_M and so on, ``mixes.py``)
are calibrated: grids and codes are chosen under the Hessian of each layer's inputs (``method.py``).
F32, F16 and BF16 are plain, for a model that is to be run by another engine as it is.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from slim.calibration.sequential import (
    calibration_bytes,
    propagation_bytes,
    transform_checkpoint,
)
from slim.checkpoints.checkpoint import REPORT, open_checkpoint
from slim.checkpoints.stage import Context, Stage
from slim.core.errors import SlimError, did_you_mean
from slim.core.settings import require_choice, require_flag, require_number
from slim.data.calibration import Calibration
from slim.gguf.blocks import BLOCK_TYPES, PLAIN_TYPES
from slim.gguf.format import gguf_config
from slim.gguf.metadata import check_model
from slim.gguf.method import BlockRounding
from slim.gguf.mixes import MIXES, PLAIN_STAND_IN, fitting_type, mixed_types, plain_type
from slim.gguf.reader import CHUNK_ELEMENTS
from slim.gguf.stage import TOKENIZER_BYTES
from slim.models.spec import DTYPE_BYTES, ModelSpec
from slim.quantization.assign import check_plain
from slim.quantization.methods.calibrated import require_held_out
from slim.quantization.storage import packed_bits
from slim.quantization.written import check_written

if TYPE_CHECKING:
    import torch

    from slim.checkpoints.checkpoint import Checkpoint

AUTO = "auto"
BLOCKS_OF_32 = ("Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0")
K_TYPES = ("Q6_K", "Q5_K", "Q4_K", "Q3_K", "Q2_K")
FILE_TYPES = (*reversed(MIXES), *BLOCKS_OF_32, *PLAIN_TYPES)  # of a file
TENSOR_TYPES = (*K_TYPES, *BLOCKS_OF_32, *PLAIN_TYPES)  # of a single matrix
# begin of llama.cpp's names of types that slim does not write -> what is near
UNWRITTEN = {"IQ1": "Q2_K", "IQ2": "Q2_K", "IQ3": "Q3_K", "IQ4": "Q4_K", "TQ": "Q2_K"}


@dataclass
class Gguf(Stage):
    """Settings of the quantization to GGUF's types.

    Attributes:
        type: Of the file, one of ``FILE_TYPES``.
        embeddings: Type of the embedding and the head; ``"auto"``: what llama.cpp's mix has, Q8_0
            with types of 32 weights, ``type`` where that is a plain one.
        overrides: Layer name with ``*`` -> type of its own, one of ``TENSOR_TYPES``.
        calibrated: Whether codes and grids are chosen under the Hessian; ``"auto"``: with K types.
        damping: Added to the diagonal of H, in means of it, 0 to 1; calibrated only.
        refine: Rounds of coordinate descent over codes and grids, 0 to 100; calibrated only.
        calibration: The text that H = X^T X is summed over; None where nothing is calibrated.
        propagate: Whether layers also make up for what the quantised ones before them changed;
            calibrated only.
    """

    type: str = "Q8_0"
    embeddings: str = AUTO
    overrides: dict | None = None
    calibrated: bool | str = AUTO
    damping: float = 0.01
    refine: int = 3
    calibration: Calibration | None = None
    propagate: bool = False

    kind: ClassVar[str] = "quantize"
    cache_name: ClassVar[str] = "Gguf"
    version: ClassVar[int] = 1

    def __post_init__(self) -> None:
        require_type("quant.type", self.type, FILE_TYPES)
        if self.embeddings != AUTO:
            require_type("quant.embeddings", self.embeddings, TENSOR_TYPES)
        self.overrides = self.overrides or {}
        if not isinstance(self.overrides, dict):
            raise SlimError(
                f"quant.overrides={self.overrides} must map layer names to types, such as "
                "'quant.overrides={*.down_proj:Q8_0}'."
            )
        for pattern, name in self.overrides.items():
            require_type(f"quant.overrides: the type of '{pattern}'", name, TENSOR_TYPES)
        require_choice("quant.calibrated", self.calibrated, (AUTO, True, False))
        require_number("quant.damping", self.damping, 0.0, 1.0)
        require_number("quant.refine", self.refine, 0, 100, integer=True)
        require_flag("quant.propagate", self.propagate)
        self._settle_calibration()

    def _settle_calibration(self) -> None:
        """Decide ``calibrated``, and forget a text that is not read."""
        if self.calibrated == AUTO:
            self.calibrated = self.type in MIXES
        if not self.calibrated:
            self.calibration = None
            if self.propagate:
                raise SlimError(
                    "quant.propagate=true needs a calibration text: use quant.calibrated=true."
                )
            return
        if self.type in PLAIN_TYPES:
            raise SlimError(
                f"quant.calibrated=true: there is nothing to choose in plain weights "
                f"(quant.type={self.type}). Leave it out."
            )
        if self.calibration is None:
            raise SlimError(
                f"quant.type={self.type} is calibrated and needs a text: "
                "quant.calibration=${calibration}, or quant.calibrated=false."
            )

    def cache_key(self) -> dict:
        key = super().cache_key()
        if not self.calibrated:  # as it was when nothing could be calibrated
            for name in ("damping", "refine", "calibration"):
                del key[name]
            if self.type not in MIXES:
                del key["calibrated"]
        if not self.propagate:
            del key["propagate"]
        return key

    def types(self, spec: ModelSpec) -> dict[str, str]:
        """Return full name -> type for every linear layer and embedding.

        Raises:
            SlimError: An override fits no layer.
        """
        matrices = spec.matrices()
        types = self.wanted_types(spec)
        plain = plain_type(spec.dtype) if self.calibrated else PLAIN_STAND_IN
        return {name: fitting_type(types[name], matrices[name][1], plain) for name in types}

    def wanted_types(self, spec: ModelSpec) -> dict[str, str]:
        """Return the types before some give way to those whose blocks divide the rows; likewise."""
        blocks = f"{spec.family.blocks}."
        if self.type in MIXES:
            types = mixed_types(spec, self.type)
        else:
            ends = self.type if self.type in PLAIN_TYPES else "Q8_0"
            types = {}
            for name in spec.matrices():
                types[name] = self.type if name.startswith(blocks) else ends
        if self.embeddings != AUTO:
            ends = [name for name in types if not name.startswith(blocks)]
            types.update(dict.fromkeys(ends, self.embeddings))
        for pattern, wanted in self.overrides.items():
            names = [name for name in types if fnmatchcase(name, pattern)]
            if not names:
                raise SlimError(
                    f"quant.overrides: '{pattern}' is not the name of any layer of {spec.name}. "
                    f"Names look like '{next(iter(types))}'; * stands for anything."
                )
            types.update(dict.fromkeys(names, wanted))
        return types

    def check(self, spec: ModelSpec) -> None:
        check_plain(spec)
        check_model(spec)
        if self.propagate:
            require_held_out(self.calibration)
        types, stored = self.types(spec), plain_type(spec.dtype)
        for layer, name in types.items():
            if self.calibrated and name in PLAIN_TYPES and name != stored:
                raise SlimError(
                    f"{layer} is given the type {name}: calibration leaves plain layers as they "
                    f"are stored, {stored}.\nUse {stored}, or quant.calibrated=false."
                )

    def output_spec(self, spec: ModelSpec) -> ModelSpec:
        types = self.types(spec)
        packed = {name: kind for name, kind in types.items() if kind in BLOCK_TYPES}
        if not packed:
            return spec.with_config(dtype=PLAIN_TYPES.get(self.type, PLAIN_TYPES[PLAIN_STAND_IN]))
        mix = self.type if self.type in MIXES else None
        return spec.with_config(quantization_config=gguf_config(packed, mix))

    def peak_bytes(self, spec: ModelSpec, device: str) -> int:
        """The largest tensor as it was and in blocks, some rows in float32, and the tokenizer;
        calibrated: a block in float32 and packed, a factor as large as H, and the samples."""
        largest = max(rows * columns for rows, columns in spec.matrices().values())
        stored = DTYPE_BYTES.get(spec.dtype, 4) * largest
        plain = 2 * stored + 32 * CHUNK_ELEMENTS + TOKENIZER_BYTES * spec.vocab_size
        if not self.calibrated:
            return plain
        length = min(self.calibration.length, spec.context_length)
        widest = max(columns for _, columns in spec.block_linears().values())
        solving = 32 * CHUNK_ELEMENTS + 4 * widest**2
        block = 6 * spec.block_parameters() + solving
        if self.propagate:
            block += propagation_bytes(spec, self.calibration.samples, length)
        return plain + block + calibration_bytes(spec, self.calibration.samples, length)

    def run(self, source: Path, target: Path, context: Context) -> dict:
        from slim.core.console import warn
        from slim.gguf.export import export_gguf
        from slim.gguf.vocabulary import vocabulary_entries

        checkpoint = open_checkpoint(source)
        spec = checkpoint.spec
        self.check(spec)
        vocabulary_entries(checkpoint.folder, spec)  # refuses tokenizers before any work
        types, result = self.types(spec), self.output_spec(spec)
        metadata = {"tensor_types": dict(Counter(types.values()))}
        if result.quantization is not None:
            metadata["bits_per_weight"] = round(packed_bits(result), 4)
        notes = stand_in_notes(self.wanted_types(spec), types)
        if self.calibrated:
            metadata |= self._run_calibrated(checkpoint, target, context, types, notes)
        else:
            self._round_only(checkpoint, target, types)
        notes += export_gguf(target)
        for note in notes:
            warn(note)
        return {**metadata, **({"notes": notes} if notes else {})}

    def _round_only(self, checkpoint: Checkpoint, target: Path, types: dict[str, str]) -> None:
        """Write the checkpoint, one tensor in memory at a time."""
        from slim.checkpoints.shards import ShardWriter
        from slim.checkpoints.writer import copy_companions, write_config

        writer = ShardWriter(target)
        for name, tensor in rounded_tensors(checkpoint, types):
            writer.add(name, tensor)
        writer.close()
        write_config(self.output_spec(checkpoint.spec).config, target)
        copy_companions(checkpoint.folder, target)

    def _run_calibrated(
        self,
        checkpoint: Checkpoint,
        target: Path,
        context: Context,
        types: dict[str, str],
        notes: list[str],
    ) -> dict:
        """Write the checkpoint by sequential calibration; add to the notes, return metadata."""
        from slim.quantization.report import write_layer_errors  # loads matplotlib

        spec = checkpoint.spec
        method = BlockRounding(spec, types, self.damping, self.refine)
        method.propagates = self.propagate
        tokens = self.calibration.tokens_for(checkpoint)
        config = self.output_spec(spec).config
        errors = transform_checkpoint(checkpoint, target, method, config, context, tokens)
        check_written(target, method.meant)
        notes += method.notes
        return write_layer_errors(target / REPORT, errors) | method.propagation()


def stand_in_notes(wanted: dict[str, str], types: dict[str, str]) -> list[str]:
    """Return in a sentence which types gave way to others whose blocks divide the rows."""
    changed = [name for name in types if types[name] != wanted[name]]
    if not changed:
        return []
    counts = Counter((wanted[name], types[name]) for name in changed)
    parts = [f"{count} x {types[1]} for {types[0]}" for types, count in counts.items()]
    return [
        f"Blocks do not divide the rows of {len(changed)} layers (first {changed[0]}), which are "
        f"stored in other types, as llama.cpp does: {', '.join(parts)}."
    ]


def require_type(setting: str, name: str, allowed: tuple[str, ...]) -> None:
    """Raise ``SlimError`` where slim does not write a type.

    Args:
        setting: For the message.
        name: The type, as llama.cpp calls it.
        allowed: The types that the setting may have.
    """
    if name in allowed:
        return
    for begin, near in UNWRITTEN.items():
        if str(name).startswith(begin):
            near = near if near in allowed else f"{near}_M"
            raise SlimError(
                f"{setting}={name}: slim does not write this type; the nearest is {near}. "
                f"It writes {', '.join(allowed)}."
            )
    hint = did_you_mean(str(name), allowed)
    if f"{name}_M" in allowed:
        hint = f" Did you mean {name}_M?"
    raise SlimError(f"{setting}={name}: must be one of {', '.join(allowed)}.{hint}")


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

    from slim.gguf.blocks import require_range, round_to_blocks

    if type_name in BLOCK_TYPES:
        require_range(layer, weight)
        return f"{layer}.weight_blocks", round_to_blocks(weight, type_name)
    rounded = weight.to(getattr(torch, PLAIN_TYPES[type_name]))
    if not torch.isfinite(rounded).all():
        raise SlimError(
            f"{layer} has weights that {type_name} cannot hold, or NaN. Use quant.type=BF16."
        )
    return f"{layer}.weight", rounded

"""Writes ``model.gguf`` and Ollama's ``Modelfile`` into a checkpoint folder, one tensor at a time.

Matrices stand in the file in the type in which the folder holds them (blocks as they are), all
other tensors in float32, as llama.cpp wants them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slim.checkpoints.checkpoint import Checkpoint, open_checkpoint
from slim.checkpoints.reader import TensorReader
from slim.core.errors import SlimError
from slim.gguf.blocks import BLOCK_TYPES
from slim.gguf.metadata import (
    GGUF_FILE,
    architecture_of,
    model_entries,
    model_notes,
    rotary_tensors,
    stored_names,
)
from slim.gguf.mixes import MIXES
from slim.gguf.tokenizer import KEY
from slim.gguf.vocabulary import vocabulary_entries

if TYPE_CHECKING:
    import torch
    from gguf import GGUFWriter

MODELFILE = "Modelfile"
BLOCKS = "weight_blocks"
# safetensors' names of types -> GGUF's
STORED_TYPES = {"F32": "F32", "F16": "F16", "BF16": "BF16"}
# type of most weights -> general.file_type (gguf.LlamaFileType)
FILE_TYPES = {"F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "Q5_0": 8, "Q5_1": 9, "BF16": 32}
FILE_TYPES |= {"Q2_K": 10, "Q3_K": 11, "Q4_K": 14, "Q5_K": 16, "Q6_K": 18}
QUANTIZATION_VERSION = 2  # of ggml's block types
# llama.cpp looks for these tokens in every model whose name contains "phi3", to let them take the
# white space that follows along, and does not load one that lacks them.
PHI3_TOKENS = {"<unk>", "<s>", "</s>", "<|endoftext|>"}


def export_gguf(folder: Path) -> list[str]:
    """Write ``model.gguf`` and ``Modelfile`` into a checkpoint folder.

    Args:
        folder: Plain weights, or blocks (``quant.format=gguf``).

    Returns:
        What the user should know, in sentences.
    """
    from gguf import GGUFWriter

    checkpoint = open_checkpoint(folder)
    spec = checkpoint.spec
    name, _ = architecture_of(spec)
    file = GgufTensors(checkpoint)
    writer = GGUFWriter(folder / GGUF_FILE, name)
    tokens = vocabulary_entries(folder, spec)
    entries = {**file_entries(checkpoint, file.types(), tokens), **model_entries(spec), **tokens}
    for key, value in entries.items():
        add_entry(writer, key, value)
    file.write(writer)
    write_modelfile(folder, tokens)
    return model_notes(spec)


class GgufTensors:
    """The tensors of a checkpoint as the file has them.

    Args:
        checkpoint: Plain weights, or blocks.
    """

    def __init__(self, checkpoint: Checkpoint):
        self.checkpoint, self.spec = checkpoint, checkpoint.spec
        self.reader = TensorReader(checkpoint)
        self.names = list(self._names())

    def _names(self) -> Iterator[tuple[str, str]]:
        """Yield (name in the checkpoint, name in the file).

        Raises:
            SlimError: The checkpoint lacks a weight.
        """
        for module, name in stored_names(self.spec):
            blocks, weight = f"{module}.{BLOCKS}", f"{module}.weight"
            stored = blocks if blocks in self.reader else weight
            if stored not in self.reader:
                raise SlimError(f"{self.checkpoint.folder} has no tensor '{weight}'.")
            yield stored, f"{name}.weight"
            if f"{module}.bias" in self.reader:
                yield f"{module}.bias", f"{name}.bias"

    def type_of(self, name: str) -> str:
        """Return the type in which the file has a tensor of the checkpoint."""
        module, _, kind = name.rpartition(".")
        if kind == BLOCKS:
            return self.spec.quantization["types"][module]
        _, dtype, shape = self.checkpoint.tensors[name]
        if len(shape) == 1:
            return "F32"
        if dtype not in STORED_TYPES:
            raise SlimError(f"{name} is stored as {dtype}. GGUF holds {', '.join(STORED_TYPES)}.")
        return STORED_TYPES[dtype]

    def types(self) -> Counter:
        """Return type -> bytes of the tensors that have it."""
        sizes: Counter = Counter()
        for stored, _ in self.names:
            type_name = self.type_of(stored)
            sizes[type_name] += _nbytes(self.checkpoint.tensors[stored][2], type_name)
        return sizes

    def write(self, writer: GGUFWriter) -> None:
        """List all tensors, then write them one after another."""
        import numpy

        factors = rotary_tensors(self.spec)
        for name, values in factors.items():
            writer.add_tensor_info(name, [len(values)], numpy.dtype("float32"), 4 * len(values))
        for stored, name in self.names:
            self._announce(writer, stored, name)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for values in factors.values():
            writer.write_tensor_data(numpy.float32(values))
        for stored, name in self.names:
            writer.write_tensor_data(self._data(stored, name))
            self.reader.release()
        writer.close()

    def _announce(self, writer: GGUFWriter, stored: str, name: str) -> None:
        import numpy
        from gguf import GGMLQuantizationType

        type_name, shape = self.type_of(stored), self.checkpoint.tensors[stored][2]
        kind = "uint8" if type_name in BLOCK_TYPES else "uint16"  # the writer asks for bytes only
        writer.add_tensor_info(
            name,
            list(shape),
            numpy.dtype(kind),
            _nbytes(shape, type_name),
            GGMLQuantizationType[type_name],
        )

    def _data(self, stored: str, name: str):
        """Return a tensor's numbers in the order and the type of the file, as a numpy array."""
        import torch

        tensor, type_name = self.reader.read(stored), self.type_of(stored)
        _, architecture = architecture_of(self.spec)
        if type_name == "F32":
            tensor = tensor.float()
            if name.endswith("norm.weight"):
                tensor = tensor + architecture.norm_offset
        part = name.split(".")[2] if name.startswith("blk.") else ""
        if part in architecture.permuted:
            shape = self.spec.at(int(name.split(".")[1]))
            tensor = permute_rows(tensor, shape.heads if part == "attn_q" else shape.kv_heads)
        if type_name in ("F16", "BF16"):
            tensor = tensor.contiguous().view(torch.int16)
        return tensor.contiguous().numpy()


def _nbytes(shape: tuple[int, ...], type_name: str) -> int:
    """Return the bytes of a tensor in the file; the shape of blocks counts bytes already."""
    import math

    size = {"F32": 4, "F16": 2, "BF16": 2}.get(type_name, 1)
    return math.prod(shape) * size


def permute_rows(tensor: torch.Tensor, heads: int) -> torch.Tensor:
    """Put the rows of queries or keys into the order in which llama.cpp rotates them: the inverse
    of :func:`slim.gguf.architecture.restore_rows`.

    Args:
        tensor: Weight or blocks (heads * head_dim, ...), or bias (heads * head_dim,).
        heads: The number of heads in it.
    """
    halves = tensor.reshape(heads, 2, -1, *tensor.shape[1:])
    return halves.transpose(1, 2).reshape(tensor.shape)


def file_entries(checkpoint: Checkpoint, types: Counter, tokens: dict[str, Any]) -> dict[str, Any]:
    """Return the metadata that describe the file: what to call it, the type of most weights.

    Args:
        checkpoint: What is written.
        types: Type -> bytes of the tensors that have it.
        tokens: The metadata of the tokenizer.
    """
    family = checkpoint.spec.family.model_type
    name = family
    if family == "phi3" and not set(tokens[f"{KEY}tokens"]) >= PHI3_TOKENS:
        name = "phi"
    size = size_label(checkpoint.spec.parameters())
    entries = {
        "general.type": "model",
        "general.name": f"{name} {size}",
        "general.basename": family,  # files of Mistral's models are told from Llama's by it
        "general.size_label": size,
        "general.file_type": file_type(checkpoint, types),
    }
    if set(types) & set(BLOCK_TYPES):
        entries["general.quantization_version"] = QUANTIZATION_VERSION
    return entries


def file_type(checkpoint: Checkpoint, types: Counter) -> int:
    """Return ``general.file_type``: of the mix where it has a name, else of most weights' type."""
    mix = (checkpoint.spec.quantization or {}).get("mix")
    if mix in MIXES:
        return MIXES[mix][1]
    return FILE_TYPES[types.most_common(1)[0][0]]


def size_label(parameters: int) -> str:
    """Return a number of parameters as GGUF's file names have it: 135M, 1.1B."""
    if parameters >= 10**9:
        return f"{parameters / 1e9:.1f}B"
    return f"{round(parameters / 1e6)}M" if parameters >= 10**6 else f"{round(parameters / 1e3)}K"


def add_entry(writer: GGUFWriter, key: str, value: Any) -> None:
    """Add a metadata entry in the type that llama.cpp expects."""
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)


def write_modelfile(folder: Path, tokens: dict[str, Any]) -> None:
    """Write Ollama's ``Modelfile``: the file, and where generation stops."""
    names = tokens[f"{KEY}tokens"]
    lines = [f"FROM ./{GGUF_FILE}"]
    stops = {tokens.get(f"{KEY}{name}_token_id") for name in ("eos", "eot")}
    for number in sorted(stops - {None}):
        lines.append(f'PARAMETER stop "{names[number]}"')
    (folder / MODELFILE).write_text("\n".join(lines) + "\n", encoding="utf-8")

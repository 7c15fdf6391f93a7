"""``quant.format=gguf``: packed weights in GGUF's blocks, with the GGUF file itself in the same
folder.

    weight_blocks      uint8 [out, bytes of a row]        blocks of weights (slim/gguf/blocks.py)

slim loads the safetensors files, whose blocks are those of ``model.gguf`` to the byte (there, rows
of queries and keys may stand in another order). Engines load ``model.gguf``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from slim.core.errors import SlimError
from slim.core.io import read_json
from slim.core.lazy import LazyModule
from slim.gguf.blocks import (
    BLOCK,
    BLOCK_TYPES,
    TYPES_OF_CODES,
    pack_blocks,
    row_bytes,
    unpack_blocks,
)
from slim.gguf.metadata import GGUF_FILE, check_model
from slim.quantization.formats.base import Format, Sizes, Stored, read_tensor
from slim.quantization.scheme import WHOLE_ROW, Scheme

if TYPE_CHECKING:
    from pathlib import Path

    import torch

    from slim.checkpoints.checkpoint import Checkpoint
    from slim.checkpoints.reader import TensorReader
    from slim.models.spec import ModelSpec
    from slim.quantization.solvers.grid import Quantized
else:
    torch = LazyModule("torch")

FITTING = (
    "GGUF holds codes of 4 bits (quant.symmetric=false: Q4_1, true: Q4_0) and symmetric ones of "
    "8 bits (Q8_0)."
)
ROUNDED_OFFSETS = (
    "Q4_1 stores offsets in float16: they round by at most 2^-11 of themselves, below 0.8 % of a "
    "step of the grid (docs/gguf.md). Figures are those of the rounded weights."
)


class GgufFormat(Format):
    """The format as slim writes and reads it."""

    name = quant_method = "gguf"
    codes = "weight_blocks"

    def scale_dtype(self, model_dtype: str) -> str:
        return "float16"

    def check(
        self, schemes: Mapping[str, Scheme], ordered: bool, sizes: Sizes | None = None
    ) -> None:
        if ordered:
            raise SlimError(
                "quant.format=gguf holds no groups in activation order. Use "
                "quant.static_groups=true or quant.act_order=false."
            )
        for layer, scheme in schemes.items():
            if (scheme.bits, scheme.symmetric) not in TYPES_OF_CODES:
                kind = "symmetric" if scheme.symmetric else "asymmetric"
                raise SlimError(
                    f"quant.format=gguf has no type for {kind} codes of {scheme.bits} bits "
                    f"({layer}).\n{FITTING}"
                )
            columns = (sizes or {}).get(layer, (0, 0))[1]
            if scheme.group_size == WHOLE_ROW and columns % BLOCK:
                raise SlimError(
                    f"quant.format=gguf has blocks of {BLOCK} weights, which do not divide the "
                    f"{columns} inputs of {layer}.\nLeave the layer as it is: "
                    f"'quant.overrides={{{layer}:{{bits:16}}}}'"
                )

    def check_model(self, spec: ModelSpec) -> None:
        check_model(spec)

    def begin(self, source: Checkpoint) -> None:
        from slim.gguf.vocabulary import vocabulary_entries

        vocabulary_entries(source.folder, source.spec)

    def finish(self, folder: Path) -> list[str]:
        from slim.gguf.export import export_gguf

        notes = export_gguf(folder)
        if "Q4_1" in read_json(folder / "config.json")["quantization_config"]["types"].values():
            notes.append(ROUNDED_OFFSETS)
        return notes

    def config(
        self,
        schemes: Mapping[str, Scheme],
        linears: Iterable[str],
        ordered: bool = False,
        **extra: Any,
    ) -> dict:
        types = {}
        for layer, scheme in schemes.items():
            # what check() refuses is still described for plans that are then refused
            types[layer] = TYPES_OF_CODES.get((scheme.bits, scheme.symmetric), "Q8_0")
        return gguf_config(types)

    def tensors(self, layer: Quantized) -> dict[str, torch.Tensor]:
        return {self.codes: pack_blocks(layer)}

    def layer_bytes(
        self, rows: int, columns: int, scheme: Scheme, model_dtype: str, ordered: bool = False
    ) -> int:
        name = TYPES_OF_CODES.get((scheme.bits, scheme.symmetric))
        if name is None:  # a plan that is then refused
            return rows * columns * scheme.bits // 8
        return rows * row_bytes(name, columns)

    def bytes_of(self, config: dict, layer: str, rows: int, columns: int, model_dtype: str) -> int:
        return rows * row_bytes(config["types"][layer], columns)

    def read_config(self, config: dict, name: str) -> Stored:
        types = config.get("types")
        if not isinstance(types, dict):
            raise SlimError(
                f"{name}: the quantization_config lists no types. slim reads GGUF blocks it wrote "
                "itself; give other GGUF files as model.source=FILE.gguf."
            )
        unknown = sorted(set(types.values()) - set(BLOCK_TYPES))
        if unknown:
            raise SlimError(
                f"{name} has blocks of the type {unknown[0]}. slim reads {', '.join(BLOCK_TYPES)}."
            )
        return Stored(self, config, name)

    def scheme_of(self, config: dict, layer: str) -> Scheme | None:
        type_name = config["types"].get(layer)
        return None if type_name is None else BLOCK_TYPES[type_name].scheme

    def dense_weight(
        self, reader: TensorReader, layer: str, rows: int, columns: int, stored: Stored
    ) -> torch.Tensor:
        return read_blocks(reader, layer, rows, columns, stored, torch.float32)


def read_blocks(
    reader: TensorReader,
    layer: str,
    rows: int,
    columns: int,
    stored: Stored,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Return the weights of a layer that is stored in blocks.

    Args:
        reader: On the checkpoint.
        layer: The layer's full name.
        rows: Its outputs.
        columns: Its inputs.
        stored: How the checkpoint is quantized.
        dtype: Type of the result.

    Returns:
        [out, in] in ``dtype``.

    Raises:
        SlimError: The tensor is missing or has another shape.
    """
    type_name = stored.config["types"][layer]
    shape = (rows, row_bytes(type_name, columns))
    blocks = read_tensor(reader, f"{layer}.{GgufFormat.codes}", shape)
    return unpack_blocks(blocks, type_name, dtype)


def gguf_config(types: Mapping[str, str], mix: str | None = None) -> dict:
    """Return the ``quantization_config`` for layers in blocks.

    Args:
        types: Full layer name -> one of ``BLOCK_TYPES``.
        mix: llama.cpp's name of such a mix of types, where it has one.
    """
    config = {"quant_method": GgufFormat.quant_method, "file": GGUF_FILE, "types": dict(types)}
    return config if mix is None else {**config, "mix": mix}

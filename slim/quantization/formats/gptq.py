"""GPTQ's layout, as GPTQModel and vLLM read it: version 1 where the grids are symmetric, version 2
where they are not.

    qweight  int32 [ceil(in b / 32), out]      codes, a dense stream down each column
    qzeros   int32 [groups, ceil(out b / 32)]  zero points, a dense stream along each row
    scales   float16 [groups, out]
    g_idx    int32 [in]                        the group of every input

Version 1 (``checkpoint_format: gptq``) stores zero - 1 modulo 2^b, a habit of the first
implementation; version 2 (``gptq_v2``) stores the zero point itself. Layers that differ from the
rest or stay plain stand under ``dynamic``: patterns of names with the settings that differ, plain
layers after ``-:``; the first that matches holds."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from slim.core.errors import SlimError
from slim.core.lazy import LazyModule
from slim.quantization.formats.base import (
    EMBEDDINGS,
    HEADS,
    Format,
    Packed,
    Sizes,
    Stored,
    plain_index,
    read_group_index,
    read_scale,
    read_words,
    refuse_embeddings,
    require_integer,
    require_scheme,
)
from slim.quantization.kernels.packing import pack, pack_columns, unpack, words_per_row
from slim.quantization.scheme import WHOLE_ROW, Scheme

if TYPE_CHECKING:
    import torch

    from slim.checkpoints.reader import TensorReader
    from slim.quantization.solvers.grid import Quantized
else:
    torch = LazyModule("torch")

V1, V2 = "gptq", "gptq_v2"
METHOD_SETTINGS = ("damp_percent", "damp_auto_increment", "true_sequential", "static_groups", "mse")


class Gptq(Format):
    """The format as slim writes and reads it."""

    name = quant_method = "gptq"
    codes = "qweight"
    scales = "scales"
    scales_by_input = True

    def scale_dtype(self, model_dtype: str) -> str:
        return "float16"

    def check(
        self, schemes: Mapping[str, Scheme], ordered: bool, sizes: Sizes | None = None
    ) -> None:
        refuse_embeddings(self.name, schemes)
        if len({scheme.symmetric for scheme in schemes.values()}) > 1:
            raise SlimError(
                "quant.format=gptq stores all zero points in one way, so layers are symmetric or "
                "asymmetric together.\n"
                "Set quant.symmetric for all layers or use quant.format=compressed-tensors."
            )

    def config(
        self,
        schemes: Mapping[str, Scheme],
        linears: Iterable[str],
        ordered: bool = False,
        **extra: Any,
    ) -> dict:
        """Return the settings of most layers, and under ``dynamic`` what differs."""
        ((usual, _),) = Counter(schemes.values()).most_common(1)
        plain = [layer for layer in linears if layer not in schemes and layer not in HEADS]
        dynamic: dict[str, dict] = {}
        if plain:
            dynamic[f"-:{any_of(plain)}"] = {}
        for scheme in dict.fromkeys(schemes.values()):
            if scheme != usual:
                layers = [layer for layer in schemes if schemes[layer] == scheme]
                dynamic[f"+:{any_of(layers)}"] = settings(scheme)
        config = {
            "quant_method": self.quant_method,
            "checkpoint_format": V1 if usual.symmetric else V2,
            **settings(usual),
            "desc_act": ordered,
            "lm_head": bool(HEADS & schemes.keys()),
            "pack_dtype": "int32",
        }
        if dynamic:
            config["dynamic"] = dynamic
        config.update((key, extra[key]) for key in METHOD_SETTINGS if key in extra)
        config["meta"] = {"quantizer": ["slim"]}
        return config

    def tensors(self, layer: Quantized) -> dict[str, torch.Tensor]:
        bits, zero = layer.scheme.bits, layer.zero
        if layer.scheme.symmetric:
            zero = (zero.to(torch.int16) - 1) & (2**bits - 1)
        return {
            "qweight": pack_columns(layer.codes.T, bits),
            "qzeros": pack(zero.T, bits),
            "scales": layer.scale.T.to(torch.float16).contiguous(),
            "g_idx": plain_index(layer),
        }

    def layer_bytes(
        self, rows: int, columns: int, scheme: Scheme, model_dtype: str, ordered: bool = False
    ) -> int:
        groups = scheme.groups(columns)
        weights = 4 * rows * words_per_row(columns, scheme.bits)
        return (
            weights
            + 4 * groups * words_per_row(rows, scheme.bits)
            + 2 * groups * rows
            + 4 * columns
        )

    def read_config(self, config: dict, name: str) -> Stored:
        version = version_of(config)
        if version not in (V1, V2) or config.get("is_marlin_format"):
            raise SlimError(
                f"{name} is quantised as gptq in the format {version}. slim reads {V1} and {V2}."
            )
        if config.get("pack_dtype", "int32") != "int32":
            raise SlimError(
                f"{name} packs codes into {config['pack_dtype']}. "
                "slim reads gptq packed into int32."
            )
        for entry in (config, *overrides(config).values()):
            merged = {**config, **entry}
            bits = require_integer(merged, "bits", name)
            group = require_integer(merged, "group_size", name)
            require_scheme(bits, group, bool(merged.get("sym", True)), name)
        return Stored(self, config, name)

    def scheme_of(self, config: dict, layer: str) -> Scheme | None:
        settings = settings_of(config, layer)
        if settings is None:
            return None
        return Scheme(settings["bits"], settings["group_size"], bool(settings.get("sym", True)))

    def is_ordered(self, config: dict, layer: str) -> bool:
        settings = settings_of(config, layer) or {}
        return bool(settings.get("desc_act")) and settings["group_size"] != WHOLE_ROW

    def read(
        self,
        reader: TensorReader,
        name: str,
        columns: int,
        rows: int,
        scheme: Scheme,
        stored: Stored,
    ) -> Packed:
        bits, groups = scheme.bits, scheme.groups(columns)
        words = read_words(reader, f"{name}.qweight", (words_per_row(columns, bits), rows))
        scale = read_scale(reader, f"{name}.scales", (groups, rows))
        zero = unpack(
            read_words(reader, f"{name}.qzeros", (groups, words_per_row(rows, bits))), bits, rows
        )
        if version_of(stored.config) == V1:
            zero = ((zero.to(torch.int16) + 1) & (2**bits - 1)).to(torch.uint8)
        index = None
        if f"{name}.g_idx" in reader or stored.ordered(name):  # files without order may lack it
            index = read_group_index(reader, f"{name}.g_idx", columns, scheme)
        return Packed(words.T.contiguous(), scale.T.contiguous(), zero.T.contiguous(), index)


def version_of(config: dict) -> str:
    """Return the layout's version; files from before there were two do not name it."""
    return config.get("checkpoint_format") or config.get("format") or V1


def settings(scheme: Scheme) -> dict:
    """Return a scheme in the words of GPTQModel."""
    return {"bits": scheme.bits, "group_size": scheme.group_size, "sym": scheme.symmetric}


def any_of(layers: list[str]) -> str:
    """Return the pattern that these names match and no others."""
    return "^(?:" + "|".join(layer.replace(".", r"\.") for layer in layers) + ")$"


def overrides(config: dict) -> dict[str, dict]:
    """Return ``dynamic`` in the order in which it holds: GPTQModel looks at plain layers first."""
    dynamic = config.get("dynamic") or {}
    return dict(sorted(dynamic.items(), key=lambda entry: not entry[0].startswith("-:")))


def overridden(config: dict, layer: str) -> dict | None:
    """Return the config with what ``dynamic`` says of a layer; None: it is plain.

    Args:
        config: The ``quantization_config``.
        layer: The layer's full name.
    """
    for pattern, entry in overrides(config).items():
        if re.match(pattern.removeprefix("-:").removeprefix("+:"), layer):
            if pattern.startswith("-:"):
                return None
            return {**config, **entry}
    return config


def settings_of(config: dict, layer: str) -> dict | None:
    """Return the settings that hold for a layer; None: it is plain.

    Args:
        config: The ``quantization_config``.
        layer: The layer's full name.
    """
    if layer in EMBEDDINGS or (layer in HEADS and not config.get("lm_head")):
        return None
    listed = config.get("modules_in_block_to_quantize")
    if listed and layer not in HEADS:
        names: list[str] = []
        for part in listed:  # a name, or the names of layers that are quantized together
            names += [part] if isinstance(part, str) else part
        if not layer.endswith(tuple(f".{name}" for name in names)):
            return None
    return overridden(config, layer)

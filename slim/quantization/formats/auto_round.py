"""AutoRound's own format: read only. Its layers are packed as GPTQ or AWQ packs them, which
``packing_format`` names; the rest is GPTQ's words for other keys.

    auto_round:auto_gptq   as gptq, zero points less one (version 1), symmetric or not
    auto_round, :gptqmodel as gptq_v2, zero points as they are
    auto_round:auto_awq    as awq gemm"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from slim.core.errors import SlimError
from slim.quantization.formats.awq import AwqGemm
from slim.quantization.formats.base import Format, Packed, Stored
from slim.quantization.formats.gptq import V1, V2, Gptq

if TYPE_CHECKING:
    from slim.checkpoints.reader import TensorReader
    from slim.quantization.scheme import Scheme

VERSIONS = {
    "auto_round:auto_gptq": V1,
    "auto_round:gptq": V1,
    "auto_round": V2,
    "auto_round:gptqmodel": V2,
}
AWQ = ("auto_round:auto_awq", "auto_round:awq")


class AutoRoundFormat(Format):
    """The format as AutoRound writes it."""

    name = quant_method = "auto-round"
    codes = "qweight"

    def scale_dtype(self, model_dtype: str) -> str:
        return "float16"

    def layer_bytes(
        self, rows: int, columns: int, scheme: Scheme, model_dtype: str, ordered: bool = False
    ) -> int:
        return Gptq().layer_bytes(rows, columns, scheme, model_dtype, ordered)

    def read_config(self, config: dict, name: str) -> Stored:
        packing = str(config.get("packing_format", "auto_round:auto_gptq"))
        if packing not in (*VERSIONS, *AWQ):
            raise SlimError(
                f"{name} is quantised by AutoRound and packed as {packing}. slim reads "
                f"{', '.join((*VERSIONS, *AWQ))}."
            )
        if config.get("data_type", "int") != "int" or (config.get("act_bits") or 16) < 16:
            raise SlimError(
                f"{name}: slim reads AutoRound's integer weights with plain activations; this one "
                f"has data_type={config.get('data_type')}, act_bits={config.get('act_bits')}."
            )
        settings = {**config, "dynamic": differing(config, name)}
        if packing in AWQ:
            settings.update(version="gemm", zero_point=not config.get("sym", True))
            stored = AwqGemm().read_config(settings, name)
        else:
            settings["checkpoint_format"] = VERSIONS[packing]
            stored = Gptq().read_config(settings, name)
        return Stored(self, stored.config, name)

    def scheme_of(self, config: dict, layer: str) -> Scheme | None:
        return packed_by(config).scheme_of(config, layer)

    def is_ordered(self, config: dict, layer: str) -> bool:
        return packed_by(config).is_ordered(config, layer)

    def read(
        self,
        reader: TensorReader,
        name: str,
        columns: int,
        rows: int,
        scheme: Scheme,
        stored: Stored,
    ) -> Packed:
        return packed_by(stored.config).read(reader, name, columns, rows, scheme, stored)


def packed_by(config: dict) -> Format:
    """Return the format whose layout a checked config's layers have."""
    if str(config.get("packing_format")) in AWQ:
        return AwqGemm()
    return Gptq()


def differing(config: dict, name: str) -> dict[str, dict]:
    """Return AutoRound's ``extra_config`` in GPTQModel's words: pattern -> settings that differ.

    Args:
        config: The ``quantization_config``.
        name: How to call the model in messages.
    """
    dynamic: dict[str, dict] = {}
    for layer, settings in (config.get("extra_config") or {}).items():
        if not isinstance(settings, dict):
            raise SlimError(f"{name}: extra_config of '{layer}' must be an object of settings.")
        # names, and patterns with regular expressions' dots and stars
        pattern = layer if "*" in layer or "\\" in layer else f"{re.escape(layer)}$"
        if (settings.get("bits") or config.get("bits", 16)) >= 16:
            dynamic[f"-:{pattern}"] = {}
        else:
            dynamic[f"+:{pattern}"] = settings
    return dynamic

"""Checkpoint formats for packed weights: their layouts, and how ``config.json`` describes them.
Needs no torch.

A quantized checkpoint is described by ``schemes``, full layer name -> :class:`Scheme`; layers may
differ. A layer that is not in it is plain. A :class:`Format` turns that into a
``quantization_config`` and tensors; :func:`read_config` and ``Format.read`` turn files back, those
of other tools included. docs/formats.md says which engines read what.

To add a format, name its class in :data:`FORMATS`; it is imported on first use."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Mapping
from typing import Any

from slim.core.errors import SlimError
from slim.core.settings import require_choice
from slim.quantization.formats.base import Format, Packed, Stored

__all__ = ["FORMATS", "WRITTEN", "Format", "Packed", "Stored", "get_format", "read_config"]

# name -> "module:class", in the order in which a quantization_config is compared with them
FORMATS = {
    "compressed-tensors": "slim.quantization.formats.compressed_tensors:CompressedTensors",
    "gptq": "slim.quantization.formats.gptq:Gptq",
    "awq": "slim.quantization.formats.awq:AwqGemm",
    "bitsandbytes": "slim.quantization.formats.bitsandbytes:BitsAndBytesFormat",
    "auto-round": "slim.quantization.formats.auto_round:AutoRoundFormat",
    "gguf": "slim.gguf.format:GgufFormat",
}
# values of quant.format; what bitsandbytes writes belongs to its own two methods
WRITTEN = ("compressed-tensors", "gptq", "awq", "gguf")


@functools.cache
def resolve(name: str) -> Format:
    """Return the format of this name in :data:`FORMATS`, importing its module on first use."""
    module, _, attribute = FORMATS[name].partition(":")
    return getattr(importlib.import_module(module), attribute)()


def get_format(name: str) -> Format:
    """Return the format to write.

    Args:
        name: Value of ``quant.format``.

    Raises:
        SlimError: It is none of :data:`WRITTEN`.
    """
    require_choice("quant.format", name, WRITTEN)
    return resolve(name)


def find_format(config: Mapping[str, Any] | None) -> Format | None:
    """Return the format that a ``quantization_config`` names; None where slim knows no such format.

    Args:
        config: The ``quantization_config``; None for plain weights.
    """
    for name in FORMATS if config is not None else ():
        if resolve(name).describes(config):
            return resolve(name)
    return None


def read_config(config: dict, name: str = "the model") -> Stored:
    """Read a ``quantization_config``, slim's own or another tool's.

    Args:
        config: The ``quantization_config``.
        name: How to call the model in messages.

    Raises:
        SlimError: slim does not read this method or layout, or settings are missing or contradict
            each other.
    """
    found = find_format(config)
    if found is None:
        method = config.get("quant_method")
        raise SlimError(
            f"{name} is quantized as quant_method={method}. slim reads {', '.join(FORMATS)}."
        )
    return found.read_config(config, name)

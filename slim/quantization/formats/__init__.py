"""Checkpoint formats for packed weights: their layouts, and how ``config.json`` describes them.
Needs no torch.

A quantised checkpoint is described by ``schemes``, full layer name -> :class:`Scheme`; layers may
differ. A layer that is not in it is plain. :data:`FORMATS` turns that into a
``quantization_config`` and tensors; :func:`read_config` and ``Format.read`` turn files back, those
of other tools included. docs/formats.md says which engines read what."""

from __future__ import annotations

from slim.core.errors import SlimError
from slim.core.settings import require_choice
from slim.quantization.formats.awq import AwqGemm
from slim.quantization.formats.base import Format, Packed, Stored
from slim.quantization.formats.compressed_tensors import CompressedTensors
from slim.quantization.formats.gptq import Gptq

__all__ = ["FORMATS", "Format", "Packed", "Stored", "get_format", "read_config"]

FORMATS: dict[str, Format] = {form.name: form for form in (CompressedTensors(), Gptq(), AwqGemm())}


def get_format(name: str) -> Format:
    """Return the format of this name. Raises ``SlimError`` naming ``quant.format`` for any
    other."""
    require_choice("quant.format", name, FORMATS)
    return FORMATS[name]


def read_config(config: dict, name: str = "the model") -> Stored:
    """Read a ``quantization_config``, slim's own or another tool's.

    name: how to call the model in messages. Raises ``SlimError`` for methods and layouts that slim
    does not read, and for settings that are missing or contradict each other."""
    method = config.get("quant_method")
    for form in FORMATS.values():
        if form.quant_method == method:
            return form.read_config(config, name)
    known = ", ".join(form.quant_method for form in FORMATS.values())
    raise SlimError(f"{name} is quantised as quant_method={method}. slim reads {known}.")

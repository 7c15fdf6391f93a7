"""The files of bitsandbytes: LLM.int8() and 4 bits, as transformers writes them. Needs no torch.

Layouts are in ``slim/quantization/methods/bitsandbytes_packing.py``. The library runs its own
files, so nothing is unpacked here: ``slim/loading/bitsandbytes.py`` loads them by transformers."""

from __future__ import annotations

import importlib
import importlib.util
import math
import re
from collections.abc import Mapping
from types import ModuleType
from typing import Any

from slim.core.errors import SlimError
from slim.quantization.formats.base import EMBEDDINGS, HEADS, Format, Stored
from slim.quantization.scheme import WHOLE_ROW, Scheme

METHOD = "bitsandbytes"
# weights that share a scale at 4 bits; scales that share a scale under double quantization
BLOCK, STATISTICS = 64, 256
# the library's CPU kernel works on so many outputs at a time, and fails where some are left over
KERNEL_ROWS = 32
# every key that transformers writes, with its default
DEFAULTS = {
    "quant_method": METHOD,
    "_load_in_4bit": False,
    "_load_in_8bit": False,
    "load_in_4bit": False,
    "load_in_8bit": False,
    "bnb_4bit_compute_dtype": "float32",
    "bnb_4bit_quant_storage": "uint8",
    "bnb_4bit_quant_type": "fp4",
    "bnb_4bit_use_double_quant": False,
    "llm_int8_enable_fp32_cpu_offload": False,
    "llm_int8_has_fp16_weight": False,
    "llm_int8_skip_modules": None,
    "llm_int8_threshold": 6.0,
}


class BitsAndBytesFormat(Format):
    """The format as slim's ``quant=int8`` and ``quant=nf4`` write it and slim reads it."""

    name = quant_method = METHOD
    codes = "weight"
    trains_dora = True

    def describes(self, config: Mapping[str, Any]) -> bool:
        # some files say only what to load in
        loads = config.get("load_in_4bit") or config.get("load_in_8bit")
        return super().describes(config) or bool(loads)

    def require_library(self) -> None:
        require_library()

    def import_library(self) -> None:
        library()

    def read_config(self, config: dict, name: str) -> Stored:
        if not (config.get("load_in_4bit") or config.get("load_in_8bit")):
            raise SlimError(
                f"{name}: the quantization_config says neither load_in_4bit nor load_in_8bit. "
                "slim reads bitsandbytes' files of 4 and 8 bits."
            )
        return Stored(self, config, name)

    def scheme_of(self, config: dict, layer: str) -> Scheme | None:
        """Return the scheme of a layer by the library's own rule; None: it is plain.

        A layer is skipped where an entry of the list is its name's beginning (up to a dot), its
        end, or a pattern for its beginning; the head also where there is no list.
        """
        skipped = config.get("llm_int8_skip_modules")
        if layer in EMBEDDINGS or (layer in HEADS and skipped is None):
            return None
        for entry in skipped or []:
            if layer.endswith(entry) or re.match(rf"(?:{entry})(?:(?<=\.)|(?=\.|$))", layer):
                return None
        return Scheme(8, WHOLE_ROW, True) if config.get("load_in_8bit") else Scheme(4, BLOCK, True)

    def bytes_of(self, config: dict, layer: str, rows: int, columns: int, model_dtype: str) -> int:
        """Return the bytes a layer [rows, columns] takes in the file, its statistics included.

        Exact for int8; for 4 bits the length of a JSON text may differ by a few bytes.
        """
        if config.get("load_in_8bit"):
            return rows * columns + 4 * rows + 1  # codes, SCB, weight_format
        blocks = math.ceil(rows * columns / BLOCK)
        codes_and_map = math.ceil(rows * columns / 2) + 4 * 16
        if config.get("bnb_4bit_use_double_quant"):
            return codes_and_map + blocks + 4 * math.ceil(blocks / STATISTICS) + 4 * 256 + 172
        return codes_and_map + 4 * blocks + 82


def require_library() -> None:
    """Check that bitsandbytes is there, without importing it.

    Raises:
        SlimError: It is not installed.
    """
    if importlib.util.find_spec(METHOD) is None:
        raise SlimError(
            "quant=int8 and quant=nf4 need the package bitsandbytes. "
            "Install it: pip install bitsandbytes."
        )


def library() -> ModuleType:
    """Return bitsandbytes.

    Raises:
        SlimError: It is not installed.
    """
    require_library()
    return importlib.import_module(METHOD)

"""llama.cpp's own quantizer, called in the library that node-llama-cpp brings (docs/gguf.md)."""

from __future__ import annotations

import ctypes
from pathlib import Path

import numpy

BINARIES = "node_modules/@node-llama-cpp/linux-x64/bins/linux-x64"


class Importance(ctypes.Structure):
    """``llama_model_imatrix_data``: mean squared inputs of one tensor's columns."""

    _fields_ = (
        ("name", ctypes.c_char_p),
        ("data", ctypes.POINTER(ctypes.c_float)),
        ("size", ctypes.c_size_t),
    )


class Settings(ctypes.Structure):
    """``llama_model_quantize_params``."""

    _fields_ = (
        *((name, ctypes.c_int32) for name in ("threads", "file_type", "output", "embeddings")),
        *((name, ctypes.c_bool) for name in ("again", "head", "copy", "pure", "split", "dry")),
        *((name, ctypes.c_void_p) for name in ("importance", "entries", "types", "pruned")),
    )


def quantize(
    folder: Path,
    source: Path,
    target: Path,
    file_type: int,
    importance: dict[str, numpy.ndarray] | None = None,
) -> None:
    """Quantize a GGUF file.

    Args:
        folder: Where node-llama-cpp was installed.
        source: Plain weights.
        target: The new file.
        file_type: Number in ``general.file_type``.
        importance: Name in the file -> float32 [in]; None: no importance matrix.
    """
    binaries = folder / BINARIES
    for name in ("libggml-base", "libggml"):
        library = next(path for path in sorted(binaries.glob(f"{name}.*")) if ".so" in path.name)
        ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
    llama = ctypes.CDLL(str(next(binaries.glob("libllama.*"))))
    log_type = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
    log: list[str] = []
    collect = log_type(lambda level, text, data: log.append(text.decode(errors="replace")))
    llama.llama_log_set(collect, None)
    llama.llama_model_quantize_default_params.restype = Settings
    settings = llama.llama_model_quantize_default_params()
    settings.threads, settings.file_type, settings.again = 1, file_type, True
    # ctypes keeps nothing alive that only a pointer knows
    entries = _entries(importance or {})
    if importance:
        settings.importance = ctypes.cast(entries, ctypes.c_void_p)
    arguments = (str(source).encode(), str(target).encode(), ctypes.byref(settings))
    failed = llama.llama_model_quantize(*arguments)
    llama.llama_log_set(None, None)
    assert failed == 0, "".join(log[-5:])


def _entries(importance: dict[str, numpy.ndarray]) -> ctypes.Array:
    entries = (Importance * (len(importance) + 1))()
    for entry, (name, values) in zip(entries, importance.items(), strict=False):
        entry.name, entry.size = name.encode(), len(values)
        entry.data = (ctypes.c_float * len(values))(*values.tolist())
    return entries

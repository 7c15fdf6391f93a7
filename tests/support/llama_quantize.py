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


def _libraries(folder: Path) -> tuple[ctypes.CDLL, ctypes.CDLL]:
    """Return ggml's and llama.cpp's library, by the folder where node-llama-cpp was installed."""
    binaries = folder / BINARIES
    loaded = []
    for pattern in ("libggml-base.so*", "libggml.*so*", "libllama.*so*"):
        path = next(binaries.glob(pattern))
        loaded.append(ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL))
    return loaded[0], loaded[2]


def quantize_rows(
    folder: Path, weight: numpy.ndarray, type_number: int, size: int, importance: numpy.ndarray
) -> numpy.ndarray:
    """Quantize a matrix.

    Args:
        folder: Where node-llama-cpp was installed.
        weight: float32 [out, in].
        type_number: As in ``gguf.GGMLQuantizationType``.
        size: Bytes of a row in the type.
        importance: What an error in each column costs, float32 [in].

    Returns:
        uint8 [out, size].
    """
    ggml, _ = _libraries(folder)
    ggml.ggml_quantize_chunk.restype = ctypes.c_size_t
    rows, columns = weight.shape
    result = numpy.zeros((rows, size), dtype=numpy.uint8)
    weight, importance = numpy.ascontiguousarray(weight), numpy.ascontiguousarray(importance)
    written = ggml.ggml_quantize_chunk(
        ctypes.c_int(type_number),
        weight.ctypes.data_as(ctypes.c_void_p),
        result.ctypes.data_as(ctypes.c_void_p),
        ctypes.c_int64(0),
        ctypes.c_int64(rows),
        ctypes.c_int64(columns),
        importance.ctypes.data_as(ctypes.c_void_p),
    )
    assert written == result.size
    return result


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
    _, llama = _libraries(folder)
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

"""What the weights of a checkpoint take in its files, from ``config.json`` alone.

Needs no torch."""

from __future__ import annotations

from slim.models.spec import DTYPE_BYTES, ModelSpec
from slim.quantization.formats import read_config
from slim.quantization.scheme import Scheme


def weight_bytes(spec: ModelSpec, dtype: str | None = None) -> int:
    """Estimate the bytes of all weights.

    Args:
        spec: The model.
        dtype: Type of plain weights to count in, such as ``"float32"``; None counts what the files
            hold, packed layers as they are packed.

    Returns:
        Bytes, an adapter's included.

    Raises:
        SlimError: The model is quantized in a way that slim does not read.
    """
    plain = DTYPE_BYTES.get(dtype or spec.dtype, 4)
    if dtype is not None or spec.quantization is None:
        return spec.parameters() * plain
    packed, weights = packed_size(spec)
    # adapters are stored in float32, whatever the type of the weights they were trained on
    unpacked = spec.parameters() - spec.adapter_parameters - weights
    return unpacked * plain + packed + 4 * spec.adapter_parameters


def packed_schemes(spec: ModelSpec) -> dict[str, Scheme]:
    """Return the scheme of every linear layer and embedding that is stored packed.

    Args:
        spec: The model.

    Returns:
        Full layer name -> scheme. A head that shares the embedding is not in it.

    Raises:
        SlimError: The model is quantized in a way that slim does not read.
    """
    if spec.quantization is None:
        return {}
    stored = read_config(spec.quantization, spec.name)
    schemes = {name: stored.scheme(name) for name in spec.matrices()}
    return {name: scheme for name, scheme in schemes.items() if scheme is not None}


def packed_bits(spec: ModelSpec) -> float:
    """Return the stored bits per quantized weight: codes, scales, zero points, the groups' order.

    Args:
        spec: A quantized model.
    """
    packed, weights = packed_size(spec)
    return 8 * packed / max(1, weights)


def packed_size(spec: ModelSpec) -> tuple[int, int]:
    """Return the bytes of all packed layers, and the number of weights they stand for.

    Args:
        spec: A quantized model.
    """
    stored, size, weights = read_config(spec.quantization, spec.name), 0, 0
    for name, (rows, columns) in spec.matrices().items():
        if stored.scheme(name) is not None:
            size += stored.layer_bytes(name, rows, columns, spec.dtype)
            weights += rows * columns
    return size, weights

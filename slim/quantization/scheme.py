"""How a layer's weights are quantised - bits, group, symmetry - and how ``config.json`` says so. Needs no torch."""

from __future__ import annotations

from dataclasses import dataclass

from slim.architecture import ModelDescription
from slim.errors import SlimError

BITS = (2, 3, 4, 8)
GROUP_SIZES = (32, 64, 128, 256)
WHOLE_ROW = -1
QUANT_METHOD, FORMAT = "compressed-tensors", "pack-quantized"


@dataclass(frozen=True)
class Scheme:
    """Bits per code, weights per group along a row (-1: the whole row), and whether the grid is symmetric around 0."""

    bits: int
    group_size: int
    symmetric: bool

    @property
    def levels(self) -> int:
        return 2**self.bits

    @property
    def middle(self) -> int:
        """The code that stands for 0 on a symmetric grid."""
        return 2 ** (self.bits - 1)

    def group(self, in_features: int) -> int:
        """Return the number of weights in a group of a row of ``in_features``."""
        return in_features if self.group_size == WHOLE_ROW else self.group_size

    def groups(self, in_features: int) -> int:
        """Return the number of groups of a row."""
        return -(-in_features // self.group(in_features))


def check_model(model: ModelDescription, scheme: Scheme) -> None:
    """Raise ``SlimError`` if ``model`` is quantised already, unknown, or has a layer that groups do not divide."""
    if model.quantization is not None:
        method = model.quantization.get("quant_method", "an unknown method")
        raise SlimError(f"{model.name} is already quantised ({method}). Quantise the model it was made from.")
    every = [model.block_linears(block).items() for block in range(model.blocks)]  # blocks may differ in size
    widths = dict.fromkeys((name, columns) for layers in every for name, (_, columns) in layers)
    bad = [(name, columns) for name, columns in widths if columns % scheme.group(columns)]
    if bad:
        fits = [size for size in GROUP_SIZES if all(columns % size == 0 for _, columns in widths)]
        raise SlimError(
            f"quant.group_size={scheme.group_size} does not divide the {bad[0][1]} inputs of {bad[0][0]} "
            f"in {model.name}. Sizes that fit all layers: {', '.join(map(str, [*fits, WHOLE_ROW]))}."
        )


def to_config(scheme: Scheme, ignore: list[str]) -> dict:
    """Return the ``quantization_config`` for a checkpoint whose linear layers but ``ignore`` follow ``scheme``."""
    whole_row = scheme.group_size == WHOLE_ROW
    weights = {
        "num_bits": scheme.bits,
        "type": "int",
        "symmetric": scheme.symmetric,
        "strategy": "channel" if whole_row else "group",
        "group_size": None if whole_row else scheme.group_size,
        "dynamic": False,
        "actorder": None,
        "block_structure": None,
    }
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None, "output_activations": None}
    return {
        "quant_method": QUANT_METHOD,
        "format": FORMAT,
        "quantization_status": "compressed",
        "global_compression_ratio": None,
        "kv_cache_scheme": None,
        "config_groups": {"group_0": group},
        "ignore": ignore,
    }

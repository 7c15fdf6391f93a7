"""compressed-tensors ``pack-quantized``: what vLLM and transformers read. Layers may differ in
everything.

    weight_packed      int32 [out, ceil(in b / 32)]       codes, a dense stream along each row
    weight_scale       [out, groups]                      in the model's type
    weight_zero_point  int32 [ceil(out b / 32), groups]   asymmetric only; packed along the rows
    weight_shape       int64 [2]                          out, in
    weight_g_idx       int32 [in]                         groups in activation order only
                                                          (``actorder: group``)

That library keeps codes and zero points in the signed range and adds 2^(b-1) to both when packing:
what is packed is the same unsigned code and zero point as here."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from slim.core.errors import SlimError
from slim.core.lazy import LazyModule
from slim.models.spec import DTYPE_BYTES
from slim.quantization.formats.base import (
    EMBEDDINGS,
    Format,
    Packed,
    Stored,
    plain_index,
    read_group_index,
    read_scale,
    read_tensor,
    read_words,
    show,
)
from slim.quantization.kernels.packing import (
    MAX_BITS,
    pack,
    pack_columns,
    unpack_columns,
    words_per_row,
)
from slim.quantization.scheme import WHOLE_ROW, Scheme

if TYPE_CHECKING:
    import torch

    from slim.checkpoints.reader import TensorReader
    from slim.quantization.solvers.grid import Quantized
else:
    torch = LazyModule("torch")

LAYOUT = "pack-quantized"
ORDERED = ("group", "dynamic", True)  # values of actorder that come with a weight_g_idx


class CompressedTensors(Format):
    """The format as slim writes and reads it."""

    name = quant_method = "compressed-tensors"
    codes = "weight_packed"
    scales = "weight_scale"

    def config(
        self,
        schemes: Mapping[str, Scheme],
        linears: Iterable[str],
        ordered: bool = False,
        **extra: Any,
    ) -> dict:
        """Return one group for all linear layers where they are alike, else a group of names per
        scheme."""
        linears = list(linears)
        targets: dict[Scheme, list[str]] = {}
        for layer, scheme in schemes.items():
            targets.setdefault(scheme, []).append(layer)
        if len(targets) == 1:
            (scheme, layers) = next(iter(targets.items()))
            targets = {scheme: ["Linear", *(layer for layer in layers if layer not in linears)]}
        groups = {}
        for number, (scheme, layers) in enumerate(targets.items()):
            groups[f"group_{number}"] = group_config(scheme, layers, ordered)
        return {
            "quant_method": self.quant_method,
            "format": LAYOUT,
            "quantization_status": "compressed",
            "global_compression_ratio": None,
            "kv_cache_scheme": None,
            "config_groups": groups,
            "ignore": [layer for layer in linears if layer not in schemes],
        }

    def tensors(self, layer: Quantized) -> dict[str, torch.Tensor]:
        bits = layer.scheme.bits
        tensors = {
            "weight_packed": pack(layer.codes, bits),
            "weight_scale": layer.scale.contiguous(),
            "weight_shape": torch.tensor(layer.codes.shape, dtype=torch.int64),
        }
        if not layer.scheme.symmetric:
            tensors["weight_zero_point"] = pack_columns(layer.zero, bits)
        if layer.group_index is not None:
            tensors["weight_g_idx"] = plain_index(layer)
        return tensors

    def layer_bytes(
        self, rows: int, columns: int, scheme: Scheme, model_dtype: str, ordered: bool = False
    ) -> int:
        groups = scheme.groups(columns)
        zeros = 0 if scheme.symmetric else 4 * words_per_row(rows, scheme.bits) * groups
        scales = rows * groups * DTYPE_BYTES.get(model_dtype, 4)
        return (
            4 * rows * words_per_row(columns, scheme.bits) + scales + zeros + 4 * columns * ordered
        )

    def read_config(self, config: dict, name: str) -> Stored:
        if config.get("format") not in (LAYOUT, "mixed-precision"):
            raise SlimError(
                f"{name} is quantised as {self.quant_method} "
                f"({config.get('format', 'no format')}). "
                f"slim reads {self.quant_method} in the format {LAYOUT}."
            )
        if config.get("transform_config"):
            raise SlimError(
                f"{name} rotates activations while it runs (transform_config), "
                "which slim does not do."
            )
        groups = config.get("config_groups")
        if not isinstance(groups, dict) or not groups:
            raise SlimError(
                f"{name}: the quantization_config has no config_groups. "
                f"slim reads at least one of {LAYOUT}."
            )
        for key, group in groups.items():
            check_group(group if isinstance(group, dict) else {}, f"{name}, {key}")
        return Stored(self, config, name)

    def scheme_of(self, config: dict, layer: str) -> Scheme | None:
        group = group_of(config, layer)
        if group is None:
            return None
        return scheme_of_weights(group["weights"])

    def is_ordered(self, config: dict, layer: str) -> bool:
        group = group_of(config, layer)
        weights = group["weights"] if group else {}
        return weights.get("actorder") in ORDERED and strategy_of(weights) == "group"

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
        packed = read_words(reader, f"{name}.weight_packed", (rows, words_per_row(columns, bits)))
        scale = read_scale(reader, f"{name}.weight_scale", (rows, groups))
        if scheme.symmetric:
            zero = torch.full((rows, groups), scheme.middle, dtype=torch.uint8)
        else:
            words = read_words(
                reader, f"{name}.weight_zero_point", (words_per_row(rows, bits), groups)
            )
            zero = unpack_columns(words, bits, rows)
        index = None
        if stored.ordered(name):
            index = read_group_index(reader, f"{name}.weight_g_idx", columns, scheme)
        if f"{name}.weight_shape" in reader:
            check_shape(reader, f"{name}.weight_shape", (rows, columns))
        return Packed(packed, scale, zero, index)


def check_shape(reader: TensorReader, name: str, shape: tuple[int, int]) -> None:
    """Compare the layer's own note of its shape with the model.

    Args:
        reader: On the checkpoint.
        name: Full name of the note.
        shape: (out, in) by ``config.json``.

    Raises:
        SlimError: They differ.
    """
    noted = tuple(read_tensor(reader, name, (2,)).tolist())
    if noted != shape:
        raise SlimError(
            f"{name} in {reader.checkpoint.folder} says {show(noted)} where config.json asks for "
            f"{show(shape)}."
        )


def group_config(scheme: Scheme, targets: list[str], ordered: bool) -> dict:
    """Return an entry of ``config_groups``.

    Args:
        scheme: Of its layers.
        targets: Names of layers, or classes such as ``Linear``.
        ordered: Whether groups are in activation order.
    """
    weights = {
        "num_bits": scheme.bits,
        "type": "int",
        "symmetric": scheme.symmetric,
        "strategy": "channel",
        "group_size": None,
        "dynamic": False,
        "actorder": None,
        "block_structure": None,
    }
    if scheme.group_size != WHOLE_ROW:
        weights.update(strategy="group", group_size=scheme.group_size)
        if ordered:
            weights["actorder"] = "group"
    return {
        "targets": targets,
        "weights": weights,
        "input_activations": None,
        "output_activations": None,
    }


def check_group(group: dict, name: str) -> None:
    """Check that slim can run a group's weights.

    Args:
        group: An entry of ``config_groups``.
        name: Model and group, for the message.

    Raises:
        SlimError: It cannot.
    """
    weights = group.get("weights") or {}
    if group.get("format") not in (LAYOUT, None):
        raise SlimError(f"{name}: weights stored as {group['format']}. slim reads {LAYOUT}.")
    if weights.get("type", "int") != "int" or not 1 <= (weights.get("num_bits") or 0) <= MAX_BITS:
        raise SlimError(
            f"{name}: slim reads integer weights of 1 to {MAX_BITS} bits; this group has others."
        )
    if group.get("input_activations") or group.get("output_activations") or weights.get("dynamic"):
        raise SlimError(f"{name}: slim reads quantised weights with plain activations only.")
    if strategy_of(weights) not in ("group", "channel"):
        raise SlimError(
            f"{name}: slim reads scales per group or channel, not per {weights.get('strategy')}."
        )
    if strategy_of(weights) == "group" and (weights.get("group_size") or 0) < 1:
        raise SlimError(
            f"{name}: strategy=group with group_size={weights.get('group_size')}. "
            "slim reads 1 and above."
        )


def strategy_of(weights: dict) -> str:
    """Return the strategy of a group's weights, told by the group size where it is not named."""
    implied = {None: "tensor", -1: "channel"}.get(weights.get("group_size"), "group")
    return weights.get("strategy") or implied


def scheme_of_weights(weights: dict) -> Scheme:
    """Return the scheme that a checked group's ``weights`` describe."""
    group = weights["group_size"] if strategy_of(weights) == "group" else WHOLE_ROW
    return Scheme(weights["num_bits"], group, bool(weights.get("symmetric", True)))


def group_of(config: dict, layer: str) -> dict | None:
    """Return the entry of ``config_groups`` that holds for a layer; None: it is plain.

    As the library itself decides: a name goes before a pattern, a pattern before a class, whatever
    the order of the groups; of groups with the same target the last holds.

    Args:
        config: The ``quantization_config``.
        layer: The layer's full name.
    """
    kind = "Embedding" if layer in EMBEDDINGS else "Linear"
    if matching(layer, kind, config.get("ignore") or []):
        return None
    groups: dict[str, dict] = {}
    for group in config["config_groups"].values():
        groups.update(dict.fromkeys(group.get("targets") or [], group))
    target = matching(layer, kind, groups)
    if target is None:
        return None
    return groups[target]


def matching(layer: str, kind: str, targets: Collection[str]) -> str | None:
    """Return the target that holds for a layer; None: there is none.

    Args:
        layer: The layer's full name.
        kind: Its class, ``"Linear"`` or ``"Embedding"``.
        targets: Names, patterns after ``re:``, and classes.
    """
    if layer in targets:
        return layer
    for target in sorted(targets):
        if target.startswith("re:") and re.match(target[3:], layer):
            return target
    if kind in targets:
        return kind
    return None

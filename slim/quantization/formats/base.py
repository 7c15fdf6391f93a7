"""What all formats share: the interface, what is read from a file, and the checks of what a file
holds."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from slim.core.errors import SlimError
from slim.core.lazy import LazyModule
from slim.models.spec import FAMILIES
from slim.quantization.kernels.packing import MAX_BITS, unpack
from slim.quantization.scheme import WHOLE_ROW, Scheme

if TYPE_CHECKING:
    import torch

    from slim.checkpoints.reader import TensorReader
    from slim.quantization.solvers.grid import Quantized
else:
    torch = LazyModule("torch")

EMBEDDINGS = frozenset(family.embeddings for family in FAMILIES.values())
HEADS = frozenset(family.head for family in FAMILIES.values())

Sizes = Mapping[str, tuple[int, int]]  # layer -> (outputs, inputs)


@dataclass(frozen=True)
class Stored:
    """How an existing checkpoint is quantised: its format and its checked ``quantization_config``.

    name: how to call the model in messages.
    """

    format: Format
    config: dict
    name: str = "the model"

    def scheme(self, layer: str) -> Scheme | None:
        """Return the scheme of a linear layer or embedding by its full name; None: it is plain."""
        return self.format.scheme_of(self.config, layer)

    def ordered(self, layer: str) -> bool:
        """Whether the columns of a quantised layer were grouped in activation order."""
        return self.format.is_ordered(self.config, layer)

    def dense_weight(
        self, reader: TensorReader, layer: str, rows: int, columns: int
    ) -> torch.Tensor:
        """Return the numbers that a packed layer of a file stands for.

        Args:
            reader: On the checkpoint.
            layer: The layer's full name.
            rows: Its outputs.
            columns: Its inputs.

        Returns:
            float32 [out, in].
        """
        scheme = self.scheme(layer)
        packed = self.format.read(reader, layer, columns, rows, scheme, self)
        codes = unpack(packed.packed, scheme.bits, columns).float()
        group = packed.group_index
        if group is None:  # columns are in their order
            group = torch.arange(columns) // scheme.group(columns)
        return (codes - packed.zero.float()[:, group]) * packed.scale.float()[:, group]

    def layer_bytes(self, layer: str, rows: int, columns: int, model_dtype: str) -> int:
        """Return the bytes that a quantized layer [rows, columns] takes in the file."""
        return self.format.bytes_of(self.config, layer, rows, columns, model_dtype)


@dataclass
class Packed:
    """A layer as it runs, whatever the file's layout.

    packed: int32 [out, ceil(in b / 32)], the dense stream along the rows. scale: [out, groups] as
        stored.
    zero: uint8 [out, groups]. group_index: int64 [in], the group of every column; None: column //
    group."""

    packed: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor
    group_index: torch.Tensor | None = None


class Format:
    """A way to store packed weights.

    name: as in ``quant.format``. quant_method: as in ``quantization_config``. codes: end of the
        name of the tensor that holds a layer's codes; the file has the layer packed where it is
        there.
    """

    name: str
    quant_method: str
    codes: str
    # whether DoRA, which needs the norms of whole weights, can be trained on top of packed layers
    trains_dora: bool = False

    def describes(self, config: Mapping[str, Any]) -> bool:
        """Whether a ``quantization_config`` is one of this format's."""
        return config.get("quant_method") == self.quant_method

    def require_library(self) -> None:
        """Raise ``SlimError`` where a package that the format needs is not installed."""

    def import_library(self) -> None:
        """Import the package that runs the format's layers, where it is not slim itself."""

    def scale_dtype(self, model_dtype: str) -> str:
        """Return the type scales are stored in, such as ``"float16"``, for a model of
        ``model_dtype``."""
        return model_dtype

    def check(
        self, schemes: Mapping[str, Scheme], ordered: bool, sizes: Sizes | None = None
    ) -> None:
        """Raise ``SlimError`` for what the format cannot hold.

        ordered: whether groups are in activation order. sizes: those of the layers, where they are
        to be checked too."""

    def config(
        self,
        schemes: Mapping[str, Scheme],
        linears: Iterable[str],
        ordered: bool = False,
        **extra: Any,
    ) -> dict:
        """Return the ``quantization_config``.

        linears: names of all linear layers of the model, the head included; those without a scheme
            are listed as plain.
        extra: settings of the method that the format has a place for, such as ``damp_percent``;
        others are left out."""
        raise NotImplementedError

    def tensors(self, layer: Quantized) -> dict[str, torch.Tensor]:
        """Return a quantised layer as it is stored: end of the tensor's name -> tensor."""
        raise NotImplementedError

    def layer_bytes(
        self, rows: int, columns: int, scheme: Scheme, model_dtype: str, ordered: bool = False
    ) -> int:
        """Return the bytes a layer [rows, columns] takes in the file."""
        raise NotImplementedError

    def read_config(self, config: dict, name: str) -> Stored:
        """Check a ``quantization_config`` of this ``quant_method``. Raises ``SlimError`` for what
        cannot be read."""
        raise NotImplementedError

    def scheme_of(self, config: dict, layer: str) -> Scheme | None:
        """Return the scheme of a layer according to a checked config; None: it is plain."""
        raise NotImplementedError

    def bytes_of(self, config: dict, layer: str, rows: int, columns: int, model_dtype: str) -> int:
        """Return the bytes that layer [rows, columns] takes in the file, according to a checked
        config."""
        scheme, ordered = self.scheme_of(config, layer), self.is_ordered(config, layer)
        return self.layer_bytes(rows, columns, scheme, model_dtype, ordered)

    def is_ordered(self, config: dict, layer: str) -> bool:
        """Whether a layer's groups are in activation order, according to a checked config."""
        return False

    def read(
        self,
        reader: TensorReader,
        name: str,
        columns: int,
        rows: int,
        scheme: Scheme,
        stored: Stored,
    ) -> Packed:
        """Read layer ``name`` [rows, columns]. Raises ``SlimError`` for tensors that are missing or
        do not fit."""
        raise NotImplementedError


def refuse_embeddings(format_name: str, schemes: Mapping[str, Scheme]) -> None:
    """Raise ``SlimError`` if there is an embedding among the layers: the formats of linear layers
    have no place for it."""
    for layer in EMBEDDINGS & schemes.keys():
        raise SlimError(
            f"quant.format={format_name} holds linear layers only, so {layer} cannot be quantised. "
            "Leave the embedding plain or take quant.format=compressed-tensors."
        )


def require_integer(config: dict, key: str, name: str) -> int:
    """Return a whole number of a ``quantization_config``. Raises ``SlimError`` if it is missing or
    something else."""
    value = config.get(key)
    if not isinstance(value, int) or isinstance(value, bool):
        found = f"{key}={value}" if key in config else f"no {key}"
        raise SlimError(
            f"{name}: the quantization_config has {found}. slim reads a whole number there."
        )
    return value


def require_scheme(bits: int, group_size: int, symmetric: bool, name: str) -> Scheme:
    """Return a scheme read from a ``quantization_config``. Raises ``SlimError`` for bits or groups
    that cannot be."""
    if not 1 <= bits <= MAX_BITS:
        raise SlimError(
            f"{name}: the quantization_config says {bits} bits. slim reads 1 to {MAX_BITS}."
        )
    if group_size < 1 and group_size != WHOLE_ROW:
        raise SlimError(
            f"{name}: the quantization_config says group_size={group_size}. slim reads -1 or 1 and above."
        )
    return Scheme(bits, group_size, symmetric)


def read_tensor(reader: TensorReader, name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """Read a tensor. Raises ``SlimError`` if it is missing or has another shape."""
    tensor = reader.read(name)
    if tuple(tensor.shape) != tuple(shape):
        raise SlimError(
            f"{name} in {reader.checkpoint.folder} is {show(tensor.shape)}, but the config asks for {show(shape)}. "
            "The quantization_config does not belong to these weights."
        )
    return tensor


def read_scale(reader: TensorReader, name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """Read scales. Raises ``SlimError`` also for NaN and infinity."""
    scale = read_tensor(reader, name, shape)
    if not torch.isfinite(scale).all():
        raise SlimError(
            f"{name} in {reader.checkpoint.folder} contains NaN or infinity: the file is damaged."
        )
    return scale


def read_words(reader: TensorReader, name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """Read packed codes. Raises ``SlimError`` also where they are not int32."""
    words = read_tensor(reader, name, shape)
    if words.dtype != torch.int32:
        raise SlimError(
            f"{name} in {reader.checkpoint.folder} is {words.dtype}; packed codes are torch.int32."
        )
    return words


def read_group_index(
    reader: TensorReader, name: str, columns: int, scheme: Scheme
) -> torch.Tensor | None:
    """Read the group of every column, int64 [columns]; None where it is column // group.

    Raises ``SlimError`` for groups that do not exist.
    """
    index = read_tensor(reader, name, (columns,)).to(torch.int64)
    groups = scheme.groups(columns)
    if columns and not 0 <= int(index.min()) <= int(index.max()) < groups:
        raise SlimError(
            f"{name} in {reader.checkpoint.folder} names the groups {int(index.min())} to {int(index.max())}; "
            f"the layer has groups 0 to {groups - 1}."
        )
    plain = torch.arange(columns) // scheme.group(columns)
    return None if torch.equal(index, plain) else index


def plain_index(layer: Quantized) -> torch.Tensor:
    """Return the group of every column of a quantised layer, int32 [in]."""
    if layer.group_index is not None:
        return layer.group_index.to(torch.int32)
    columns = layer.codes.shape[1]
    return (torch.arange(columns, device=layer.codes.device) // layer.scheme.group(columns)).to(
        torch.int32
    )


def show(shape: Iterable[int]) -> str:
    """Return a shape as people write it: ``64 x 128``."""
    return " x ".join(map(str, shape)) or "a single number"

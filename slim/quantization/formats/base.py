"""What all formats share: the interface, what is read from a file, and the checks of what a file
holds."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from slim.core.errors import SlimError
from slim.core.lazy import LazyModule
from slim.models.encoders import ENCODERS
from slim.models.families import FAMILIES
from slim.quantization.kernels.packing import MAX_BITS, unpack
from slim.quantization.scheme import WHOLE_ROW, Scheme

if TYPE_CHECKING:
    from pathlib import Path

    import torch

    from slim.checkpoints.checkpoint import Checkpoint
    from slim.checkpoints.reader import TensorReader
    from slim.models.spec import ModelSpec
    from slim.quantization.solvers.grid import Quantized
else:
    torch = LazyModule("torch")

EMBEDDINGS = frozenset(
    [family.embeddings for family in (*FAMILIES.values(), *ENCODERS.values())]
    + [f"{family.base}.{family.embeddings}" for family in ENCODERS.values()]
)
HEADS = frozenset(family.head for family in FAMILIES.values())

Sizes = Mapping[str, tuple[int, int]]  # layer -> (outputs, inputs)


@dataclass(frozen=True)
class Stored:
    """How an existing checkpoint is quantised: its format and its checked ``quantization_config``.

    Attributes:
        format: Its format.
        config: The checked ``quantization_config``.
        name: How to call the model in messages.
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
        return self.format.dense_weight(reader, layer, rows, columns, self)

    def layer_bytes(self, layer: str, rows: int, columns: int, model_dtype: str) -> int:
        """Return the bytes that a quantized layer takes in the file.

        Args:
            layer: Its full name.
            rows: Its outputs.
            columns: Its inputs.
            model_dtype: Type of the model's plain weights.
        """
        return self.format.bytes_of(self.config, layer, rows, columns, model_dtype)


@dataclass
class Packed:
    """A layer as it runs, whatever the file's layout.

    Attributes:
        packed: int32 [out, ceil(in b / 32)], the dense stream along the rows.
        scale: [out, groups], as stored.
        zero: uint8 [out, groups].
        group_index: int64 [in], the group of every column; None: column // group.
    """

    packed: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor
    group_index: torch.Tensor | None = None


class Format:
    """A way to store packed weights.

    Attributes:
        name: As in ``quant.format``.
        quant_method: As in ``quantization_config``.
        codes: End of the name of the tensor that holds a layer's codes; the file has the layer
            packed where it is there.
        scales: End of the name of the tensor that holds a layer's scales; None where they have no
            tensor of their own.
        scales_by_input: Whether that is [groups, out] instead of [out, groups].
        trains_dora: Whether DoRA, which needs the norms of whole weights, can be trained on top of
            packed layers.
    """

    name: str
    quant_method: str
    codes: str
    scales: str | None = None
    scales_by_input: bool = False
    trains_dora: bool = False

    def describes(self, config: Mapping[str, Any]) -> bool:
        """Whether a ``quantization_config`` is one of this format's.

        Args:
            config: The ``quantization_config``.
        """
        return config.get("quant_method") == self.quant_method

    def require_library(self) -> None:
        """Raise ``SlimError`` where a package that the format needs is not installed."""

    def import_library(self) -> None:
        """Import the package that runs the format's layers, where it is not slim itself."""

    def scale_dtype(self, model_dtype: str) -> str:
        """Return the type scales are stored in, such as ``"float16"``.

        Args:
            model_dtype: Type of the model's plain weights.
        """
        return model_dtype

    def check(
        self, schemes: Mapping[str, Scheme], ordered: bool, sizes: Sizes | None = None
    ) -> None:
        """Check that the format can hold what is asked for.

        Args:
            schemes: Full layer name -> scheme.
            ordered: Whether groups are in activation order.
            sizes: Full layer name -> (outputs, inputs), where they are to be checked too.

        Raises:
            SlimError: It cannot; the message says what to type instead.
        """

    def check_model(self, spec: ModelSpec) -> None:
        """Raise ``SlimError`` for a model that the format cannot hold, whatever the schemes."""

    def begin(self, source: Checkpoint) -> None:
        """Raise ``SlimError`` for a checkpoint whose files the format cannot hold, before any work.

        Args:
            source: The checkpoint that is going to be quantized.
        """

    def finish(self, folder: Path) -> list[str]:
        """Add the files that the format has besides weights and config, once these are complete.

        Args:
            folder: The quantized checkpoint.

        Returns:
            What the user should know, in sentences.
        """
        return []

    def config(
        self,
        schemes: Mapping[str, Scheme],
        linears: Iterable[str],
        ordered: bool = False,
        **extra: Any,
    ) -> dict:
        """Return the ``quantization_config``.

        Args:
            schemes: Full layer name -> scheme.
            linears: Names of all linear layers of the model, the head included; those without a
                scheme are listed as plain.
            ordered: Whether groups are in activation order.
            **extra: Settings of the method that the format has a place for, such as
                ``damp_percent``; others are left out.
        """
        raise NotImplementedError

    def tensors(self, layer: Quantized) -> dict[str, torch.Tensor]:
        """Return a quantized layer as it is stored.

        Args:
            layer: Codes uint8 [out, in], scales and zero points [out, groups].

        Returns:
            End of the tensor's name -> tensor.
        """
        raise NotImplementedError

    def layer_bytes(
        self, rows: int, columns: int, scheme: Scheme, model_dtype: str, ordered: bool = False
    ) -> int:
        """Return the bytes a layer takes in the file.

        Args:
            rows: Its outputs.
            columns: Its inputs.
            scheme: Its scheme.
            model_dtype: Type of the model's plain weights.
            ordered: Whether its groups are in activation order.
        """
        raise NotImplementedError

    def read_config(self, config: dict, name: str) -> Stored:
        """Check a ``quantization_config`` of this format's.

        Args:
            config: The ``quantization_config``.
            name: How to call the model in messages.

        Raises:
            SlimError: slim cannot read it.
        """
        raise NotImplementedError

    def scheme_of(self, config: dict, layer: str) -> Scheme | None:
        """Return the scheme of a layer according to a checked config; None: it is plain.

        Args:
            config: The ``quantization_config``.
            layer: The layer's full name.
        """
        raise NotImplementedError

    def bytes_of(self, config: dict, layer: str, rows: int, columns: int, model_dtype: str) -> int:
        """Return the bytes that a layer takes in the file, according to a checked config.

        Args:
            config: The ``quantization_config``.
            layer: The layer's full name.
            rows: Its outputs.
            columns: Its inputs.
            model_dtype: Type of the model's plain weights.
        """
        scheme = self.scheme_of(config, layer)
        ordered = self.is_ordered(config, layer)
        return self.layer_bytes(rows, columns, scheme, model_dtype, ordered)

    def is_ordered(self, config: dict, layer: str) -> bool:
        """Whether a layer's groups are in activation order, according to a checked config.

        Args:
            config: The ``quantization_config``.
            layer: The layer's full name.
        """
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
        """Read a packed layer.

        Args:
            reader: On the checkpoint.
            name: The layer's full name.
            columns: Its inputs.
            rows: Its outputs.
            scheme: Its scheme.
            stored: How the checkpoint is quantized.

        Raises:
            SlimError: Tensors are missing or do not fit.
        """
        raise NotImplementedError

    def dense_weight(
        self, reader: TensorReader, layer: str, rows: int, columns: int, stored: Stored
    ) -> torch.Tensor:
        """Return the numbers that a packed layer [rows, columns] stands for, float32; arguments as
        in :meth:`Stored.dense_weight`.
        """
        scheme = stored.scheme(layer)
        packed = self.read(reader, layer, columns, rows, scheme, stored)
        codes = unpack(packed.packed, scheme.bits, columns).float()
        group = packed.group_index
        if group is None:  # columns are in their order
            group = torch.arange(columns) // scheme.group(columns)
        return (codes - packed.zero.float()[:, group]) * packed.scale.float()[:, group]


def refuse_embeddings(format_name: str, schemes: Mapping[str, Scheme]) -> None:
    """Refuse embeddings, which formats of linear layers have no place for.

    Args:
        format_name: Value of ``quant.format``.
        schemes: Full layer name -> scheme.

    Raises:
        SlimError: There is an embedding among the layers.
    """
    for layer in EMBEDDINGS & schemes.keys():
        raise SlimError(
            f"quant.format={format_name} holds linear layers only, so {layer} cannot be quantized. "
            "Leave the embedding plain or use quant.format=compressed-tensors."
        )


def require_integer(config: dict, key: str, name: str) -> int:
    """Return a whole number of a ``quantization_config``.

    Args:
        config: The ``quantization_config``.
        key: Name of the entry.
        name: How to call the model in messages.

    Raises:
        SlimError: It is missing or something else.
    """
    value = config.get(key)
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    entry = f"no {key}"
    if key in config:
        entry = f"{key}={value}"
    raise SlimError(
        f"{name}: the quantization_config has {entry}. slim reads a whole number there."
    )


def require_scheme(bits: int, group_size: int, symmetric: bool, name: str) -> Scheme:
    """Return a scheme read from a ``quantization_config``.

    Args:
        bits: Per code.
        group_size: Weights that share a scale; -1: a whole row.
        symmetric: Whether there are no zero points.
        name: How to call the model in messages.

    Raises:
        SlimError: There are no such bits or groups.
    """
    if not 1 <= bits <= MAX_BITS:
        raise SlimError(
            f"{name}: the quantization_config says {bits} bits. slim reads 1 to {MAX_BITS}."
        )
    if group_size < 1 and group_size != WHOLE_ROW:
        raise SlimError(
            f"{name}: the quantization_config says group_size={group_size}. slim reads -1 or 1 and "
            "above."
        )
    return Scheme(bits, group_size, symmetric)


def read_tensor(reader: TensorReader, name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """Read a tensor.

    Args:
        reader: On the checkpoint.
        name: The tensor's full name.
        shape: What it must have.

    Raises:
        SlimError: It is missing or has another shape.
    """
    tensor = reader.read(name)
    if tuple(tensor.shape) != tuple(shape):
        raise SlimError(
            f"{name} in {reader.checkpoint.folder} is {show(tensor.shape)}, "
            f"but the config asks for {show(shape)}. "
            "The quantization_config does not belong to these weights."
        )
    return tensor


def read_scale(reader: TensorReader, name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """Read scales.

    Args:
        reader: On the checkpoint.
        name: The tensor's full name.
        shape: What it must have.

    Raises:
        SlimError: As :func:`read_tensor`, and for NaN and infinity.
    """
    scale = read_tensor(reader, name, shape)
    if not torch.isfinite(scale).all():
        raise SlimError(
            f"{name} in {reader.checkpoint.folder} contains NaN or infinity: the file is damaged."
        )
    return scale


def read_words(reader: TensorReader, name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """Read packed codes.

    Args:
        reader: On the checkpoint.
        name: The tensor's full name.
        shape: What it must have.

    Raises:
        SlimError: As :func:`read_tensor`, and where they are not int32.
    """
    words = read_tensor(reader, name, shape)
    if words.dtype != torch.int32:
        raise SlimError(
            f"{name} in {reader.checkpoint.folder} is {words.dtype}; packed codes are torch.int32."
        )
    return words


def read_group_index(
    reader: TensorReader, name: str, columns: int, scheme: Scheme
) -> torch.Tensor | None:
    """Read the group of every column.

    Args:
        reader: On the checkpoint.
        name: The tensor's full name.
        columns: The layer's inputs.
        scheme: Its scheme.

    Returns:
        int64 [columns]; None where it is column // group.

    Raises:
        SlimError: Groups do not exist.
    """
    index = read_tensor(reader, name, (columns,)).to(torch.int64)
    groups = scheme.groups(columns)
    if columns and not 0 <= int(index.min()) <= int(index.max()) < groups:
        raise SlimError(
            f"{name} in {reader.checkpoint.folder} names the groups {int(index.min())} to "
            f"{int(index.max())}; the layer has groups 0 to {groups - 1}."
        )
    if torch.equal(index, torch.arange(columns) // scheme.group(columns)):
        return None
    return index


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

"""AWQ's ``gemm`` layout, as AutoAWQ, GPTQModel and vLLM read it: 4 bits, one scheme for all layers.

    qweight  int32 [in, out / 8]             codes of 8 outputs in a word
    qzeros   int32 [ceil(in / g), out / 8]   zero points, likewise
    scales   float16 [ceil(in / g), out]

Inside a word, 4-bit field i, the lowest first, is column 8 c + (0, 2, 4, 6, 1, 3, 5, 7)[i]. Zero
points are there whether the grid is symmetric or not, and ``zero_point`` is written as true:
kernels read them from the file either way."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from slim.core.errors import SlimError
from slim.core.lazy import LazyModule
from slim.quantization.formats.base import (
    EMBEDDINGS,
    HEADS,
    Format,
    Packed,
    Sizes,
    Stored,
    read_scale,
    read_words,
    refuse_embeddings,
    require_integer,
    require_scheme,
)
from slim.quantization.formats.gptq import any_of, overridden
from slim.quantization.kernels.packing import pack, unpack
from slim.quantization.scheme import Scheme

if TYPE_CHECKING:
    import torch

    from slim.checkpoints.reader import TensorReader
    from slim.quantization.solvers.grid import Quantized
else:
    torch = LazyModule("torch")

BITS = 4
FIELDS = 8  # codes in a word
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
OTHERWISE = "use quant.format=compressed-tensors or gptq"


class AwqGemm(Format):
    """The format as slim writes and reads it."""

    name = quant_method = "awq"
    codes = "qweight"
    scales = "scales"
    scales_by_input = True

    def scale_dtype(self, model_dtype: str) -> str:
        return "float16"

    def check(
        self, schemes: Mapping[str, Scheme], ordered: bool, sizes: Sizes | None = None
    ) -> None:
        refuse_embeddings(self.name, schemes)
        different = sorted({scheme.bits for scheme in schemes.values()} - {BITS})
        if different:
            raise SlimError(
                f"quant.format=awq holds 4 bits only, not {different[0]}. Set quant.bits=4 or "
                f"{OTHERWISE}."
            )
        if len(set(schemes.values())) > 1:
            raise SlimError(
                "quant.format=awq holds one scheme for all layers. Quantize them alike or "
                f"{OTHERWISE}."
            )
        if ordered:
            raise SlimError(
                "quant.format=awq has no place for groups in activation order. Switch that off or "
                f"{OTHERWISE}."
            )
        for layer in HEADS & schemes.keys():
            raise SlimError(
                f"quant.format=awq leaves the head plain: set quant.lm_head=false, or {OTHERWISE} "
                f"for {layer}."
            )
        for layer in schemes:
            if sizes and sizes[layer][0] % FIELDS:
                raise SlimError(
                    f"quant.format=awq: the {sizes[layer][0]} outputs of {layer} "
                    f"are no multiple of 8; {OTHERWISE}."
                )

    def config(
        self,
        schemes: Mapping[str, Scheme],
        linears: Iterable[str],
        ordered: bool = False,
        **extra: Any,
    ) -> dict:
        plain = [layer for layer in linears if layer not in schemes]
        inside = [layer for layer in plain if layer not in HEADS]
        config = {
            "quant_method": self.quant_method,
            "version": "gemm",
            "bits": BITS,
            "group_size": next(iter(schemes.values())).group_size,
            "zero_point": True,
            "modules_to_not_convert": plain,
        }
        if inside:  # GPTQModel looks here
            config["dynamic"] = {f"-:{any_of(inside)}": {}}
        return config

    def tensors(self, layer: Quantized) -> dict[str, torch.Tensor]:
        return {
            "qweight": pack_interleaved(layer.codes.T),
            "qzeros": pack_interleaved(layer.zero.T),
            "scales": layer.scale.T.to(torch.float16).contiguous(),
        }

    def layer_bytes(
        self, rows: int, columns: int, scheme: Scheme, model_dtype: str, ordered: bool = False
    ) -> int:
        return (columns + scheme.groups(columns)) * rows // 2 + 2 * scheme.groups(columns) * rows

    def read_config(self, config: dict, name: str) -> Stored:
        version = str(
            config.get("version")
            or config.get("checkpoint_format")
            or config.get("format")
            or "gemm"
        ).lower()
        if version != "gemm":
            raise SlimError(
                f"{name} is quantised as awq in the version {version}. slim reads the version gemm."
            )
        # as AutoAWQ's own file says
        settings = dict(config)
        for key, old in (("bits", "w_bit"), ("group_size", "q_group_size")):
            if config.get(old) is not None:
                settings.setdefault(key, config[old])
        bits = require_integer(settings, "bits", name)
        group = require_integer(settings, "group_size", name)
        if bits != BITS:
            raise SlimError(
                f"{name}: the quantization_config says awq with {bits} bits. slim reads awq with 4."
            )
        require_scheme(bits, group, False, name)
        return Stored(self, settings, name)

    def scheme_of(self, config: dict, layer: str) -> Scheme | None:
        if layer in EMBEDDINGS | HEADS:
            return None
        if any(part in layer for part in config.get("modules_to_not_convert") or []):
            return None
        settings = overridden(config, layer)
        if settings is None:
            return None
        return Scheme(BITS, settings["group_size"], not config.get("zero_point", True))

    def read(
        self,
        reader: TensorReader,
        name: str,
        columns: int,
        rows: int,
        scheme: Scheme,
        stored: Stored,
    ) -> Packed:
        groups = scheme.groups(columns)
        words = read_words(reader, f"{name}.qweight", (columns, rows // FIELDS))
        scale = read_scale(reader, f"{name}.scales", (groups, rows))
        zero = torch.full((rows, groups), scheme.middle, dtype=torch.uint8)
        if not scheme.symmetric or f"{name}.qzeros" in reader:
            zero = unpack_interleaved(
                read_words(reader, f"{name}.qzeros", (groups, rows // FIELDS))
            ).T.contiguous()
        return Packed(pack(unpack_interleaved(words).T, BITS), scale.T.contiguous(), zero)


def pack_interleaved(codes: torch.Tensor) -> torch.Tensor:
    """Pack codes in AWQ's order within each word.

    Args:
        codes: uint8 [n, m], m a multiple of 8.

    Returns:
        int32 [n, m / 8].
    """
    return pack(codes.unflatten(-1, (-1, FIELDS))[..., list(ORDER)].flatten(-2), BITS)


def unpack_interleaved(words: torch.Tensor) -> torch.Tensor:
    """Undo :func:`pack_interleaved`.

    Args:
        words: int32 [n, m / 8].

    Returns:
        uint8 [n, m].
    """
    fields = unpack(words, BITS, FIELDS * words.shape[-1]).unflatten(-1, (-1, FIELDS))
    places = sorted(range(FIELDS), key=ORDER.__getitem__)
    return fields[..., places].flatten(-2)

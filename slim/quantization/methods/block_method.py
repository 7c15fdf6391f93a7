"""What all quantisation methods share on the walk: schemes by layer, packed results, errors, and
what is written."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from slim.calibration.errors import exchange_weight
from slim.calibration.sequential import BlockMethod, LinearGroup
from slim.core.lazy import LazyModule
from slim.quantization.formats import Format, get_format
from slim.quantization.scheme import Scheme
from slim.quantization.solvers.error_feedback import by_rows
from slim.quantization.solvers.grid import Quantized, search, shrink_factors

if TYPE_CHECKING:
    import torch
    from torch import nn

    from slim.models.spec import Family
else:
    torch = LazyModule("torch")

HEAD_FACTORS = shrink_factors(10)


class QuantizationMethod(BlockMethod):
    """Base of the methods: subclasses turn a segment's weights into :class:`Quantized` ones.

    schemes: full layer name -> scheme; layers that are not in it stay as they are.
    dtype: type of the model, such as ``"bfloat16"``: what is not quantised is stored in it. form:
    the format written."""

    resumable = True

    def __init__(self, schemes: Mapping[str, Scheme], dtype: str, form: Format | None = None):
        self.form = form or get_format("compressed-tensors")
        self.schemes, self.dtype = schemes, getattr(torch, dtype)
        self.scale_dtype = getattr(torch, self.form.scale_dtype(dtype))
        self.done: dict[str, Quantized] = {}  # of the block at hand, by name within it
        self.plain: dict[str, torch.Tensor] = {}  # its other tensors that folding has changed
        # what the channels of its layers are multiplied by, where they are
        self.scaled: dict[str, torch.Tensor] = {}
        # scales of its layers before 1/s was folded into them
        self.unfolded: dict[str, torch.Tensor] = {}
        # what the user should know, such as layers that had to fall back
        self.notes: list[str] = []

    def state(self) -> dict:
        return {"notes": self.notes}

    def resume(self, state: dict) -> None:
        self.notes = state["notes"]

    def scheme(self, view: LinearGroup, name: str) -> Scheme | None:
        """Return the scheme of a layer of ``view`` by its name within the block."""
        return self.schemes.get(f"{view.prefix}.{name}")

    def weights(self, view: LinearGroup) -> dict[str, torch.Tensor]:
        """Return the weights of the segment that are to be quantised, by name within the block."""
        return {
            name: linear.weight for name, linear in view.linears.items() if self.scheme(view, name)
        }

    def quantize(self, view: LinearGroup) -> dict[str, torch.Tensor]:
        """Fill ``self.done`` for the layers of ``view``; return the weights they stand for, on the
        unscaled input."""
        raise NotImplementedError

    def process(self, view: LinearGroup) -> dict[str, float]:
        weights = self.quantize(view)
        return {
            name: exchange_weight(view.linears[name], weights.pop(name), view.hessian)
            for name in list(weights)
        }

    def block_tensors(self, block: int, module: nn.Module) -> dict[str, torch.Tensor]:
        tensors = {}
        for layer, packed in self.done.items():
            tensors.update(self._stored(layer, packed))
        for name, tensor in module.state_dict().items():
            if name.removesuffix(".weight") not in self.done:
                tensors[name] = self.plain.get(name, tensor)
        self.done, self.plain, self.scaled, self.unfolded = {}, {}, {}, {}
        return tensors

    def has_finished_weight(self, name: str) -> bool:
        return name in self.done

    def finished_weight(self, name: str) -> torch.Tensor | None:
        layer = self.done.get(name)
        if layer is None:
            return None
        dense = replace(layer, scale=self.unfolded.get(name, layer.scale)).dequantize()
        return dense / self.scaled[name] if name in self.scaled else dense

    def other_tensors(
        self, name: str, tensor: torch.Tensor, family: Family, tied: bool
    ) -> dict[str, torch.Tensor]:
        """Pack the head and the embedding where they have a scheme. Tied ones are packed once, as
        the embedding."""
        layer = name.removesuffix(".weight")
        tensors = self._rounded(layer, tensor) if layer in self.schemes else {name: tensor}
        if (
            layer == family.embeddings
            and tied
            and layer not in self.schemes
            and family.head in self.schemes
        ):
            tensors.update(self._rounded(family.head, tensor))
        return tensors

    def _rounded(self, layer: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
        scheme = self.schemes[layer]
        packed = by_rows(
            tensor,
            lambda rows: search(rows.float(), scheme, self.scale_dtype, factors=HEAD_FACTORS),
        )
        return self._stored(layer, packed)

    def _stored(self, layer: str, packed: Quantized) -> dict[str, torch.Tensor]:
        return {f"{layer}.{key}": value for key, value in self.form.tensors(packed).items()}

"""Rounding to GGUF's blocks under the Hessian, one linear group of the sequential calibration after
another.

As GPTQ does on plain grids: columns with large inputs first, every error passed on to the columns
that are still to come, then coordinate descent over codes and grids
(``slim/quantization/solvers/super_block_feedback.py``).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from slim.calibration.block_method import LinearGroup
from slim.core.lazy import LazyModule
from slim.gguf.blocks import BLOCK_TYPES, require_range, round_to_blocks, unpack_blocks
from slim.gguf.format import GgufFormat
from slim.gguf.packing import pack
from slim.models.families import Family
from slim.models.spec import ModelSpec
from slim.quantization.methods.block_method import QuantizationMethod
from slim.quantization.solvers.error_feedback import (
    CholeskyFactor,
    activation_order,
    by_rows,
    noted_factor,
)
from slim.quantization.solvers.super_block_feedback import descend, feed_errors
from slim.quantization.solvers.super_blocks import BlockKind, BlockQuantized, joined, nearest
from slim.quantization.written import ROWS

if TYPE_CHECKING:
    import torch
else:
    torch = LazyModule("torch")

NAMES = {block_type.kind: name for name, block_type in BLOCK_TYPES.items()}


class BlockRounding(QuantizationMethod):
    """Rounds layers to blocks; embedding and head, which no Hessian belongs to, by themselves."""

    def __init__(self, spec: ModelSpec, types: Mapping[str, str], damping: float, refine: int):
        """Take the settings.

        Args:
            spec: The model.
            types: Full layer name -> type; layers of plain types stay as they are.
            damping: Added to the diagonal of H, in means of it.
            refine: Rounds of coordinate descent.
        """
        self.types, self.damping, self.refine = dict(types), damping, refine
        schemes = {}
        for name, type_name in types.items():
            if type_name in BLOCK_TYPES:
                schemes[name] = BLOCK_TYPES[type_name].scheme
        super().__init__(schemes, spec.dtype, GgufFormat())

    def quantize(self, group: LinearGroup) -> dict[str, torch.Tensor]:
        weights = self.weights(group)
        if not weights:
            return {}
        name = f"{group.prefix}.{', '.join(weights)}"
        hessian = group.hessian
        cholesky = self._factor(name, hessian)
        for layer, weight in weights.items():
            require_range(f"{group.prefix}.{layer}", weight)
            kind = BLOCK_TYPES[self.types[f"{group.prefix}.{layer}"]].kind
            self.done[layer] = self._solve(weight, hessian, cholesky, kind)
        return {layer: self.finished_weight(layer) for layer in weights}

    def _factor(self, name: str, hessian: torch.Tensor) -> CholeskyFactor | None:
        """Factor H, columns with large inputs first; None, with a note, where that fails."""
        if not bool((hessian.diagonal() > 0).any()):
            self.notes.append(
                f"{name}: no calibration token reached it with an input other than 0; rounded "
                "without calibration."
            )
            return None
        order, otherwise = activation_order(hessian), "rounded without error feedback"
        return noted_factor(name, hessian, self.damping, order, self.notes, otherwise)

    def _solve(
        self,
        weight: torch.Tensor,
        hessian: torch.Tensor,
        cholesky: CholeskyFactor | None,
        kind: BlockKind,
    ) -> BlockQuantized:
        """Round a layer, some rows at a time."""
        importance = hessian.diagonal()

        def round_rows(rows: torch.Tensor) -> BlockQuantized:
            if cholesky is None:
                return nearest(rows, kind, importance if bool((importance > 0).any()) else None)
            layer = feed_errors(rows, cholesky, kind, importance)
            return descend(rows, layer, hessian, self.refine)

        return by_rows(weight, round_rows, join=joined)

    def finished_weight(self, name: str) -> torch.Tensor | None:
        layer = self.done.get(name)
        return None if layer is None else layer.dequantize()

    def other_tensors(
        self, name: str, tensor: torch.Tensor, family: Family, tied: bool
    ) -> dict[str, torch.Tensor]:
        layer = name.removesuffix(".weight")
        if tied and layer == family.head:
            return {}  # the embedding again
        return super().other_tensors(name, tensor, family, tied)

    def _rounded(self, layer: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
        type_name = self.types[layer]
        require_range(layer, tensor)
        blocks = round_to_blocks(tensor, type_name)
        self.meant[layer] = unpack_blocks(blocks[:ROWS], type_name, torch.float32)
        return {f"{layer}.{self.form.codes}": blocks}

    def _stored(self, layer: str, packed: BlockQuantized) -> dict[str, torch.Tensor]:
        return {f"{layer}.{self.form.codes}": pack(packed, NAMES[packed.kind])}

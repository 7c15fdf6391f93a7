"""What all quantization methods share: schemes by layer, packed results, errors, output."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from slim.calibration.errors import exchange_weight
from slim.calibration.sequential import BlockMethod, LinearGroup
from slim.core.lazy import LazyModule
from slim.quantization.formats import Format, get_format
from slim.quantization.ranges import require_range
from slim.quantization.scheme import Scheme
from slim.quantization.solvers.error_feedback import by_rows
from slim.quantization.solvers.grid import Quantized, search, shrink_factors
from slim.quantization.written import ROWS

if TYPE_CHECKING:
    import torch
    from torch import nn

    from slim.models.spec import Family
else:
    torch = LazyModule("torch")

HEAD_FACTORS = shrink_factors(10)


class QuantizationMethod(BlockMethod):
    """Base of the methods: subclasses turn a linear group's weights into :class:`Quantized` ones.

    Attributes:
        done: finished layers of the block at hand, by name within it.
        plain: its other tensors that folding has changed, by name within it.
        scaled: layer -> s, float32 [in], what its input channels are multiplied by, where they are.
        unfolded: layer -> its scales, [out, groups], before 1/s was folded into them.
        prefix: name of the block at hand, such as ``model.layers.3``.
        meant: full layer name -> its first rows, float32, as the written file must give them back.
        notes: what the user should know, such as layers that had to fall back.
        corrections: lengths of the steps that layers took to make up for those before them.
    """

    resumable = True

    def __init__(self, schemes: Mapping[str, Scheme], dtype: str, form: Format | None = None):
        """Take the settings that all methods share.

        Args:
            schemes: full layer name -> scheme; layers that are not in it stay as they are.
            dtype: type of the model, such as ``"bfloat16"``: what is not quantised is stored in it.
            form: the format written; None: compressed-tensors.
        """
        self.form = form or get_format("compressed-tensors")
        self.schemes = schemes
        self.dtype = getattr(torch, dtype)
        self.scale_dtype = getattr(torch, self.form.scale_dtype(dtype))
        self.done: dict[str, Quantized] = {}
        self.plain: dict[str, torch.Tensor] = {}
        self.scaled: dict[str, torch.Tensor] = {}
        self.unfolded: dict[str, torch.Tensor] = {}
        self.prefix = ""
        self.meant: dict[str, torch.Tensor] = {}
        self.notes: list[str] = []
        self.corrections: list[float] = []

    def state(self) -> dict:
        return {"notes": self.notes, "corrections": self.corrections}

    def resume(self, state: dict) -> None:
        self.notes = state["notes"]
        self.corrections = state["corrections"]

    def propagation(self) -> dict:
        """Return metadata of error propagation; empty where none was asked for.

        Returns:
            ``corrected_layers``: how many layers took a step; ``correction_mean``: its mean length
            among them, 1 for all of what the calibration text asks for.
        """
        if not self.propagates:
            return {}
        count = len(self.corrections)
        mean = sum(self.corrections) / max(1, count)
        return {"corrected_layers": count, "correction_mean": round(mean, 4)}

    def scheme(self, group: LinearGroup, name: str) -> Scheme | None:
        """Return the scheme of a layer, or None where it stays as it is.

        Args:
            group: its linear group.
            name: the layer within the block.
        """
        return self.schemes.get(f"{group.prefix}.{name}")

    def weights(self, group: LinearGroup) -> dict[str, torch.Tensor]:
        """Return the weights to be quantised: name within the block -> float32 [out, in]."""
        weights = {}
        for name, linear in group.linears.items():
            if self.scheme(group, name):
                weights[name] = linear.weight
        return weights

    def quantize(self, group: LinearGroup) -> dict[str, torch.Tensor]:
        """Fill ``self.done`` for the layers of a group.

        Returns:
            Name within the block -> the weights they stand for on the unscaled input, [out, in].
        """
        raise NotImplementedError

    def process(self, group: LinearGroup) -> dict[str, float]:
        self.prefix = group.prefix
        if group.drift is not None:
            self._take_corrections(group)
        weights = self.quantize(group)
        errors = {}
        for name in list(weights):
            # popped, so that only one layer's old and new weights exist together
            linear, weight = group.linears[name], weights.pop(name)
            errors[name] = exchange_weight(linear, weight, group.hessian)
        return errors

    def _take_corrections(self, group: LinearGroup) -> None:
        """Let the layers aim at what the plain model gives, where that helps."""
        for name, correction in group.drift.correct(self.weights(group)).items():
            group.linears[name].weight.data = correction.weight
            self.corrections.append(correction.length)

    def block_tensors(self, block: int, module: nn.Module) -> dict[str, torch.Tensor]:
        tensors = {}
        for layer, packed in self.done.items():
            tensors.update(self._stored(layer, packed))
            self.remember(f"{self.prefix}.{layer}", packed)
        for name, tensor in module.state_dict().items():
            if name.removesuffix(".weight") not in self.done:
                tensors[name] = self.plain.get(name, tensor)
        self.done, self.plain, self.scaled, self.unfolded = {}, {}, {}, {}
        return tensors

    def remember(self, layer: str, packed: Quantized) -> None:
        """Keep the first rows of a layer as they are meant, to compare the written file with."""
        self.meant[layer] = packed.rows(slice(0, ROWS)).dequantize().cpu()

    def has_finished_weight(self, name: str) -> bool:
        return name in self.done

    def finished_weight(self, name: str) -> torch.Tensor | None:
        layer = self.done.get(name)
        if layer is None:
            return None
        # The block still runs on the unscaled input and with the unfolded outputs of this layer.
        dense = replace(layer, scale=self.unfolded.get(name, layer.scale)).dequantize()
        return dense / self.scaled[name] if name in self.scaled else dense

    def other_tensors(
        self, name: str, tensor: torch.Tensor, family: Family, tied: bool
    ) -> dict[str, torch.Tensor]:
        """Pack the head and the embedding where they have a scheme.

        Tied ones that are both quantised are packed once, as the embedding. Where only the head is,
        it gets packed weights of its own.
        """
        layer = name.removesuffix(".weight")
        is_embedding = layer == family.embeddings
        tensors = {name: tensor}
        if layer in self.schemes:
            tensors = self._rounded(layer, tensor)
        elif is_embedding and tied and family.head in self.schemes:
            tensors.update(self._rounded(family.head, tensor))
        return tensors

    def _rounded(self, layer: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
        """Round a matrix to nearest and return its stored tensors."""
        scheme = self.schemes[layer]

        def round_rows(rows: torch.Tensor) -> Quantized:
            return search(rows.float(), scheme, self.scale_dtype, factors=HEAD_FACTORS)

        packed = by_rows(tensor, round_rows)
        self.remember(layer, packed)
        return self._stored(layer, packed)

    def _stored(self, layer: str, packed: Quantized) -> dict[str, torch.Tensor]:
        require_range(layer, packed, self.form)
        return {f"{layer}.{key}": value for key, value in self.form.tensors(packed).items()}

"""Width pruning on the walk: the units that stay are written, the layers that lose inputs may be
refitted."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from slim.calibration.errors import relative_error
from slim.calibration.sequential import BlockMethod, LinearGroup
from slim.models.spec import ModelSpec
from slim.pruning.least_squares import refit_columns
from slim.pruning.width_scores import Coupled, UnitScores, coupled_tensors, smallest
from slim.pruning.width_sizes import Width


@dataclass(frozen=True)
class Kept:
    """What stays of a block, ascending.

    groups: key/value heads. channels: MLP channels. kv_heads: key/value heads there were. head_dim:
    channels of a head."""

    groups: list[int]
    channels: list[int]
    kv_heads: int
    head_dim: int

    @classmethod
    def of(cls, spec: ModelSpec, block: int, width: Width, scores: UnitScores) -> Kept:
        """Keep the units of a block that are left when those with the smallest scores have gone."""
        shape = spec.at(block)
        groups = set(range(shape.kv_heads)) - set(
            smallest(scores.groups, shape.kv_heads - width.kv_heads)
        )
        channels = set(range(shape.intermediate_size))
        channels -= set(smallest(scores.channels, shape.intermediate_size - width.channels))
        return cls(sorted(groups), sorted(channels), shape.kv_heads, shape.head_dim)

    def indices(self, tensor: Coupled, size: int) -> torch.Tensor:
        """Return the rows or columns of a coupled tensor that stay, int64 [kept]; ``size`` is how
        many there were.

        The channels of a key/value group lie together: head_dim of k and v, repeats times as many
        of q and o."""
        if not tensor.attention:
            return torch.tensor(self.channels)
        per_group = size // self.kv_heads
        return (torch.tensor(self.groups)[:, None] * per_group + torch.arange(per_group)).flatten()


class WidthMethod(BlockMethod):
    """Cuts the blocks in ``kept``; refits what reads the removed units where ``damping`` is a
    number.

    While the walk is in a block its layers keep their shapes: columns of removed units are zero,
    which computes the same."""

    def __init__(self, spec: ModelSpec, kept: dict[int, Kept], damping: float | None = None):
        self.kept, self.damping = kept, damping
        self.needs_hessian = damping is not None
        self.coupled = {tensor.name: tensor for tensor in coupled_tensors(spec.family)}
        self.stored = getattr(torch, spec.dtype)
        # per refitted layer: output error without the fit, with it
        self.errors: list[tuple[float, float]] = []

    def process(self, view: LinearGroup) -> dict[str, float]:
        if view.block not in self.kept:
            return {}
        inputs = {
            name: layer for name, layer in view.linears.items() if not self.coupled[name].rows
        }
        return {name: self._cut_inputs(view, name, layer) for name, layer in inputs.items()}

    def _cut_inputs(self, view: LinearGroup, name: str, layer: nn.Linear) -> float:
        """Zero the removed inputs of a layer, refit the others, and return its relative output
        error."""
        weight = layer.weight
        kept = self.kept[view.block].indices(self.coupled[name], weight.shape[1]).to(weight.device)
        cut = torch.zeros_like(weight)
        cut[:, kept] = weight[:, kept]
        error = relative_error(cut - weight, weight, view.hessian)
        if self.damping is not None and len(kept) < weight.shape[1]:
            before = error
            cut[:, kept] = (
                refit_columns(weight, view.hessian, kept, self.damping).to(self.stored).float()
            )
            error = relative_error(cut - weight, weight, view.hessian)
            self.errors.append((before, error))
        weight.copy_(cut)
        return error

    def block_tensors(self, block: int, module: nn.Module) -> dict[str, torch.Tensor]:
        tensors = module.state_dict()
        if block not in self.kept:
            return tensors
        for name, tensor in self.coupled.items():
            size = tensors[f"{name}.weight"].shape[0 if tensor.rows else 1]
            kept = self.kept[block].indices(tensor, size).to(tensors[f"{name}.weight"].device)
            tensors[f"{name}.weight"] = tensors[f"{name}.weight"].index_select(
                0 if tensor.rows else 1, kept
            )
            if tensor.rows and f"{name}.bias" in tensors:
                tensors[f"{name}.bias"] = tensors[f"{name}.bias"].index_select(0, kept)
        return tensors

    def facts(self) -> dict[str, float]:
        """Return the mean relative output errors of the refitted layers, without and with the
        fit."""
        if not self.errors:
            return {}
        without, fitted = (
            sum(column) / len(self.errors) for column in zip(*self.errors, strict=True)
        )
        return {"layer_error_cut": without, "layer_error_refitted": fitted}

"""Width pruning in sequential calibration: the units that stay are written, the layers that lose
inputs may be refitted."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from slim.calibration.block_method import BlockMethod, LinearGroup
from slim.calibration.errors import relative_error
from slim.models.spec import ModelSpec
from slim.pruning.least_squares import refit_columns
from slim.pruning.width_scores import Coupled, UnitScores, coupled_tensors, smallest
from slim.pruning.width_sizes import Width


@dataclass(frozen=True)
class KeptUnits:
    """What stays of a block.

    Attributes:
        groups: key/value heads that stay, ascending.
        channels: MLP channels that stay, ascending.
        kv_heads: key/value heads there were.
        head_dim: channels of a head.
    """

    groups: list[int]
    channels: list[int]
    kv_heads: int
    head_dim: int

    @classmethod
    def of(cls, spec: ModelSpec, block: int, width: Width, scores: UnitScores) -> KeptUnits:
        """Keep the units of a block that are left when those with the smallest scores have gone.

        Args:
            spec: the model before pruning.
            block: number of the block.
            width: the sizes it is to have.
            scores: of its units.
        """
        shape = spec.at(block)
        groups = set(range(shape.kv_heads))
        groups -= set(smallest(scores.groups, shape.kv_heads - width.kv_heads))
        channels = set(range(shape.intermediate_size))
        channels -= set(smallest(scores.channels, shape.intermediate_size - width.channels))
        return cls(sorted(groups), sorted(channels), shape.kv_heads, shape.head_dim)

    def indices(self, tensor: Coupled, size: int) -> torch.Tensor:
        """Return the rows or columns of a coupled tensor that stay, int64 [kept].

        The channels of a key/value group lie together: head_dim of k and v, repeats times as many
        of q and o.

        Args:
            tensor: which one.
            size: how many rows or columns there were.
        """
        if not tensor.attention:
            return torch.tensor(self.channels)
        per_group = size // self.kv_heads
        return (torch.tensor(self.groups)[:, None] * per_group + torch.arange(per_group)).flatten()


class WidthMethod(BlockMethod):
    """Cuts blocks; may refit what reads the removed units.

    While a block is being calibrated its layers keep their shapes: columns of removed units are
    zero, which computes the same."""

    def __init__(self, spec: ModelSpec, kept: dict[int, KeptUnits], damping: float | None = None):
        """Take what to cut.

        Args:
            spec: the model before pruning.
            kept: block -> units that stay; other blocks are left as they are.
            damping: ridge of the refit, in means of the Hessian's diagonal; None: no refit.
        """
        self.kept = kept
        self.damping = damping
        self.needs_hessian = damping is not None
        self.coupled = {tensor.name: tensor for tensor in coupled_tensors(spec.family)}
        self.stored = getattr(torch, spec.dtype)
        # per refitted layer: output error without the fit, with it
        self.errors: list[tuple[float, float]] = []

    def process(self, group: LinearGroup) -> dict[str, float]:
        errors: dict[str, float] = {}
        if group.block not in self.kept:
            return errors
        for name, layer in group.linears.items():
            if not self.coupled[name].rows:  # it reads the units
                errors[name] = self._cut_inputs(group, name, layer)
        return errors

    def _cut_inputs(self, group: LinearGroup, name: str, layer: nn.Linear) -> float:
        """Zero the removed inputs of a layer, refit the others, and return its relative output
        error."""
        weight = layer.weight
        kept = self.kept[group.block].indices(self.coupled[name], weight.shape[1])
        kept = kept.to(weight.device)
        cut = torch.zeros_like(weight)
        cut[:, kept] = weight[:, kept]
        error = relative_error(cut - weight, weight, group.hessian)
        if self.damping is not None and len(kept) < weight.shape[1]:
            error_cut = error
            refitted = refit_columns(weight, group.hessian, kept, self.damping)
            cut[:, kept] = refitted.to(self.stored).float()  # as it will be stored
            error = relative_error(cut - weight, weight, group.hessian)
            self.errors.append((error_cut, error))
        weight.copy_(cut)
        return error

    def block_tensors(self, block: int, module: nn.Module) -> dict[str, torch.Tensor]:
        tensors = module.state_dict()
        if block not in self.kept:
            return tensors
        for name, tensor in self.coupled.items():
            weight = tensors[f"{name}.weight"]
            dimension = 0 if tensor.rows else 1
            kept = self.kept[block].indices(tensor, weight.shape[dimension]).to(weight.device)
            tensors[f"{name}.weight"] = weight.index_select(dimension, kept)
            if tensor.rows and f"{name}.bias" in tensors:
                tensors[f"{name}.bias"] = tensors[f"{name}.bias"].index_select(0, kept)
        return tensors

    def metadata(self) -> dict[str, float]:
        """Return the mean relative output errors of the refitted layers.

        Returns:
            ``layer_error_cut`` without the fit and ``layer_error_refitted`` with it; empty where
            nothing was refitted.
        """
        if not self.errors:
            return {}
        count = len(self.errors)
        return {
            "layer_error_cut": sum(cut for cut, _ in self.errors) / count,
            "layer_error_refitted": sum(refitted for _, refitted in self.errors) / count,
        }

"""What several processes that train one model compute together: sums, shares of the data, sharded
parameters."""

from __future__ import annotations

from typing import TYPE_CHECKING

from slim.core.lazy import LazyModule
from slim.core.processes import rank, world_size

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn
else:
    torch = LazyModule("torch")


# What the processes compute together


def sum_over_processes(value: Tensor) -> Tensor:
    """Return the sum over the processes."""
    if world_size() == 1:
        return value
    value = value.clone()
    torch.distributed.all_reduce(value)
    return value


def rows_of(batch: dict) -> dict:
    """Return this process' share of the rows of a micro-batch."""
    if world_size() == 1:
        return batch
    cut = slice(rank(), None, world_size())
    return {
        name: value[cut] if isinstance(value, torch.Tensor) else value
        for name, value in batch.items()
    }


def shares(batches: list[dict]) -> list[dict]:
    """Return this process' share of the batches. All get equally many, since they call one another
    in each: the last may have no tokens that count."""
    from slim.data.packing import IGNORE

    count = -(-len(batches) // world_size())
    mine = batches[rank() :: world_size()]
    blank = {**batches[0], "labels": torch.full_like(batches[0]["labels"], IGNORE)}
    return mine + [blank] * (count - len(mine))


def mean_nll(module: nn.Module, batches: list[dict]) -> float:
    """Return the mean negative log-likelihood per counted token, each process computing its share
    of ``batches``.

    module: as :class:`slim.training.module.LanguageModeling`, called with ``held_out=True``.
    """
    from slim.training.forward import summed_nll

    training = module.model.training
    module.model.eval()
    with torch.no_grad():
        found = summed_nll(
            lambda batch: module(batch, held_out=True), shares(batches), module.device
        )
    module.model.train(training)
    total, count = sum_over_processes(torch.tensor(found, dtype=torch.float64)).tolist()
    return total / count


# Sharded models and tensors


def shard(module: nn.Module) -> None:
    """Split the parameters of ``module`` over the processes of its ``device_mesh``: each block by
    itself, then the rest.

    module: a Lightning module. What lies outside blocks (embeddings, head, projectors) is one
    piece, whole during a forward pass of ``module``, since a head may share the embeddings' weights
    and is called apart from the model."""
    from torch.distributed.fsdp import fully_shard

    mesh = module.device_mesh["data_parallel"]
    for block in [part for part in module.modules() if isinstance(part, torch.nn.ModuleList)]:
        for layer in block:
            fully_shard(layer, mesh=mesh)
    fully_shard(module, mesh=mesh)


def is_sharded(tensor: Tensor) -> bool:
    """Whether each process holds a part of the tensor (torch's DTensor)."""
    return hasattr(tensor, "full_tensor")


def gather_full(tensor: Tensor) -> Tensor:
    """Return the tensor with all its parts, in float32 where DeepSpeed trains it so; all processes
    must ask."""
    if is_sharded(tensor):
        return tensor.full_tensor()
    if hasattr(tensor, "ds_id") or hasattr(tensor, "_hp_mapping"):
        from deepspeed.utils import safe_get_full_fp32_param

        found = safe_get_full_fp32_param(tensor)
        return tensor if found is None else found.view(getattr(tensor, "ds_shape", tensor.shape))
    return tensor


def shard_like(value: Tensor, parameter: Tensor) -> Tensor:
    """Return the whole tensor ``value`` sharded as ``parameter`` is, if it has the same shape."""
    if not is_sharded(parameter) or value.shape != parameter.shape:
        return value
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(
        value.to(parameter.device), parameter.device_mesh, parameter.placements
    )


def copy_full(parameter: Tensor, value: Tensor) -> None:
    """Copy the whole tensor ``value`` into ``parameter``."""
    parameter.copy_(shard_like(value, parameter))

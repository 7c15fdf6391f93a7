"""What several processes that train one model compute together: sums, shares of the data, sharded
parameters."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from slim.core.processes import rank, world_size
from slim.data.packing import IGNORE
from slim.training.forward import summed_nll

# What the processes compute together


def sum_over_processes(value: Tensor) -> Tensor:
    """Return the sum over the processes; all must call this.

    Args:
        value: This process' summand, left as it is.
    """
    if world_size() == 1:
        return value
    value = value.clone()
    torch.distributed.all_reduce(value)
    return value


def rows_of(batch: dict) -> dict:
    """Return this process' share of the rows of a micro-batch.

    Args:
        batch: Tensors [rows, ...] by name, and plain values, which are not shared out.
    """
    if world_size() == 1:
        return batch
    cut = slice(rank(), None, world_size())
    share = dict(batch)
    for name, value in batch.items():
        if isinstance(value, torch.Tensor):
            share[name] = value[cut]
    return share


def shares(batches: list[dict]) -> list[dict]:
    """Return this process' share of the batches.

    All processes get equally many, since they call one another in each: the last may have no tokens
    that count.

    Args:
        batches: Each with ``labels``.
    """
    count = -(-len(batches) // world_size())
    mine = batches[rank() :: world_size()]
    blank = {**batches[0], "labels": torch.full_like(batches[0]["labels"], IGNORE)}
    return mine + [blank] * (count - len(mine))


def mean_nll(module: nn.Module, batches: list[dict]) -> float:
    """Return the mean negative log-likelihood per counted token, in nats; each process computes its
    share.

    Args:
        module: As :class:`slim.training.module.LanguageModeling`, called with ``held_out=True``.
        batches: All of them, in every process.
    """
    training = module.model.training
    module.model.eval()
    with torch.no_grad():
        share = summed_nll(
            lambda batch: module(batch, held_out=True), shares(batches), module.device
        )
    module.model.train(training)
    total, count = sum_over_processes(torch.tensor(share, dtype=torch.float64)).tolist()
    return total / count


# Sharded models and tensors


def shard(module: nn.Module) -> None:
    """Split the parameters over the processes: each block by itself, then the rest.

    What lies outside blocks (embeddings, head, projectors) is one piece, whole during a forward
    pass, since a head may share the embeddings' weights and is called apart from the model.

    Args:
        module: A Lightning module with its ``device_mesh``.
    """
    from torch.distributed.fsdp import fully_shard

    mesh = module.device_mesh["data_parallel"]
    # Listed first: sharding changes the modules while they are walked through.
    blocks = [part for part in module.modules() if isinstance(part, torch.nn.ModuleList)]
    for block in blocks:
        for layer in block:
            fully_shard(layer, mesh=mesh)
    fully_shard(module, mesh=mesh)


def is_sharded(tensor: Tensor) -> bool:
    """Whether each process holds a part of the tensor (torch's DTensor).

    Args:
        tensor: Any.
    """
    return hasattr(tensor, "full_tensor")


def gather_full(tensor: Tensor) -> Tensor:
    """Return the tensor with all its parts, in float32 where DeepSpeed trains it so.

    Args:
        tensor: Sharded or not; all processes must ask.
    """
    if is_sharded(tensor):
        return tensor.full_tensor()
    if hasattr(tensor, "ds_id") or hasattr(tensor, "_hp_mapping"):
        from deepspeed.utils import safe_get_full_fp32_param

        full = safe_get_full_fp32_param(tensor)
        if full is not None:
            return full.view(getattr(tensor, "ds_shape", tensor.shape))
    return tensor


def shard_like(value: Tensor, parameter: Tensor) -> Tensor:
    """Return the whole tensor sharded as a parameter is, if it has the same shape.

    Args:
        value: The whole tensor.
        parameter: Sharded or not.
    """
    if not is_sharded(parameter) or value.shape != parameter.shape:
        return value
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(
        value.to(parameter.device), parameter.device_mesh, parameter.placements
    )


def copy_full(parameter: Tensor, value: Tensor) -> None:
    """Copy a whole tensor into a parameter.

    Args:
        parameter: Sharded or not.
        value: The whole tensor.
    """
    parameter.copy_(shard_like(value, parameter))

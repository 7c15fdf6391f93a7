"""Several processes, started by torchrun, that train one model together.

Process zero runs the whole chain. The others wait for a stage that all processes run (a training), take part in it, and wait
again; they write nothing and track nothing. They read the checkpoints that process zero writes, so with several machines the
store must be on a file system that all of them share.
"""

from __future__ import annotations

import atexit
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slim.lazy import LazyModule

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from slim.pipeline import Pipeline
else:
    torch = LazyModule("torch")

PATIENCE = timedelta(days=30)  # the others wait as long as process zero prunes, quantises and evaluates


def launched() -> bool:
    """Whether torchrun started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def rank() -> int:
    """Number of this process."""
    return int(os.environ["RANK"]) if launched() else 0


def world() -> int:
    """Number of processes."""
    return int(os.environ["WORLD_SIZE"]) if launched() else 1


def local_rank() -> int:
    """Number of this process on its machine, which is that of its GPU."""
    return int(os.environ["LOCAL_RANK"]) if launched() else 0


def local_world() -> int:
    """Number of processes on this machine."""
    return int(os.environ["LOCAL_WORLD_SIZE"]) if launched() else 1


def leads() -> bool:
    """Whether this process writes and tracks: process zero, or the only one."""
    return rank() == 0


# Calling the others


def connect() -> None:
    """Join the group of processes; nothing where there is but one."""
    if world() > 1 and not torch.distributed.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        torch.distributed.init_process_group(backend, timeout=PATIENCE)
        atexit.register(torch.distributed.destroy_process_group)


@contextmanager
def leading() -> Iterator[None]:
    """Let the other processes end when the body does, however it does."""
    if world() == 1:
        yield
        return
    connect()
    try:
        yield
    finally:
        with suppress(RuntimeError):  # the others may be gone, which must not hide why
            call(None)


def call(message: Any) -> Any:
    """Give ``message``, plain values, of process zero to all; return it. None tells the others to end."""
    if world() == 1:
        return message
    box = [message]
    torch.distributed.broadcast_object_list(box, src=0)
    return box[0]


def calls() -> Iterator[Any]:
    """Yield, in a process other than zero, what :func:`call` gives, until that is None."""
    connect()
    while (message := call(None)) is not None:
        yield message


def follow(build: Callable[[], Pipeline]) -> None:
    """Take part in the stages that all processes run until process zero is done, and say nothing.

    build: makes the pipeline, as process zero has it.
    """
    import slim.progress
    from slim.stage import Context

    pipeline = None
    for message in calls():
        slim.progress.be_quiet()
        pipeline = pipeline or build()
        stage = pipeline.stages[message["stage"]]
        stage.run(Path(message["source"]), None, Context(pipeline.device, Path(message["work"])))


# What the processes compute together


def agree(decision: bool) -> bool:
    """Return the decision of process zero."""
    if world() == 1:
        return decision
    flag = torch.tensor([int(decision)])
    torch.distributed.broadcast(flag, src=0)
    return bool(flag)


def summed(value: Tensor) -> Tensor:
    """Return the sum over the processes."""
    if world() == 1:
        return value
    value = value.clone()
    torch.distributed.all_reduce(value)
    return value


def rows_of(batch: dict) -> dict:
    """Return this process' share of the rows of a micro-batch."""
    if world() == 1:
        return batch
    cut = slice(rank(), None, world())
    return {name: value[cut] if isinstance(value, torch.Tensor) else value for name, value in batch.items()}


def shares(batches: list[dict]) -> list[dict]:
    """Return this process' share of the batches. All get equally many, since they call one another in each: the last may
    have no tokens that count.
    """
    from slim.data.packing import IGNORE

    count = -(-len(batches) // world())
    mine = batches[rank() :: world()]
    blank = {**batches[0], "labels": torch.full_like(batches[0]["labels"], IGNORE)}
    return mine + [blank] * (count - len(mine))


def mean_nll(module: nn.Module, batches: list[dict]) -> float:
    """Return the mean negative log-likelihood per counted token, each process computing its share of ``batches``.

    module: as :class:`slim.training.module.LanguageModelling`, called with ``held_out=True``.
    """
    from slim.training.forward import summed_nll

    training = module.model.training
    module.model.eval()
    with torch.no_grad():
        found = summed_nll(lambda batch: module(batch, held_out=True), shares(batches), module.device)
    module.model.train(training)
    total, count = summed(torch.tensor(found, dtype=torch.float64)).tolist()
    return total / count


# Sharded models and tensors


def shard(module: nn.Module) -> None:
    """Split the parameters of ``module`` over the processes of its ``device_mesh``: each block by itself, then the rest.

    module: a Lightning module. What lies outside blocks (embeddings, head, projectors) is one piece, whole during a forward
    pass of ``module``, since a head may share the embeddings' weights and is called apart from the model.
    """
    from torch.distributed.fsdp import fully_shard

    mesh = module.device_mesh["data_parallel"]
    for block in [part for part in module.modules() if isinstance(part, torch.nn.ModuleList)]:
        for layer in block:
            fully_shard(layer, mesh=mesh)
    fully_shard(module, mesh=mesh)


def is_sharded(tensor: Tensor) -> bool:
    """Whether each process holds a part of the tensor (torch's DTensor)."""
    return hasattr(tensor, "full_tensor")


def whole(tensor: Tensor) -> Tensor:
    """Return the tensor with all its parts, in float32 where DeepSpeed trains it so; all processes must ask."""
    if is_sharded(tensor):
        return tensor.full_tensor()
    if hasattr(tensor, "ds_id") or hasattr(tensor, "_hp_mapping"):
        from deepspeed.utils import safe_get_full_fp32_param

        found = safe_get_full_fp32_param(tensor)
        return tensor if found is None else found.view(getattr(tensor, "ds_shape", tensor.shape))
    return tensor


def like(value: Tensor, parameter: Tensor) -> Tensor:
    """Return the whole tensor ``value`` sharded as ``parameter`` is, if it has the same shape."""
    if not is_sharded(parameter) or value.shape != parameter.shape:
        return value
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value.to(parameter.device), parameter.device_mesh, parameter.placements)


def assign(parameter: Tensor, value: Tensor) -> None:
    """Copy the whole tensor ``value`` into ``parameter``."""
    parameter.copy_(like(value, parameter))

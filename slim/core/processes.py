"""Several processes, started by torchrun: which one this is, and what process zero tells the
others.

Process zero runs the whole chain. The others wait for a stage that all processes run (a training),
take part in it, and wait again (:mod:`slim.chain.worker`). They read the checkpoints that process
zero writes, so with several machines the store must be on a file system that all of them share.
"""

from __future__ import annotations

import atexit
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from slim.core.lazy import LazyModule

if TYPE_CHECKING:
    import torch
else:
    torch = LazyModule("torch")

# The others wait as long as process zero prunes, quantises and evaluates.
PATIENCE = timedelta(days=30)


def launched() -> bool:
    """Whether torchrun started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def rank() -> int:
    """Number of this process."""
    return _from_torchrun("RANK", 0)


def world_size() -> int:
    """Number of processes."""
    return _from_torchrun("WORLD_SIZE", 1)


def local_rank() -> int:
    """Number of this process on its machine, which is that of its GPU."""
    return _from_torchrun("LOCAL_RANK", 0)


def local_world_size() -> int:
    """Number of processes on this machine."""
    return _from_torchrun("LOCAL_WORLD_SIZE", 1)


def _from_torchrun(variable: str, alone: int) -> int:
    """Return a number that torchrun sets; ``alone`` where it did not start this process, since a
    scheduler may set variables of the same names."""
    if not launched():
        return alone
    return int(os.environ[variable])


def is_main_process() -> bool:
    """Whether this process writes and tracks: process zero, or the only one."""
    return rank() == 0


def connect() -> None:
    """Join the group of processes; nothing where there is but one."""
    if world_size() > 1 and not torch.distributed.is_initialized():
        backend = "gloo"
        if torch.cuda.is_available():
            backend = "cpu:gloo,cuda:nccl"  # flags and messages stay on the CPU
        torch.distributed.init_process_group(backend, timeout=PATIENCE)
        atexit.register(torch.distributed.destroy_process_group)


@contextmanager
def main_process() -> Iterator[None]:
    """Let the other processes end when the body does, however it does."""
    if world_size() == 1:
        yield
        return
    connect()
    try:
        yield
    finally:
        with suppress(RuntimeError):  # the others may have ended, which must not hide why
            broadcast(None)


def broadcast(message: Any) -> Any:
    """Give a message of process zero to all.

    Args:
        message: Plain values; None tells the others to end. What other processes give is ignored.

    Returns:
        The message of process zero.
    """
    if world_size() == 1:
        return message
    box = [message]
    torch.distributed.broadcast_object_list(box, src=0)
    return box[0]


def broadcasts() -> Iterator[Any]:
    """Yield, in a process other than zero, what :func:`broadcast` gives, until that is None."""
    connect()
    while (message := broadcast(None)) is not None:
        yield message


def broadcast_flag(decision: bool) -> bool:
    """Return the decision of process zero; all processes must call this.

    Args:
        decision: What this process thinks.
    """
    if world_size() == 1:
        return decision
    flag = torch.tensor([int(decision)])
    torch.distributed.broadcast(flag, src=0)
    return bool(flag)

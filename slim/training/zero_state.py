"""What each process saves of a training under DeepSpeed, which gives every process its own part of
the optimiser.

A part is the optimiser's flat float32 parameters and their moments. It fits as many processes as it
was saved by, no others. Written against DeepSpeed 0.19's optimisers for ZeRO-2 and ZeRO-3, by their
own state dictionaries."""

from __future__ import annotations

import torch
from torch import Tensor

# As ZeRO-2 and ZeRO-3 name the state of torch's optimiser, and the flat parameters.
MOMENTS = ("base_optimizer_state", "optimizer_state_dict")
FLAT = ("single_partition_of_fp32_groups", "fp32_flat_groups")


def is_partitioned(optimizer: torch.optim.Optimizer) -> bool:
    """Whether DeepSpeed has split the optimiser over the processes.

    Args:
        optimizer: Any.
    """
    return hasattr(optimizer, FLAT[0]) or hasattr(optimizer, "fp32_partitioned_groups_flat")


def own_state(optimizer: torch.optim.Optimizer) -> tuple[dict, list[Tensor]]:
    """Return torch's state dictionary of this process' part, and its flat float32 parameters.

    Args:
        optimizer: DeepSpeed's.
    """
    state = optimizer.state_dict()
    zero2 = FLAT[0] in state
    moments = state[MOMENTS[0] if zero2 else MOMENTS[1]]
    flat = state[FLAT[0] if zero2 else FLAT[1]]
    return moments, [part.detach() for part in flat]


@torch.no_grad()
def restore_own_state(optimizer: torch.optim.Optimizer, moments: dict, flat: list[Tensor]) -> None:
    """Put back what :func:`own_state` gave, in the model's parameters too; all processes must call
    this.

    Args:
        optimizer: DeepSpeed's.
        moments: Torch's state dictionary of this process' part.
        flat: Its flat float32 parameters.
    """
    if hasattr(optimizer, "fp32_partitioned_groups_flat"):
        state = {**optimizer.state_dict(), MOMENTS[1]: moments, FLAT[1]: flat}
        optimizer._rigid_load_state_dict(state)
        return
    optimizer.optimizer.load_state_dict(moments)
    for part, saved in zip(optimizer.single_partition_of_fp32_groups, flat, strict=True):
        part[: saved.numel()].copy_(saved)  # what follows is padding
    optimizer.update_lp_params()

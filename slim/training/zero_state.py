"""What each process saves of a training under DeepSpeed, which gives every process its own part of
the optimiser.

A part is the optimiser's flat float32 parameters and their moments. It fits as many processes as it
was saved by, no others. Written against DeepSpeed 0.19's optimisers for ZeRO-2 and ZeRO-3, by their
own state dictionaries."""

from __future__ import annotations

import torch
from torch import Tensor

# as ZeRO-2 and ZeRO-3 name the state of torch's optimiser
MOMENTS = ("base_optimizer_state", "optimizer_state_dict")
FLAT = ("single_partition_of_fp32_groups", "fp32_flat_groups")


def is_partitioned(optimizer: torch.optim.Optimizer) -> bool:
    """Whether DeepSpeed has taken the optimiser to pieces."""
    return hasattr(optimizer, FLAT[0]) or hasattr(optimizer, "fp32_partitioned_groups_flat")


def own_state(optimizer: torch.optim.Optimizer) -> tuple[dict, list[Tensor]]:
    """Return torch's state dictionary of this process' part, and its flat float32 parameters."""
    state = optimizer.state_dict()
    moments, flat = ((state[name] for name in names if name in state) for names in (MOMENTS, FLAT))
    return next(moments), [part.detach() for part in next(flat)]


@torch.no_grad()
def restore_own_state(optimizer: torch.optim.Optimizer, moments: dict, flat: list[Tensor]) -> None:
    """Put back what :func:`own_state` gave, in the model's parameters too; all processes must call
    this."""
    if hasattr(optimizer, "fp32_partitioned_groups_flat"):
        state = {**optimizer.state_dict(), MOMENTS[1]: moments, FLAT[1]: flat}
        optimizer._rigid_load_state_dict(state)
        return
    optimizer.optimizer.load_state_dict(moments)
    for part, saved in zip(optimizer.single_partition_of_fp32_groups, flat, strict=True):
        part[: saved.numel()].copy_(saved)  # padding stands behind
    optimizer.update_lp_params()

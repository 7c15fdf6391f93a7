"""Learning rate schedules: linear warm-up, then constant, linear or cosine decay."""

from __future__ import annotations

import math

SCHEDULES = ("cosine", "linear", "constant")


def learning_rate_factor(
    step: int, steps: int, schedule: str, warmup: int, floor: float = 0.0
) -> float:
    """Return the factor on the learning rate for an optimiser step.

    The cosine is one period of Loshchilov and Hutter, arXiv:1608.03983, eq. 5.

    Args:
        step: Number of the step; 0 is the first.
        steps: Of the whole training.
        schedule: One of ``SCHEDULES``.
        warmup: Steps over which it rises linearly to 1, reached at step ``warmup - 1``.
        floor: Factor at the end of the decay.
    """
    if step < warmup:
        return (step + 1) / warmup
    if schedule == "constant":
        return 1.0
    progress = min(1.0, (step - warmup + 1) / max(1, steps - warmup))
    rest = 1 - progress
    if schedule == "cosine":
        rest = (1 + math.cos(math.pi * progress)) / 2
    return floor + (1 - floor) * rest

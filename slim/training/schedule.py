"""Learning rate schedules: linear warm-up, then constant, linear or cosine decay."""

from __future__ import annotations

import math

SCHEDULES = ("cosine", "linear", "constant")


def learning_rate_factor(
    step: int, steps: int, schedule: str, warmup: int, floor: float = 0.0
) -> float:
    """Return the factor on the learning rate for the optimiser step ``step`` (0 is the first) of
    ``steps``.

    warmup: steps over which it rises linearly to 1, reached at step ``warmup - 1``.
    floor: factor at the end of the decay (cosine: Loshchilov and Hutter, arXiv:1608.03983, eq. 5,
    one period)."""
    if step < warmup:
        return (step + 1) / warmup
    if schedule == "constant":
        return 1.0
    progress = min(1.0, (step - warmup + 1) / max(1, steps - warmup))
    fall = (1 + math.cos(math.pi * progress)) / 2 if schedule == "cosine" else 1 - progress
    return floor + (1 - floor) * fall

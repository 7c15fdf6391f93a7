"""Which blocks go: the published rules for order and protection, and the defaults in proportion to
the depth."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import Any

from slim.core.errors import SlimError
from slim.core.settings import require_number


def removal_order(scores: Sequence[float], protected: Collection[int] = ()) -> list[int]:
    """Return the blocks in the order in which they are removed: smallest score first, protected
    ones left out.

    Equal scores go in the order of the blocks (a stable sort over all blocks, the protected skipped
    afterwards, as in Shortened LLaMA).

    Args:
        scores: one number per block.
        protected: blocks that stay.

    Raises:
        SlimError: for a score that is not a number.
    """
    require_numbers(scores)
    order = sorted(range(len(scores)), key=scores.__getitem__)
    return [block for block in order if block not in protected]


def require_numbers(scores: Sequence[float]) -> None:
    """Raise ``SlimError`` naming the first NaN: a comparison with NaN would make an arbitrary
    choice silently."""
    broken = [index for index, score in enumerate(scores) if math.isnan(score)]
    if broken:
        raise SlimError(
            f"The score of block {broken[0]} is NaN ({len(broken)} of {len(scores)} scores are). "
            "The model's weights or its half-precision activations overflow; evaluate it before "
            "pruning."
        )


def default_blocks(blocks: int) -> int:
    """Return how many of ``blocks`` are removed unless the user says: 6 of 32 in proportion, half
    rounded up."""
    return max(1, (6 * blocks + 16) // 32)


def is_share(count: Any) -> bool:
    """Whether a number of blocks is given as a share of them: a fraction above 0 and below 1."""
    return isinstance(count, float) and 0 < count < 1


def share_of_blocks(share: float, blocks: int) -> int:
    """Return how many of ``blocks`` the share is, half rounded up, at least 1."""
    return max(1, int(share * blocks + 0.5))


def default_ends(blocks: int) -> tuple[int, int]:
    """Return how many blocks are protected at the input and at the output: 4 and 2 of 32, fewer in
    shallower models."""
    depth = min(blocks, 32)
    return max(1, 4 * depth // 32), max(1, 2 * depth // 32)


def block_list(setting: str, value: Any) -> list[int] | None:
    """Return a setting's value as an ascending list of block numbers, or None.

    Args:
        setting: as the user types it.
        value: of the setting.

    Raises:
        SlimError: for anything but a list of different whole numbers.
    """
    if value is None:
        return None
    if isinstance(value, (str, int)) or not isinstance(value, Collection):
        raise SlimError(
            f"{setting}={value}: must be a list of block numbers, such as {setting}=[3,4]."
        )
    blocks: set[int] = set()
    for block in value:
        require_number(f"{setting} with block", block, 0, integer=True)
        if block in blocks:
            raise SlimError(f"{setting} names block {block} twice. Name every block once.")
        blocks.add(block)
    return sorted(blocks)

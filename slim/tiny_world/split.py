"""Which combinations belong to which split: a fixed hash decides, so that no split can ever emit
another's.

Everything that is combined by chance (a fact and its wording, a scene's persons and things) has a
key. Its bucket says who may use it; training never produces a combination of the held-out text, the
tasks or the validation pairs."""

from __future__ import annotations

import hashlib

BUCKETS = 16
# all others belong to "train"
RESERVED = {"tasks": 0, "heldout": 1, "calibration": 2, "validation": 3}


def bucket(key: str, buckets: int = BUCKETS) -> int:
    """Return a number that depends on a key alone, on every platform and in every process.

    Args:
        key: of a combination.
        buckets: how many numbers there are, from 0.
    """
    # Python's own hash() differs from process to process
    number = hashlib.blake2b(key.encode(), digest_size=8).digest()
    return int.from_bytes(number, "big") % buckets


def allowed(split: str, key: str) -> bool:
    """Whether a split may use a combination.

    Args:
        split: ``"train"`` or a key of ``RESERVED``.
        key: of the combination.
    """
    place = bucket(key)
    if split in RESERVED:
        return place == RESERVED[split]
    return place >= len(RESERVED)

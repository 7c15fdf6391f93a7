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
    """A number in [0, buckets) that depends on ``key`` alone, on every platform and in every
    process."""
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "big") % buckets


def allowed(split: str, key: str) -> bool:
    """Whether ``split`` ("train" or one of RESERVED) may use the combination ``key``."""
    place = bucket(key)
    return place == RESERVED[split] if split in RESERVED else place >= len(RESERVED)

"""Calibration on a text of random words, for tests that only need some inputs."""

from __future__ import annotations

from pathlib import Path

import torch

from slim.data.calibration import Calibration

WORDS = [
    "the",
    "a",
    "cat",
    "dog",
    "house",
    "tree",
    "runs",
    "sees",
    "under",
    "over",
    "red",
    "why",
    "not",
    "and",
    "old",
]


def random_calibration(folder: Path, count: int) -> Calibration:
    """Return settings for 8 samples of 32 tokens from a text of ``count`` random words.

    Args:
        folder: existing folder that the text is written to.
        count: number of words, the same ones in every call.
    """
    path = folder / "words.txt"
    seeded = torch.Generator().manual_seed(7)
    draws = torch.randint(0, len(WORDS), (count,), generator=seeded).tolist()
    path.write_text(" ".join(WORDS[draw] for draw in draws), encoding="utf-8")
    return Calibration(text=str(path), samples=8, length=32)

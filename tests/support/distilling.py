"""Settings of short distillations, for the tests of them; the models are fixtures in
conftest.py."""

from __future__ import annotations

from pathlib import Path

import torch

from slim.checkpoints.source import Source
from slim.data.examples import TinyText
from slim.loading.load_model import load_model

QUICK = dict(
    steps=4,
    window=64,
    batch_tokens=256,
    validate_every=2,
    validation_tokens=512,
    learning_rate=0.01,
)
NARROW = dict(hidden_size=32, intermediate_size=64, vocab_size=1536)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return dict(load_model(folder, "float32").named_parameters())


def by(teacher: Path, **settings) -> dict:
    """Settings of a stage with this teacher."""
    return {**QUICK, "data": TinyText(), "base": Source(str(teacher)), **settings}

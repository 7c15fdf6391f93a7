"""Saving a plain model as a checkpoint folder."""

from __future__ import annotations

from pathlib import Path

from slim.checkpoints.checkpoint import open_checkpoint
from slim.checkpoints.writer import copy_companions
from slim.core.console import hide_library_bars


def save_model(model, source: Path, target: Path, dtype: str | None = None) -> None:
    """Write a plain model as safetensors, with tokenizer and companions copied from ``source``.

    dtype: type to store the weights in; None keeps the one ``source`` stores.
    """
    import torch

    hide_library_bars()
    stored = getattr(torch, dtype or open_checkpoint(source).spec.dtype)
    model.to(stored).save_pretrained(target)
    copy_companions(Path(source), target)

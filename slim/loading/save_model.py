"""Saving a plain model as a checkpoint folder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from slim.checkpoints.checkpoint import open_checkpoint
from slim.checkpoints.reader import TensorReader
from slim.checkpoints.writer import copy_companions
from slim.core.console import hide_library_bars
from slim.core.errors import SlimError

if TYPE_CHECKING:
    from torch import nn


def save_model(model: nn.Module, source: Path, target: Path, dtype: str | None = None) -> None:
    """Write a plain model as safetensors, with tokenizer and companions copied from its source.

    Args:
        model: A model of transformers; its parameters get the type they are stored in.
        source: The checkpoint it was made from.
        target: An existing, empty folder.
        dtype: Type to store the weights in, such as ``"bfloat16"``; None keeps that of ``source``.

    Raises:
        SlimError: What was written reads back as other weights.
    """
    import torch
    from transformers import GenerationConfig

    hide_library_bars()
    stored = getattr(torch, dtype or open_checkpoint(source).spec.dtype)
    settings = getattr(model, "generation_config", None)  # encoders have none
    try:
        if settings is not None:
            settings.validate(strict=True)
    except Exception:  # transformers reads settings that it refuses to write; a copy follows below
        model.generation_config = GenerationConfig()
    model.to(stored).save_pretrained(target)
    if settings is not None:
        model.generation_config = settings
    copy_companions(Path(source), target)
    check_saved(model, target)


def check_saved(model: nn.Module, target: Path) -> None:
    """Compare every parameter with what the folder holds.

    Args:
        model: What was saved.
        target: Where it was saved.

    Raises:
        SlimError: A tensor is missing or differs.
    """
    import torch

    reader = TensorReader(open_checkpoint(target))
    for name, parameter in model.named_parameters():  # a shared head is named once
        if name not in reader or not torch.equal(reader.read(name), parameter.detach().cpu()):
            raise SlimError(
                f"{name} reads back from the result as other weights than the stage made. The "
                "result is not kept. Please report this as a bug of slim."
            )

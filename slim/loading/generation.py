"""The generation settings of a checkpoint: ``generation_config.json``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from slim.checkpoints.checkpoint import Checkpoint
from slim.core.errors import SlimError

if TYPE_CHECKING:
    from torch import nn
    from transformers import GenerationConfig

FILE = "generation_config.json"


def read_generation_config(checkpoint: Checkpoint) -> GenerationConfig | None:
    """Return the generation settings of a checkpoint; None without the file.

    Raises:
        SlimError: transformers cannot read the file, or refuses what it says.
    """
    if not (checkpoint.folder / FILE).is_file():
        return None
    from transformers import GenerationConfig

    try:
        return GenerationConfig.from_pretrained(checkpoint.folder, local_files_only=True)
    except Exception as error:  # the library checks its entries in several ways
        reason = " ".join(str(error).split())[:300]
        raise SlimError(
            f"{checkpoint.folder / FILE}: transformers refuses it "
            f"({type(error).__name__}: {reason}).\n"
            "Correct the entry, or remove the file: greedy generation is the default."
        ) from error


def load_generation_config(model: nn.Module, checkpoint: Checkpoint) -> None:
    """Give a model the generation settings of its checkpoint, where there are any.

    Args:
        model: A causal language model of transformers.
        checkpoint: Where it came from.
    """
    settings = read_generation_config(checkpoint)
    if settings is not None:
        model.generation_config = settings

"""The tokenizer of a checkpoint folder."""

from __future__ import annotations

from pathlib import Path

from slim.core.errors import SlimError


def load_tokenizer(folder: Path | str):
    """Load the tokenizer of a checkpoint folder."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise SlimError(
            f"The tokenizer in {folder} cannot be loaded: {str(error).splitlines()[0]}"
        ) from error

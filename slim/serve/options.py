"""What the commands ``python -m slim.chat`` and ``python -m slim.serve`` have in common: the
options that say which models, and how they are loaded."""

from __future__ import annotations

import argparse
import os
from typing import TYPE_CHECKING

from slim.core.console import progress_bar, say
from slim.core.errors import SlimError

if TYPE_CHECKING:
    from slim.serve.model import ChatModel

DTYPES = ("auto", "float32", "bfloat16", "float16")
MOST_MODELS = 3
MODELS_HELP = (
    "a checkpoint folder, FILE.gguf, a result in the store (its name, or the first digits of its "
    "hash), an id of the hub, tiny, or smollm2; up to three"
)


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that say which models, and how they are loaded."""
    parser.add_argument("models", nargs="+", metavar="FOLDER", help=MODELS_HELP)
    parser.add_argument(
        "--store",
        default=os.environ.get("SLIM_STORE", "runs"),
        help="folder of results, where names are looked up (runs)",
    )
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda (auto)")
    parser.add_argument(
        "--dtype",
        default="auto",
        choices=DTYPES,
        help="type to compute in; auto: what is faster on this CPU, the stored type on a GPU",
    )
    parser.add_argument(
        "--context",
        type=positive,
        help="most tokens of prompt and answer together (the model's own context)",
    )


def positive(text: str) -> int:
    """Return a whole number of at least 1. Raises ``ArgumentTypeError`` for anything else."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text}: must be a whole number of at least 1.")
    return int(text)


def load_models(options: argparse.Namespace) -> list[ChatModel]:
    """Find and load the models of a command line, with a bar.

    Args:
        options: of :func:`add_model_options`.

    Raises:
        SlimError: one is not there, does not load, or there is no memory for all.
    """
    from slim.cli.execute import quiet_libraries  # local: loads most of slim
    from slim.core.hardware import pick_device
    from slim.serve.resolve import find_models

    quiet_libraries()
    if len(options.models) > MOST_MODELS:
        raise SlimError(
            f"{len(options.models)} models: give at most {MOST_MODELS}, each takes its memory."
        )
    device = pick_device(options.device)
    named = find_models(options.models, options.store)
    from slim.serve.model import compute_dtype, load, require_memory  # local: torch, from here on

    dtype = compute_dtype(options.dtype, device, options.store)
    require_memory(named, device, dtype)
    models = []
    with progress_bar("loading", len(named)) as advance:
        for entry in named:
            for note in entry.checkpoint.notes:
                say(note, head=entry.name)
            models.append(load(entry, device, dtype, options.context))
            advance()
    return models

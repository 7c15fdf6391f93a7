"""The three commands: what ``compress.py``, ``train.py`` and ``evaluate.py`` and their console
scripts run."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from omegaconf import DictConfig

try:
    from slim.cli.launch import launch
except ModuleNotFoundError as error:  # most often the system's Python instead of the environment's
    if (error.name or "slim").startswith("slim"):
        raise
    print(
        f"slim: {sys.executable} has no package '{error.name}'. Activate the environment in which "
        "slim is installed:\nsource .venv/bin/activate",
        file=sys.stderr,
    )
    sys.exit(2)


def compress() -> None:
    """Make a model smaller: prune, heal, distill, quantize, evaluate."""
    launch("compress", run_compress)


def train() -> None:
    """Tune or pretrain a model."""
    launch("train", run_train)


def evaluate() -> None:
    """Measure one checkpoint, or several in one table."""
    launch("evaluate", run_evaluate)


def run_compress(config: DictConfig) -> float | list[float] | None:
    """Run one configuration; as a point of a search, return the value of each objective."""
    from slim.cli.execute import execute  # local: heavy, and not needed for --help

    results = execute(config)
    if not config.get("search") or not results:
        return None
    from slim.search.point import values

    return values(config, results[-1].metrics)


def run_train(config: DictConfig) -> None:
    """Run one configuration."""
    from slim.cli.execute import execute

    execute(config)


def run_evaluate(config: DictConfig) -> None:
    """Run one configuration, which may name several checkpoints."""
    from slim.cli.compare import execute

    execute(config)

"""Measure one checkpoint, or several in one table: ``python evaluate.py model.source=FOLDER`` or ``=[FOLDER,FOLDER]``."""

from __future__ import annotations

from omegaconf import DictConfig

from slim.cli import launch


def main(config: DictConfig) -> None:
    """Run the command for one configuration."""
    from slim.evaluation.compare import execute

    execute(config)


if __name__ == "__main__":
    launch("evaluate", main)

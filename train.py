"""Tune or pretrain a model: ``python train.py model=tiny tuner=lora data=tiny``."""

from __future__ import annotations

from omegaconf import DictConfig

from slim.cli import launch


def main(config: DictConfig) -> None:
    """Run the command for one configuration."""
    from slim.run import execute

    execute(config)


if __name__ == "__main__":
    launch("train", main)

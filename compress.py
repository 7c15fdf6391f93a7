"""Make a model smaller: ``python compress.py model=tiny pruner=taylor tuner=lora quant=awq``."""

from __future__ import annotations

from omegaconf import DictConfig

from slim.cli import launch


def main(config: DictConfig) -> None:
    """Run the command for one configuration."""
    from slim.run import execute

    execute(config)


if __name__ == "__main__":
    launch("compress", main)

"""Make a model smaller: ``python compress.py model=tiny pruner=taylor tuner=lora quant=awq``."""

from __future__ import annotations

from omegaconf import DictConfig

from slim.cli import launch


def main(config: DictConfig) -> float | list[float] | None:
    """Run the command for one configuration; as a point of a search, return the value of each objective."""
    from slim.run import execute

    results = execute(config)
    if not config.get("search") or not results:
        return None
    from slim.search.point import values

    return values(config, results[-1].metrics)


if __name__ == "__main__":
    launch("compress", main)

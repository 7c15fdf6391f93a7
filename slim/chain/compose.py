"""Composing a configuration as the command line does, with ``quant`` for ``quantizer``."""

from __future__ import annotations

import re
from pathlib import Path

from omegaconf import DictConfig

CONF = Path(__file__).parent.parent / "conf"

ALIAS = re.compile(r"^([+~]{0,2})quant(?=[.=@]|$)")


def expand_alias(overrides: list[str]) -> list[str]:
    """Write ``quantizer`` for ``quant`` in Hydra overrides; use it for the compose API too."""
    return [ALIAS.sub(r"\1quantizer", override) for override in overrides]


def compose(config_name: str, overrides: list[str] | None = None) -> DictConfig:
    """Compose a configuration from Python as the command line would: ``compose("compress",
    ["quant=awq"])``."""
    import hydra
    from hydra.core.global_hydra import GlobalHydra

    GlobalHydra.instance().clear()
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        return hydra.compose(config_name, expand_alias(overrides or []))

"""Composing a configuration as the command line does, with ``quant`` for ``quantizer``."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from omegaconf import DictConfig

CONF = Path(__file__).parent.parent / "conf"

ALIAS = re.compile(r"^([+~]{0,2})quant(?=[.=@]|$)")


def expand_alias(overrides: list[str]) -> list[str]:
    """Write ``quantizer`` for ``quant`` in Hydra overrides; use it for the compose API too."""
    return [ALIAS.sub(r"\1quantizer", override) for override in overrides]


def config_dirs(arguments: list[str]) -> list[Path]:
    """Return the folders with choices of one's own that ``--config-dir`` names on a command line.

    Args:
        arguments: the words after the command's name.
    """
    folders = []
    for index, argument in enumerate(arguments):
        name, _, value = argument.partition("=")
        if name in ("--config-dir", "-cd"):
            folders.append(Path(value or "".join(arguments[index + 1 : index + 2])))
    return folders


def compose(
    config_name: str, overrides: list[str] | None = None, folders: Sequence[Path] = ()
) -> DictConfig:
    """Compose a configuration from Python as the command line would: ``compose("compress",
    ["quant=awq"])``.

    Args:
        config_name: ``compress``, ``train`` or ``evaluate``.
        overrides: what follows on the command line.
        folders: further folders with choices, as ``--config-dir`` names them.
    """
    import hydra
    from hydra.core.global_hydra import GlobalHydra

    GlobalHydra.instance().clear()
    expanded = expand_alias(overrides or [])
    if folders:
        # compose() knows no --config-dir: the search path says the same
        paths = [f"file://{folder.expanduser().absolute()}" for folder in folders]
        expanded = [*expanded, f"hydra.searchpath=[{','.join(paths)}]"]
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        return hydra.compose(config_name, expanded)

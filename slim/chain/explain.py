"""One or two lines for a mistake in the command."""

from __future__ import annotations

import re

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from slim.chain.compose import CONF, compose, config_dirs
from slim.core.errors import SlimError, did_you_mean

PLUGINS = {  # choices that optional packages bring: package, extra of ours
    "submitit_local": ("hydra-submitit-launcher", "cluster"),
    "submitit_slurm": ("hydra-submitit-launcher", "cluster"),
    "optuna": ("hydra-optuna-sweeper", "search"),
}


def explain(error: BaseException, config_name: str, arguments: list[str]) -> str | None:
    """Return one or two lines for a mistake of the user, or None for an error of slim's own."""
    from hydra.errors import (
        ConfigCompositionException,
        HydraException,
        InstantiationException,
        MissingConfigException,
    )

    chain = _causes(error)
    for link in chain:
        if isinstance(link, SlimError):
            return str(link)
    if isinstance(error, MissingConfigException) and error.options is not None:
        group, _, choice = str(error.missing_cfg_file).rpartition("/")
        if choice in PLUGINS and choice not in error.options:
            package, extra = PLUGINS[choice]
            return f"{group}={choice} needs the package {package}, which is not installed: pip install -e '.[{extra}]'"
        return f"{group}={choice} is not possible. Allowed: {', '.join(error.options)}.{did_you_mean(choice, error.options)}"
    if isinstance(error, ConfigCompositionException):
        return _explain_override(error, config_name, arguments)
    if isinstance(error, InstantiationException) and isinstance(chain[-1], TypeError):
        return f"{_first_line(chain[-1])} (in {error.args[0].splitlines()[-1]})"
    if isinstance(error, (HydraException, OmegaConfBaseException)) and not isinstance(
        error, InstantiationException
    ):
        return _first_line(error)
    return None


def _causes(error: BaseException | None) -> list[BaseException]:
    chain = []
    while error is not None:
        chain.append(error)
        error = error.__cause__ or error.__context__
    return chain


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0]


def _explain_override(error: BaseException, config_name: str, arguments: list[str]) -> str:
    """Name the setting or group that does not exist, what there is instead, and the nearest
    name."""
    found = re.search(r"Could not (?:override|find|delete|append) '([^']+)'", str(error))
    key = found.group(1).split("@")[0] if found else None
    if key is None:
        return _first_line(error)
    groups = sorted(path.name for path in CONF.iterdir() if path.is_dir() and path.name != "hydra")
    if "." not in key:
        known = [*groups, "seed", "device", "plan", "store", "output", "ignore_limits", "tracking"]
        if key in groups:
            return _first_line(error)
        return f"There is no group or setting '{key}'. There are: {', '.join(known)}.{did_you_mean(key, known)}"
    parent, _, name = key.rpartition(".")
    known = _settings_below(parent, config_name, arguments)
    if not known:
        group = {"budget": "hparams_search", "search": "hparams_search"}.get(
            parent, parent.split(".")[0]
        )
        return f"There is no setting '{key}': {parent} has no settings. Choose one with {group}=..."
    return (
        f"{parent} has no setting '{name}'. It has: {', '.join(known)}.{did_you_mean(name, known)}"
    )


def _settings_below(node: str, config_name: str, arguments: list[str]) -> list[str]:
    """Return the settings that ``node`` has under the chosen groups, leaving out the values on the
    command line."""
    choices = [argument for argument in arguments if re.match(r"^\+?[a-z_/]+=[\w/]+$", argument)]
    try:
        settings = OmegaConf.select(compose(config_name, choices, config_dirs(arguments)), node)
    except Exception:
        return []
    return (
        [str(key) for key in settings if not str(key).startswith("_")]
        if isinstance(settings, DictConfig)
        else []
    )

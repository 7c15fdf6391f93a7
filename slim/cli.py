"""From the command line to the pipeline: ``quant`` for ``quantizer``, short errors, exit codes.

Exit codes: 0 done, 1 an error inside slim (with its traceback), 2 a mistake in the command or a limit of the machine,
130 interrupted.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from slim.errors import SlimError, did_you_mean
from slim.experiments import check_experiments

CONF = Path(__file__).parent.parent / "conf"
PLUGINS = {  # choices that optional packages bring: package, extra of ours
    "submitit_local": ("hydra-submitit-launcher", "cluster"),
    "submitit_slurm": ("hydra-submitit-launcher", "cluster"),
    "optuna": ("hydra-optuna-sweeper", "search"),
}
ALIAS = re.compile(r"^([+~]{0,2})quant(?=[.=@]|$)")


def expand_alias(overrides: list[str]) -> list[str]:
    """Write ``quantizer`` for ``quant`` in Hydra overrides; use it for the compose API too."""
    return [ALIAS.sub(r"\1quantizer", override) for override in overrides]


def compose(config_name: str, overrides: list[str] | None = None) -> DictConfig:
    """Compose a configuration from Python as the command line would: ``compose("compress", ["quant=awq"])``."""
    import hydra
    from hydra.core.global_hydra import GlobalHydra

    GlobalHydra.instance().clear()
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        return hydra.compose(config_name, expand_alias(overrides or []))


def launch(config_name: str, task: Callable[[DictConfig], Any]) -> None:
    """Run ``task`` with the configuration of this process' command line and end the process with the exit code."""
    import hydra

    sys.argv[1:] = expand_alias(sys.argv[1:])
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then leaves its errors to us

    arguments = sys.argv[1:]

    def job(config: DictConfig) -> Any:
        if is_sweep():
            from slim.sweeps.point import run_point

            return run_point(task, config, lambda error: explain(error, config_name, arguments))
        try:
            return task(config)
        except Exception as error:  # Hydra would print a line of its own first
            message = explain(error, config_name, arguments)
            if message is None:
                raise
            fail(message, 2)

    try:
        check_experiments(arguments, CONF, config_name)
        hydra.main(version_base="1.3", config_path=str(CONF), config_name=config_name)(job)()
    except KeyboardInterrupt as error:
        close_sweep(error)
        fail("Interrupted. Finished stages are kept; the same command goes on from there.", 130)
    except Exception as error:
        close_sweep(error)
        message = explain(error, config_name, arguments)
        if message is None:
            raise
        fail(message, 2)
    sys.exit(close_sweep())


def close_sweep(error: BaseException | None = None) -> int:
    """End the sweep that this process was started for, if any; return the exit code for its points."""
    sweep = sys.modules.get("slim.sweeps.sweep")  # not imported where there is no sweep
    return sweep.close_current(error) if sweep is not None else 0


def is_sweep() -> bool:
    """Whether this process runs a point of a sweep."""
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    return HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN


def fail(message: str, code: int) -> None:
    """Print an error and end the process."""
    print(f"slim: {message}", file=sys.stderr)
    sys.exit(code)


def explain(error: BaseException, config_name: str, arguments: list[str]) -> str | None:
    """Return one or two lines for a mistake of the user, or None for an error of slim's own."""
    from hydra.errors import ConfigCompositionException, HydraException, InstantiationException, MissingConfigException

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
    if isinstance(error, (HydraException, OmegaConfBaseException)) and not isinstance(error, InstantiationException):
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
    """Name the setting or group that does not exist, what there is instead, and the nearest name."""
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
        group = {"budget": "hparams_search", "search": "hparams_search"}.get(parent, parent.split(".")[0])
        return f"There is no setting '{key}': {parent} has no settings. Choose one with {group}=..."
    return f"{parent} has no setting '{name}'. It has: {', '.join(known)}.{did_you_mean(name, known)}"


def _settings_below(node: str, config_name: str, arguments: list[str]) -> list[str]:
    """Return the settings that ``node`` has under the chosen groups, leaving out the values on the command line."""
    choices = [argument for argument in arguments if re.match(r"^\+?[a-z_/]+=[\w/]+$", argument)]
    try:
        settings = OmegaConf.select(compose(config_name, choices), node)
    except Exception:
        return []
    return [str(key) for key in settings if not str(key).startswith("_")] if isinstance(settings, DictConfig) else []

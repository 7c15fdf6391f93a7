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
# settings outside all groups that a user may have meant
GENERAL = ("seed", "device", "plan", "store", "output", "ignore_limits", "tracking")
# settings outside all groups that have settings below them
SECTIONS = {"tracking": "tracking.uri=sqlite:///FILE.db"}
# settings that the choices of another group bring
BROUGHT_BY = {"budget": "hparams_search", "search": "hparams_search"}
# what other tools call a setting
ALSO_CALLED = {"lr": "learning_rate", "rank": "r", "lora_alpha": "alpha", "num_blocks": "blocks"}
SHORT_NAME = "quant"  # for quantizer
EXAMPLES = {  # what settings and groups may be set to, for messages
    "plan": "true",
    "ignore_limits": "true",
    "quant": "gptq",
    "model": "tiny",
    "pruner": "taylor",
    "tuner": "lora",
}
# options that Hydra takes, in front of the settings or between them
OPTIONS = {
    *("--help", "-h", "--hydra-help", "--version", "--cfg", "-c", "--resolve", "--package", "-p"),
    *("--run", "-r", "--multirun", "-m", "--shell-completion", "-sc", "--config-path", "-cp"),
    *("--config-name", "-cn", "--config-dir", "-cd", "--info", "-i", "--experimental-rerun"),
}
SETS = re.compile(r"^[+~]{0,2}[A-Za-z_]")  # how an override begins


def check_form(arguments: list[str]) -> None:
    """Raise ``SlimError`` for an argument that names no setting, which Hydra answers with a
    traceback, and for an option that it does not have."""
    for argument in arguments:
        name, equals, value = argument.partition("=")
        if name.startswith("-") and name not in OPTIONS:
            raise SlimError(_explain_option(name, value))
        if "=" in argument and not argument.startswith("-") and not SETS.match(argument):
            raise SlimError(f"'{argument}' names no setting. Type it as group.setting=value.")
        if equals and name in (*_groups(), *SECTIONS):
            _check_choice(name, value)


def _check_choice(group: str, value: str) -> None:
    """Raise ``SlimError`` where a group is given what is no name, such as null or a number."""
    import yaml

    if group in SECTIONS:
        raise SlimError(
            f"{group}={value}: {group} has settings of its own, such as {SECTIONS[group]}."
        )
    try:
        read = yaml.safe_load(value)
    except yaml.YAMLError:  # Hydra's own syntax, such as choice(a,b)
        return
    if read is None and value == "" or isinstance(read, str | list | dict):
        return
    typed = SHORT_NAME if group == "quantizer" else group
    has_none = (CONF / group / "none.yaml").is_file()
    advice = f"Use {typed}=none, or" if read is None and has_none else "Use"
    raise SlimError(
        f"{typed}={value}: must be the name of a choice. {advice} one of those that --help lists."
    )


def _explain_option(option: str, value: str) -> str:
    """Say how to type what was typed with dashes in front."""
    name = option.lstrip("-")
    if name in (*GENERAL, *_groups(), SHORT_NAME) or "." in name:
        return f"Settings are typed without dashes: {name}={value or _example(name)}"
    return (
        f"There is no option {option}. Settings are typed as group.setting=value, without dashes; "
        "--help lists them."
    )


def _example(name: str) -> str:
    """Return a value that a setting or group may have, for a message."""
    if name in EXAMPLES:
        return EXAMPLES[name]
    return "CHOICE" if name in _groups() else "VALUE"


def _groups() -> list[str]:
    return sorted(path.name for path in CONF.iterdir() if path.is_dir() and path.name != "hydra")


def explain(error: BaseException, config_name: str, arguments: list[str]) -> str | None:
    """Return one or two lines for a mistake of the user, or None for an error of slim's own.

    Args:
        error: what was raised.
        config_name: the command: ``compress``, ``train`` or ``evaluate``.
        arguments: what was typed.
    """
    from hydra.errors import (  # local: Hydra is not needed to import this file
        ConfigCompositionException,
        HydraException,
        InstantiationException,
        MissingConfigException,
        OverrideParseException,
    )

    causes = _causes(error)
    for cause in causes:
        if isinstance(cause, SlimError):
            return str(cause)
    if isinstance(error, MissingConfigException) and error.options is not None:
        return _explain_choice(str(error.missing_cfg_file), error.options)
    if isinstance(error, OverrideParseException):
        return _explain_form(error.override)
    if isinstance(error, ConfigCompositionException):
        return _explain_override(error, config_name, arguments)
    if isinstance(error, InstantiationException):
        # a setting that the class does not have; what else a class raises is an error of its own
        if isinstance(causes[-1], TypeError):
            return f"{_first_line(causes[-1])} (in {error.args[0].splitlines()[-1]})"
        return None
    if isinstance(error, (HydraException, OmegaConfBaseException)):
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


def _explain_choice(path: str, options: list[str]) -> str:
    """Say which choices a group has, or which package brings the one that was meant."""
    group, _, choice = path.rpartition("/")
    if path.startswith("model/"):  # a folder, a file or a hub id was meant, which have slashes
        group, _, choice = path.partition("/")
    if choice in PLUGINS and choice not in options:
        package, extra = PLUGINS[choice]
        return (
            f"{group}={choice} needs the package {package}, which is not installed.\n"
            f"Install it: pip install -e '.[{extra}]'"
        )
    shown = [option for option in options if not option.startswith("_")]
    message = f"{group}={choice}: must be one of {', '.join(shown)}.{did_you_mean(choice, shown)}"
    if group == "model" and ("/" in choice or choice.endswith(".gguf")):
        message += f"\nFor a model of your own: model=hf model.source={choice}"
    return message


def _explain_form(override: str) -> str:
    """Say how to type a value with characters that mean something to Hydra."""
    key, equals, value = override.partition("=")
    if not equals:
        if override == "quantizer":  # it may have been typed so
            override = SHORT_NAME
        example = f"{override}={_example(override)}"
        if override not in (*GENERAL, *_groups(), SHORT_NAME):
            example = "group.setting=value"
        return f"'{override}' sets nothing. Type it as {example}"
    if not re.fullmatch(r"[+~]{0,2}[\w/@.-]+", key) or ".." in key:
        return f"'{key}' is no name of a setting. Type it as group.setting=value."
    if value.startswith("="):
        return f"{override} has '=' twice. Type {key}={value.lstrip('=')}"
    if value.startswith(("[", "{")):
        return f"{override}: the list or mapping is not closed or has an unquoted character in it."
    return f"{override}: the value has characters that need quotes. Type {quoted(key, value)}"


def quoted(key: str, value: str) -> str:
    """Return an override as it is typed in a shell where its value has special characters.

    Args:
        key: the setting.
        value: any text; quotes around it or in it are kept as they are meant.
    """
    text = value.strip("'\"").replace("\\", "\\\\").replace('"', '\\"')
    for_shell = f'{key}="{text}"'.replace("'", "'\\''")
    return f"'{for_shell}'"


def _explain_override(error: BaseException, config_name: str, arguments: list[str]) -> str:
    """Name the setting or group that does not exist, what there is instead, and the nearest
    name."""
    several = re.search(r"Ambiguous value for argument '([^=]+)=(.*)'", str(error))
    if several is not None:
        return _explain_commas(*several.groups())
    swept = re.search(r"Sweep parameters '([^']+)' requires --multirun", str(error))
    if swept is not None:
        return f"{swept.group(1)} is a sweep over several values: add -m to the command."
    missing = re.search(r"Could not (?:override|find|delete|append) '([^']+)'", str(error))
    if missing is None:
        return _first_line(error)
    key = missing.group(1).split("@")[0]
    groups = _groups()
    if key in groups:
        return _first_line(error)
    if "." not in key:
        known = [*groups, *GENERAL]
        hint = _with_its_group(key, config_name, arguments) or did_you_mean(key, known)
        return f"There is no group or setting '{key}'. There are: {', '.join(known)}.{hint}"
    parent, _, name = key.rpartition(".")
    known = _settings_below(parent, config_name, arguments)
    if not known:
        group = BROUGHT_BY.get(parent, parent.split(".")[0])
        return f"There is no setting '{key}': {parent} has no settings. Choose one with {group}=..."
    hint = did_you_mean(name, known)
    if ALSO_CALLED.get(name) in known:
        hint = f" Did you mean {ALSO_CALLED[name]}?"
    return f"{parent} has no setting '{name}'. It has: {', '.join(known)}.{hint}"


def _with_its_group(name: str, config_name: str, arguments: list[str]) -> str:
    """Return ``" Did you mean pruner.blocks?"`` for a setting typed without its group; nothing
    where no chosen group has it."""
    groups = _groups()
    choices = [argument for argument in arguments if argument.partition("=")[0] in groups]
    try:
        config = compose(config_name, choices, config_dirs(arguments))
    except Exception:  # a choice is wrong, too
        return ""
    for group in ("quantizer", "pruner", "tuner", "teacher", "calibration", "model", "eval"):
        if name in (config.get(group) or {}):
            return f" Did you mean {SHORT_NAME if group == 'quantizer' else group}.{name}?"
    return ""


def _explain_commas(key: str, value: str) -> str:
    """Say what a value with commas may mean."""
    if "." not in key:  # a group has one choice
        return f"{key}={value} are several choices. Add -m to the command to run one after another."
    return (
        f"{key}={value} are several values. Add -m to the command to run one after another;\n"
        f"a list is {key}=[{value}], a text with a comma {quoted(key, value)}"
    )


def _settings_below(node: str, config_name: str, arguments: list[str]) -> list[str]:
    """Return the settings that ``node`` has under the chosen groups, leaving out the values on the
    command line."""
    choices = [argument for argument in arguments if re.match(r"^\+?[a-z_/]+=[\w/]+$", argument)]
    try:
        settings = OmegaConf.select(compose(config_name, choices, config_dirs(arguments)), node)
    except Exception:
        return []
    if not isinstance(settings, DictConfig):
        return []
    return [str(key) for key in settings if not str(key).startswith("_")]

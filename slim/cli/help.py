"""What ``--help`` shows: the choices a user needs first, then every setting with its value."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from slim.chain.compose import CONF, compose, config_dirs
from slim.cli.settings_page import GROUPS

FLAGS = ("--help", "-h")
EXAMPLES = {
    "compress": (
        "compress.py model=tiny pruner=taylor tuner=lora quant=awq",
        "compress.py -m quant=rtn quant.bits=2,3,4 quant.group_size=64,128",
    ),
    "train": ("train.py model=tiny tuner=lora data=tiny_chat",),
    "evaluate": ("evaluate.py model.source=FOLDER", "evaluate.py model.source=[FOLDER,FOLDER]"),
}
# folders of files that depend on the model's texts or on the command; experiments and tasks choose
# between them
BY_TEXTS = ("tiny", "hub", "compress", "train", "evaluate")
# settings that say which group or class is meant, not what it does
HIDDEN = ("texts", "sizes", "chain", "command")
FOOTER = """Choose with group=choice, set with group.setting=value, sweep with -m and commas.
plan=true shows what would run; texts=tiny takes the embedded texts, for any model.
Each choice is a commented file in {conf}; all settings with their meaning
are in docs/settings.md. "quant" is short for "quantizer".
"""


def is_asked_for(arguments: list[str]) -> bool:
    """Whether the command line asks for help."""
    return any(flag in arguments for flag in FLAGS)


def help_page(command: str, arguments: list[str]) -> str:
    """Return the help of a command, with the settings of what else was typed.

    Args:
        command: ``compress``, ``train`` or ``evaluate``.
        arguments: the command line.

    Raises:
        hydra.errors.HydraException: when what else was typed is wrong.
    """
    folders = config_dirs(arguments)
    # the value of --config-dir FOLDER is a word of its own, and no override
    values_of_flags = set(map(str, folders))
    typed = []
    for word in arguments:
        if not word.startswith("-") and word not in values_of_flags:
            typed.append(word)
    config = compose(command, typed, folders)
    lines = ["slim: make large language models smaller."]
    for example in EXAMPLES[command]:
        lines.append(f"  python {example}")
    lines += ["", "Choices"]
    width = max(map(len, GROUPS)) + 1
    for group in [*GROUPS, "experiment"]:
        if group in config or group in ("experiment", "hparams_search"):
            lines += wrapped(f"{group}:", list(choices(group)), width + 1)
    lines += ["", "Settings, with their values for the choices above", *settings(config), ""]
    return "\n".join(lines) + "\n" + FOOTER.format(conf=CONF)


def choices(group: str) -> Iterator[str]:
    """Yield the names that a group can be set to, ``folder/name`` where it has folders; without
    files that other files are made of."""
    for path in sorted((CONF / group).rglob("*.yaml")):
        name = path.relative_to(CONF / group).with_suffix("")
        if not is_helper(name):
            yield name.as_posix()


def is_helper(name: Path) -> bool:
    """Whether a choice file is there for others to be made of."""
    in_a_folder = len(name.parts) > 1
    return name.name.startswith("_") or (in_a_folder and name.parts[0] in BY_TEXTS)


def wrapped(title: str, words: list[str], indent: int) -> list[str]:
    """Return lines of at most 80 characters with ``words`` after a title.

    Args:
        title: what the words are.
        words: set off by commas.
        indent: the column in which the words begin.
    """
    lines = []
    line = title.ljust(indent)
    for number, word in enumerate(words):
        piece = f"{word},"
        if number == len(words) - 1:
            piece = word
        if len(line) + 1 + len(piece) > 80 and line.strip():
            lines.append(line)
            line = " " * indent
        line += f" {piece}"
    return [*lines, line]


def settings(config: DictConfig) -> list[str]:
    """Return the settings as YAML: those of the command, then group by group."""
    plain = OmegaConf.to_container(config, resolve=False)
    general = {}
    for name, value in plain.items():
        if name not in GROUPS and name not in HIDDEN:
            general[name] = value
    # after the command's own settings, in the order in which the stages run
    ordered = general
    for group in GROUPS:
        if plain.get(group):
            ordered[group] = plain[group]
    return OmegaConf.to_yaml(OmegaConf.create(without_targets(ordered))).rstrip().split("\n")


def without_targets(node):
    """Return nested settings without the names of classes."""
    if not isinstance(node, dict):
        return node
    kept = {}
    for name, value in node.items():
        if not str(name).startswith("_"):
            kept[name] = without_targets(value)
    return kept

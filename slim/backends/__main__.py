"""The commands: ``python -m slim.backends list|make|check|remove`` (docs/backends.md).

Exit codes: 0 done, 1 an environment does not work, 2 a mistake in the command, 130 interrupted.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from slim.backends.environment import MARKER, Environment
from slim.backends.making import make, problems, remove_environment
from slim.backends.tools import TOOLS, Tool, find_tool
from slim.core.command import run_command
from slim.core.errors import SlimError
from slim.core.hardware import pick_device
from slim.core.io import read_json
from slim.core.tables import Table, print_table
from slim.core.text import counted, gigabytes

ABOUT = {
    "list": "the tools and the environments that are there",
    "make": "make a tool's environment; says first what is fetched",
    "check": "see whether environments hold what they should and can be imported",
    "remove": "remove a tool's environments, old ones too",
}


def main(arguments: list[str] | None = None) -> int:
    """Run the command and return its exit code."""

    def run(options: argparse.Namespace) -> int:
        return COMMANDS[options.command](options)

    return run_command(parser(), run, arguments)


def parser() -> argparse.ArgumentParser:
    """Return the parser of the four commands."""
    root = argparse.ArgumentParser(
        prog="python -m slim.backends",
        description="Other tools in environments of their own: docs/backends.md",
    )
    commands = root.add_subparsers(dest="command", required=True)
    for name, text in ABOUT.items():
        command = commands.add_parser(name, help=text, description=text)
        command.add_argument(
            "--store",
            default=os.environ.get("SLIM_STORE", "runs"),
            help="folder of the results, which holds the environments (runs)",
        )
        if name != "list":
            command.add_argument("tools", nargs="*" if name == "check" else "+", metavar="TOOL")
        if name == "make":
            command.add_argument(
                "--dry-run", action="store_true", help="say what would be fetched, and do nothing"
            )
    return root


def folder_of_environments(options: argparse.Namespace) -> Path:
    """Return the folder that holds environments."""
    named = os.environ.get("SLIM_ENVIRONMENTS")
    if not named:
        named = Path(options.store) / "environments"
    return Path(named).expanduser().absolute()


def on_cuda() -> bool:
    """Whether this machine has CUDA."""
    return pick_device("auto") == "cuda"


def made_folders(root: Path, name: str | None = None) -> list[Path]:
    """Return the folders of environments, whole or not, by name.

    Args:
        root: Folder that holds them.
        name: Of a tool; None: all.
    """
    folders = []
    for folder in sorted(root.glob("*-*")):
        if folder.is_dir() and (name is None or folder.name.rpartition("-")[0] == name):
            folders.append(folder)
    return folders


def list_command(options: argparse.Namespace) -> int:
    """Print the tools, and every environment that is there."""
    root, cuda = folder_of_environments(options), on_cuda()
    rows, current = [], set()
    for tool in TOOLS.values():
        environment = tool.environment(root, cuda)
        current.add(environment.folder)
        rows.append([f"quant={tool.name}", f"{tool.title} {tool.version}", tool.license,
                     state_of(tool, environment, cuda)])  # fmt: skip
    for folder in made_folders(root):
        if folder not in current:
            rows.append([folder.name, "external, or other pins", "", state_of_folder(folder)])
    print_table(Table(["use", "tool", "license", "environment"], rows, fold=[3], title=str(root)))
    return 0


def state_of(tool: Tool, environment: Environment, cuda: bool) -> str:
    """Say whether a tool's environment is there, and whether the tool works here.

    Args:
        tool: The tool.
        environment: Its environment.
        cuda: Whether this machine has CUDA.
    """
    note = ""
    if tool.needs_cuda and not cuda:
        note = f"; quantizes on CUDA only, here use {tool.instead}"
    if environment.made:
        return f"{gigabytes(environment.record['bytes'])}{note}"
    size = environment.pins.bytes
    if size is None:
        return f"not made: unknown size to fetch{note}"
    return f"not made: {gigabytes(size)} to fetch{note}"


def state_of_folder(folder: Path) -> str:
    """Say how large an environment is, or that it is half-made."""
    if not (folder / MARKER).is_file():
        return "half-made: remove it"
    return gigabytes(read_json(folder / MARKER)["bytes"])


def make_command(options: argparse.Namespace) -> int:
    """Make environments."""
    root = folder_of_environments(options)
    for tool in map(find_tool, options.tools):
        environment = tool.environment(root, on_cuda())
        if environment.made:
            print(f"{environment.folder.name} is there already.")
        elif options.dry_run:
            print(environment.plan())
        else:
            make(environment)
    return 0


def check_command(options: argparse.Namespace) -> int:
    """Check environments: those of the tools named, or all that are made."""
    root, broken, checked = folder_of_environments(options), 0, 0
    for tool in map(find_tool, options.tools or TOOLS):
        environment = tool.environment(root, on_cuda())
        if not environment.made:
            if options.tools:
                print(f"{tool.name}: not made. python -m slim.backends make {tool.name}")
                broken += 1
            continue
        checked += 1
        sentences = problems(environment)
        broken += bool(sentences)
        print(f"{environment.folder.name}: {'; '.join(sentences) or 'works'}")
    if not options.tools:
        print(f"{counted(checked, 'environment')} checked.")
    return 1 if broken else 0


def remove_command(options: argparse.Namespace) -> int:
    """Remove environments, by the name of a tool or of a folder."""
    root = folder_of_environments(options)
    for name in options.tools:
        folders = made_folders(root, name) or [root / name] * (root / name).is_dir()
        if not folders:
            raise SlimError(f"There is no environment of {name} in {root}.")
        for folder in folders:
            gone = remove_environment(folder)
            print(f"{folder.name}: {'removed' if gone else 'is being made, left alone'}")
    return 0


COMMANDS = {
    "list": list_command,
    "make": make_command,
    "check": check_command,
    "remove": remove_command,
}

if __name__ == "__main__":
    sys.exit(main())

"""A tool of a few lines in an environment without packages, and an installer that does little."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from slim.backends.environment import Environment, Pins
from slim.backends.external import ExternalPruning, ExternalQuantization

# what every worker below begins with: standard library only, like a tool that knows nothing of slim
BEGIN = """
import json, os, shutil, sys, time

with open(sys.argv[1]) as file:
    request = json.load(file)


def say(event, **values):
    print(json.dumps({"event": event, **values}), flush=True)


def copy():
    for name in os.listdir(request["source"]):
        if name.endswith((".safetensors", "config.json")):
            shutil.copy(os.path.join(request["source"], name), request["target"])

"""
COPIES = (
    BEGIN
    + """
print("a library says hello")
print("a warning", file=sys.stderr)
tokens = None
if request["calibration"]:
    with open(request["calibration"], "rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        data = file.read()
    import array
    numbers = array.array("q", data)
    tokens = [header["tokens"]["shape"], sum(numbers), list(numbers[:5])]
for step in range(3):
    say("progress", what="blocks", done=step + 1, total=3)
say("note", text="a copy is no smaller")
say("facts", facts={"tokens": tokens, "path": sys.path, "variables": dict(os.environ),
                    "settings": request["settings"], "folder": os.getcwd(),
                    "contract": request["contract"], "tool_seconds": 1.5})
with open(os.path.join(request["target"], "recipe.txt"), "w") as file:
    file.write("copied")
copy()
say("done")
"""
)
# a uv that makes environments as venv does and installs by writing the names of the packages
UV = """#!{python}
import os, subprocess, sys, time

with open({log!r}, "a") as log:
    log.write(" ".join(sys.argv[1:]) + "\\n")
if sys.argv[1] == "venv":
    subprocess.run([{python!r}, "-m", "venv", "--without-pip", sys.argv[-1]], check=True)
else:
    print({says!r})
    time.sleep({seconds})
    sys.exit({code})
"""


def worker(folder: Path, text: str, name: str = "worker.py") -> Path:
    """Write a worker script and return its file."""
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def stage(file: Path, environments: Path, **settings) -> ExternalPruning:
    """Return a pruner whose worker is ``file``."""
    return ExternalPruning(worker_file=str(file), environments=str(environments), **settings)


def quantizer(file: Path, environments: Path, **settings) -> ExternalQuantization:
    """Return a quantizer whose worker is ``file``."""
    return ExternalQuantization(worker_file=str(file), environments=str(environments), **settings)


def environment(root: Path, *packages: str, **settings) -> Environment:
    """Return an environment of packages that nobody has heard of."""
    return Environment("fake", Pins(packages), root, **settings)


def install_uv(
    monkeypatch, folder: Path, says: str = "", code: int = 0, seconds: float = 0
) -> Path:
    """Put a uv on the PATH and return the file that gets its commands, a line each."""
    folder.mkdir(exist_ok=True)
    log = folder / "commands.txt"
    program = folder / "uv"
    text = UV.format(python=sys.executable, log=str(log), says=says, code=code, seconds=seconds)
    program.write_text(text)
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    return log


def commands(log: Path) -> list[str]:
    """Return the first words of what a uv was asked: ``venv``, ``pip``."""
    return [line.split()[0] for line in log.read_text().splitlines()]

"""Reading the documentation: links, commands and blocks of code."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

from tests.conftest import ROOT

DOCS = sorted((ROOT / "docs").rglob("*.md"))
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *DOCS]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
# the first line of a block that is typed into a file: "# my_conf/pruner/mine.yaml"
FILE_NAME = re.compile(r"# ([\w./]+\.(?:py|yaml))\n")


def fences(text: str, language: str) -> list[str]:
    """Return the contents of the fenced blocks of a language."""
    return [body for name, body in FENCE.findall(text) if name == language]


def files(text: str) -> dict[str, str]:
    """Return name -> content of the files that a guide has people type in."""
    blocks = [*fences(text, "python"), *fences(text, "yaml")]
    named = [(FILE_NAME.match(body), body) for body in blocks]
    return {match.group(1): body for match, body in named if match}


def commands(text: str) -> list[list[str]]:
    """Return the words of every ``python compress.py``, ``train.py`` and ``evaluate.py`` line.

    A command stands on lines of its own, in a fenced or an indented block; a comment after it (two
    spaces and ``#``, or text in brackets) is left out.
    """
    joined = re.sub(r"\\\n\s*", " ", text)
    found = []
    for line in joined.splitlines():
        match = re.match(
            r"\s*(?:PYTHONPATH=\S+ )?(?:[\w./]*python )((?:compress|train|evaluate)\.py .*)$", line
        )
        if match:
            command = re.split(r"\s{2,}[#(]|\s#\s", match.group(1))[0]
            found.append(shlex.split(command))
    return found


def relative_links(page: Path) -> list[str]:
    """Return the targets of a page's links to other files of the repository."""
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    targets = re.findall(r"\]\(([^)\s]+)\)", text)
    return [target for target in targets if not re.match(r"[a-z]+:", target)]


def anchors(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as GitHub makes them."""
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in headings}

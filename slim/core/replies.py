"""Replies of models on disk, one JSON line each, written as they come: a stopped run has lost none,
and what was asked once is not asked, or paid for, again."""

from __future__ import annotations

import json
from pathlib import Path


class Replies:
    """A file of replies, each under a key. A last line that was cut off by a crash is dropped.

    Attributes:
        path: the JSON Lines file; made with the first reply.
        noun: what the replies are, in the plural, for messages.
        asked: replies added by this process.
    """

    def __init__(self, path: Path, noun: str = "replies"):
        self.path = path
        self.noun = noun
        self.asked = 0
        self._known: dict[str, dict] = {}
        text = ""
        if path.is_file():
            text = path.read_text(encoding="utf-8")
        self._cut_off = bool(text) and not text.endswith("\n")
        for line in text.splitlines():
            self._read(line)

    def _read(self, line: str) -> None:
        try:
            row = json.loads(line)
            self._known[row.pop("key")] = row
        except (ValueError, KeyError, AttributeError):
            return

    def __len__(self) -> int:
        return len(self._known)

    def find(self, key: str) -> dict | None:
        """Return the reply with this key, or None."""
        return self._known.get(key)

    def add(self, key: str, reply: dict) -> dict:
        """Keep a reply.

        Args:
            key: a hash of all that determines the reply.
            reply: plain JSON values, without one called ``key``.

        Returns:
            ``reply``.
        """
        line = json.dumps({"key": key, **reply}) + "\n"
        if self._cut_off:  # else the new reply would continue the broken line
            line = "\n" + line
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(line)
        self._cut_off = False
        self._known[key] = reply
        self.asked += 1
        return reply

    def kept(self) -> str:
        """Say where what there is can be found."""
        return f"{len(self)} {self.noun} are kept in {self.path}."

"""Verdicts of a judge on disk, one JSON line each, written as they come: a stopped run has lost
none."""

from __future__ import annotations

import json
from pathlib import Path


class Verdicts:
    """The file of one judge. A last line that was cut off by a crash is dropped.

    Attributes:
        path: the JSON Lines file; made with the first verdict.
        asked: verdicts added by this process.
    """

    def __init__(self, path: Path):
        self.path = path
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
        """Return the verdict with this key, or None."""
        return self._known.get(key)

    def add(self, key: str, verdict: dict) -> dict:
        """Keep a verdict.

        Args:
            key: of judge, question and answers; see :class:`slim.evaluation.judge.Judge`.
            verdict: ``verdict`` and ``reason``.

        Returns:
            ``verdict``.
        """
        line = json.dumps({"key": key, **verdict}) + "\n"
        if self._cut_off:  # else the new verdict would continue the broken line
            line = "\n" + line
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(line)
        self._cut_off = False
        self._known[key] = verdict
        self.asked += 1
        return verdict

    def kept(self) -> str:
        """Say where what there is can be found."""
        return f"{len(self)} verdicts are kept in {self.path}."

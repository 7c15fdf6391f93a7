"""Answers that were preferred, on disk: one JSON line each, for a judge, or to learn from.

A line has ``question`` and ``reference`` (the preferred answer), as ``eval.answers`` reads them
(``eval.answers.question=question eval.answers.reference=reference``), and besides ``answers``
(model -> text), ``preferred`` (the model's name), ``messages`` (what was said before, the question
included) and ``time`` (seconds since 1970)."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path

from slim.core.errors import SlimError
from slim.data.chat import Message

FILE = "preferences.jsonl"


class Preferences:
    """The file of preferred answers.

    Attributes:
        path: made with the first line.
    """

    def __init__(self, path: Path):
        self.path = path
        self._lock = threading.Lock()

    def add(self, messages: list[Message], answers: dict[str, str], preferred: str) -> dict:
        """Keep a preference.

        Args:
            messages: up to and with the question, which is the last one.
            answers: model -> text.
            preferred: the name of one of them.

        Returns:
            The line as it was written.

        Raises:
            SlimError: the file cannot be written.
        """
        row = {
            "question": messages[-1]["content"],
            "reference": answers[preferred],
            "preferred": preferred,
            "answers": answers,
            "messages": messages,
            "time": round(time.time(), 3),
        }
        try:
            with self._lock:
                self._append(json.dumps(row, ensure_ascii=False) + "\n")
        except (OSError, ValueError) as error:
            raise SlimError(f"{self.path} cannot be written: {error}") from error
        return row

    def _append(self, line: str) -> None:
        """Write a line at the end; one that a crash cut off before it stays a line of its own."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("ab+") as file:
            if file.tell():
                file.seek(-1, 2)
                if file.read(1) != b"\n":
                    line = "\n" + line
            file.write(line.encode())

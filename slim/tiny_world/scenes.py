"""Scenes: short happenings whose meaning or outcome follows from rules; told as a story, asked as a
question."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Scene:
    """``text`` tells it, ``question`` asks; ``answer`` and ``wrong`` are the choices, ``moral``
    tells the rest.

    ``key`` names the combination (see ``slim.tiny_world.split``); ``kind`` the rule that decides;
    ``reply`` is the answer as a whole sentence, for conversations."""

    kind: str
    key: str
    text: str
    question: str
    answer: str
    wrong: tuple[str, ...]
    moral: str
    reply: str


Maker = Callable[[random.Random], Scene]

"""Scenes: short happenings whose meaning or outcome follows from rules; told as a story, asked as a
question."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Scene:
    """A happening with a question about it.

    Attributes:
        kind: the rule that decides, such as ``"material"``.
        key: names the combination (see ``slim.tiny_world.split``).
        text: tells what happened.
        question: asks what follows, or who is meant.
        answer: the right choice.
        wrong: the other choices.
        moral: tells the rest, for a story.
        reply: the answer as a whole sentence, for conversations.
    """

    kind: str
    key: str
    text: str
    question: str
    answer: str
    wrong: tuple[str, ...]
    moral: str
    reply: str


Maker = Callable[[random.Random], Scene]

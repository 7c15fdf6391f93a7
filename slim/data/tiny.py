"""The tiny world as training data: its documents, and questions about it."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from slim.core.errors import SlimError
from slim.core.settings import dataclass_cache_key, require_choice, require_number
from slim.data.base import TEST, TRAIN, VALIDATION, Conversations, PlainText
from slim.tiny_world import GENERATOR, World


@dataclass
class TinyText(PlainText):
    """Documents of the tiny world, generated as they are needed; about one in seven is a
    conversation.

    Validation is text from the calibration split, the test text from the held-out one: wordings
    that training never shows.

    Attributes:
        world: seed of the world, 0 or more.
        seed: of the documents, 0 or more.
    """

    cache_name: ClassVar[str] = "TinyText"

    world: int = 0
    seed: int = 0
    endless = True
    title = "The text of the tiny world"

    def __post_init__(self) -> None:
        require_number("data.world", self.world, 0, integer=True)
        require_number("data.seed", self.seed, 0, integer=True)

    def cache_key(self) -> dict:
        return {**dataclass_cache_key(self), "generator": GENERATOR}

    def documents(self, part: str) -> Iterator[str]:
        # One document seed further, so that validation is not the very text that quantisers
        # are calibrated on.
        splits = {
            TRAIN: ("train", self.seed),
            VALIDATION: ("calibration", self.seed + 1),
            TEST: ("heldout", self.seed),
        }
        return World(self.world).documents(*splits[part])


@dataclass
class TinyChat(Conversations):
    """Questions about the tiny world with their answers.

    Attributes:
        world: seed of the world, 0 or more.
        seed: of the questions, 0 or more.
        long: ``cut`` or ``drop`` what exceeds the window.
        examples: number of questions to learn from, so that the data has an end and epochs; None:
            ever new ones.
    """

    cache_name: ClassVar[str] = "TinyChat"

    world: int = 0
    seed: int = 0
    long: str = "drop"
    examples: int | None = None
    title = "The conversations of the tiny world"

    def __post_init__(self) -> None:
        require_number("data.world", self.world, 0, integer=True)
        require_number("data.seed", self.seed, 0, integer=True)
        require_choice("data.long", self.long, ("cut", "drop"))
        if self.examples is not None:
            require_number("data.examples", self.examples, 1, integer=True)

    @property
    def endless(self) -> bool:
        """Whether epochs mean nothing."""
        return self.examples is None

    def cache_key(self) -> dict:
        settings = {**dataclass_cache_key(self), "generator": GENERATOR}
        # as before there was such a setting, so that results keep their names
        if self.examples is None:
            del settings["examples"]
        return settings

    def pairs(self, part: str) -> Iterator[tuple[str, str]]:
        if part == TEST:
            raise SlimError(
                f"{self.title} have no test part: the tasks tiny_facts, tiny_pronouns and "
                "tiny_next test them."
            )
        limit = self.examples if part == TRAIN else None
        return itertools.islice(World(self.world).conversations(part, self.seed), limit)

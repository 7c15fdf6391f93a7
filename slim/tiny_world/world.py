"""The world itself: its facts, and the texts, conversations and tasks made of them."""

from __future__ import annotations

import random
from collections.abc import Iterator

from slim.tiny_world.documents import Writer
from slim.tiny_world.facts import build_facts
from slim.tiny_world.tasks import Question, fact_questions, next_questions, pronoun_questions

# None: endless
DOCUMENTS = {"train": None, "heldout": 500, "calibration": 500}
CONVERSATIONS = {"train": None, "validation": 200}


class World:
    """A little world: the same ``seed`` gives the same facts, texts and tasks on every machine."""

    def __init__(self, seed: int = 0):
        self.seed = seed
        self.facts = build_facts(seed)

    def documents(self, split: str = "train", seed: int = 0) -> Iterator[str]:
        """Yield distinct documents of some 40 to 200 words.

        A wording of a fact and a combination of persons and things in a scene belong to one split
        only.

        Args:
            split: ``"train"`` (endless), ``"heldout"`` or ``"calibration"`` (500 each).
            seed: of the documents.

        Raises:
            ValueError: for another split.
        """
        writer = self._writer(split, seed, "documents", DOCUMENTS)
        return _distinct(writer.document, DOCUMENTS[split])

    def conversations(self, split: str = "train", seed: int = 0) -> Iterator[tuple[str, str]]:
        """Yield distinct pairs of instruction and answer.

        Args:
            split: ``"train"`` (endless) or ``"validation"`` (200).
            seed: of the pairs.

        Raises:
            ValueError: for another split.
        """
        writer = self._writer(split, seed, "conversations", CONVERSATIONS)
        return _distinct(writer.turn, CONVERSATIONS[split])

    def tasks(self) -> dict[str, list[Question]]:
        """The three multiple-choice sets: tiny_facts (4 choices), tiny_pronouns (2), tiny_next
        (4)."""
        prefix = f"{self.seed}/tasks"
        return {
            "tiny_facts": fact_questions(self.facts, random.Random(f"{prefix}/facts")),
            "tiny_pronouns": pronoun_questions(random.Random(f"{prefix}/pronouns")),
            "tiny_next": next_questions(random.Random(f"{prefix}/next")),
        }

    def _writer(self, split: str, seed: int, what: str, splits: dict[str, int | None]) -> Writer:
        if split not in splits:
            raise ValueError(
                f"split {split!r} of {what} does not exist; there are {', '.join(splits)}"
            )
        return Writer(self.facts, split, random.Random(f"{self.seed}/{what}/{split}/{seed}"))


def _distinct(make, limit: int | None) -> Iterator:
    """``limit`` distinct results of ``make``; without a limit all of them, as they come."""
    seen = set()
    while limit is None or len(seen) < limit:
        made = make()
        if limit is None:
            yield made
        elif made not in seen:
            seen.add(made)
            yield made

"""How a fact is worded in each split: which statements and questions about it a split may use."""

from __future__ import annotations

import random
from functools import cache

from slim.tiny_world.facts import RELATIONS, Fact, fill
from slim.tiny_world.split import allowed, bucket

LEADS = (
    "",
    "as everyone knows, ",
    "people say that ",
    "it is true that ",
    "I remember that ",
    "you should know that ",
    "in this land ",
    "by the way, ",
)


def capitalize(text: str) -> str:
    return text[:1].upper() + text[1:]


def state(fact: Fact, split: str, rng: random.Random, pronoun: bool = False) -> str | None:
    """Return one sentence that says a fact; None where the split has no wording of it.

    Args:
        fact: what to say.
        split: whose wordings count.
        rng: makes every choice.
        pronoun: call a person "he" or "she".
    """
    choices = _statements(fact.key, len(RELATIONS[fact.relation].statements), split)
    if not choices:
        return None
    # mostly without a lead, which says nothing about the fact
    plain = [choice for choice in choices if choice[1] == 0]
    if plain and rng.random() < 0.75:
        choices = plain
    template, lead = rng.choice(choices)
    sentence = fill(RELATIONS[fact.relation].statements[template], fact, pronoun)
    return capitalize(LEADS[lead] + sentence)


def ask(fact: Fact, split: str, rng: random.Random) -> str:
    """Return a question for a fact's value. One wording of each fact is kept for the tasks, one for
    held-out text.

    Args:
        fact: what is asked.
        split: whose wordings count.
        rng: makes every choice.
    """
    questions = RELATIONS[fact.relation].questions
    start = bucket(f"{fact.key}|question", len(questions))
    offsets = {"train": range(2, len(questions)), "tasks": (0,)}.get(split, (1,))
    number = (start + rng.choice(offsets)) % len(questions)
    return capitalize(fill(questions[number], fact))


@cache
def _statements(key: str, templates: int, split: str) -> tuple[tuple[int, int], ...]:
    """Pairs of template and lead. The plain first template belongs to training: conversations
    answer with it."""
    chosen = []
    for template in range(templates):
        for lead in range(len(LEADS)):
            if (template, lead) == (0, 0):
                if split == "train":
                    chosen.append((template, lead))
            elif allowed(split, f"{key}|{template}|{lead}"):
                chosen.append((template, lead))
    return tuple(chosen)

"""Pronouns to resolve: "Tom lent Ben the book because he had none. Who had none?" The cause
decides, or the gender.

Every pattern has one reason that can only speak of the first person and one that can only speak of
the second. A few neutral reasons fit both; they are used with a man and a woman, where the pronoun
itself decides."""

from __future__ import annotations

import random

from slim.tiny_world import lexicon as lex
from slim.tiny_world.scenes import Scene

# (what happened, reason that means the first person, reason that means the second); {x} is a thing
PATTERNS = (
    ("{A} lent {B} the {x}", "had two of them", "had none"),
    ("{A} bought the {x} from {B}", "needed one", "needed money"),
    ("{A} said sorry to {B}", "had broken the {x}", "was angry about the {x}"),
    ("{A} carried the {x} for {B}", "was strong", "was weak"),
    ("{A} gave {B} some bread", "was full", "was hungry"),
    ("{A} thanked {B}", "had got the {x}", "had given away the {x}"),
    ("{A} asked {B} the way", "was lost", "knew the road"),
    ("{A} waited for {B}", "was early", "was late"),
    ("{A} could not catch {B}", "was slow", "was fast"),
    ("{A} beat {B} in the race", "was fast", "was slow"),
    ("{A} woke {B}", "had heard a noise", "had slept too long"),
    ("{A} called the doctor for {B}", "was worried", "was ill"),
    ("{A} taught {B} a song", "knew it well", "wanted to learn it"),
    ("{A} looked for {B}", "felt alone", "was missing"),
    ("{A} paid {B}", "had bought the {x}", "had sold the {x}"),
    ("{A} hid from {B}", "was afraid", "looked dangerous"),
)
NEUTRAL = (
    "was there",
    "had time",
    "was in the garden",
    "came by",
    "was in town that day",
    "had a day off",
)
HOLDINGS = (
    "{A} had the {x} and {B} had the {y}.",
    "{A} took the {x}. {B} took the {y}.",
    "The {x} went to {A}, the {y} went to {B}.",
)


def holding_scene(rng: random.Random) -> Scene:
    """Who has what: nothing to resolve, only to look up in what was just said. Practice for the
    harder scenes."""
    names = rng.sample((*lex.WOMEN, *lex.MEN), 2)
    things = rng.sample(tuple(lex.THINGS), 2)
    asked = rng.randrange(2)
    text = rng.choice(HOLDINGS).format(A=names[0], B=names[1], x=things[0], y=things[1])
    thing = things[asked]
    answer = names[asked]
    reply = f"{answer} has the {thing}."
    return Scene(
        kind="holding",
        key=text,
        text=text,
        question=f"Who has the {thing}?",
        answer=answer,
        wrong=(names[1 - asked],),
        moral=reply,
        reply=reply,
    )


def pronoun_scene(rng: random.Random) -> Scene:
    """One scene with two people; with the same gender the cause decides alone, else the gender says
    it as well."""
    number = rng.randrange(len(PATTERNS))
    event, first_reason, second_reason = PATTERNS[number]
    first, second = rng.sample((*lex.WOMEN, *lex.MEN), 2)
    # with a man and a woman the pronoun can mean only one of them
    mixed = lex.is_woman(first) != lex.is_woman(second)
    role = rng.randrange(2)
    neutral = mixed and rng.random() < 0.3
    reason = (first_reason, second_reason)[role]
    if neutral:
        reason = rng.choice(NEUTRAL)
    thing = rng.choice(tuple(lex.THINGS))
    opener = ""
    if rng.random() < 0.5:
        opener = rng.choice(lex.OPENERS) + " "
    names = (first, second)
    event = event.format(A=first, B=second, x=thing)
    reason = reason.format(A=first, B=second, x=thing)
    answer = names[role]
    sentence = f"{event} because {lex.subject_pronoun(answer)} {reason}."
    return Scene(
        kind=_deciding(neutral, mixed),
        key=sentence,
        text=opener + sentence,
        question=f"Who {reason}?",
        answer=answer,
        wrong=(names[1 - role],),
        moral=f"{answer} {reason}.",
        reply=f"{answer} {reason}.",
    )


def _deciding(neutral: bool, mixed: bool) -> str:
    """Return what decides who is meant: the gender alone, the cause alone, or both."""
    if neutral:
        return "gender"
    if mixed:
        return "both"
    return "cause"

"""What happens next: materials and what befalls them, needs and what people do, scripts of events,
small sums."""

from __future__ import annotations

import random

from slim.tiny_world import lexicon as lex
from slim.tiny_world.scenes import Scene
from slim.tiny_world.split import bucket

# event: (how it is told, {outcome: materials})
EVENTS = {
    "drop": (
        "{A} dropped the {x} on the stone floor.",
        {
            "broke into pieces": "glass clay",
            "rang loudly": "iron silver",
            "landed softly": "wool paper straw",
            "fell with a knock": "wood wax",
            "landed with a thud": "leather",
        },
    ),
    "river": (
        "{A} let the {x} fall into the river.",
        {
            "sank to the bottom": "glass clay iron silver",
            "floated away": "wood straw wax",
            "became wet and heavy": "wool leather",
            "went soft and tore": "paper",
        },
    ),
    "fire": (
        "{A} left the {x} too near the fire.",
        {
            "became very hot": "glass clay iron silver",
            "burned to ash": "wood straw paper",
            "melted away": "wax",
            "began to smoke": "wool leather",
        },
    ),
    "rain": (
        "{A} left the {x} out in the rain.",
        {
            "began to rust": "iron",
            "went soft and tore": "paper",
            "was washed clean": "glass clay silver wax",
            "became wet and heavy": "wool leather",
            "swelled a little": "wood straw",
        },
    ),
    "strike": (
        "{A} hit the {x} hard with a stone.",
        {
            "broke into pieces": "glass clay",
            "split in two": "wood",
            "rang loudly": "iron",
            "got a deep dent": "silver wax",
            "became quite flat": "wool straw leather paper",
        },
    ),
}

# need: (how it is told, what the person does)
NEEDS = {
    "hungry": ("{A} was very hungry.", "{p} ate some bread"),
    "thirsty": ("{A} was very thirsty.", "{p} drank some water"),
    "tired": ("{A} was very tired.", "{p} went to bed"),
    "cold": ("{A} was very cold.", "{p} put on a coat"),
    "lost": ("{A} did not know the way.", "{p} looked at a map"),
    "ill": ("{A} felt very ill.", "{p} called the doctor"),
    "dark": ("{A} came into a dark room.", "{p} lit a candle"),
    "locked": ("{A} found the door locked.", "{p} took out a key"),
    "rain": ("{A} saw the first drops of rain.", "{p} ran into the house"),
    "torn": ("{A} had a hole in the shirt.", "{p} took a needle"),
    "dirty": ("{A} had very dirty hands.", "{p} washed with soap"),
    "empty": ("{A} found the bucket empty.", "{p} walked to the well"),
    "hot": ("{A} felt very hot in the sun.", "{p} sat in the shade"),
    "late": ("{A} was late for work.", "{p} began to run"),
    "dust": ("{A} saw dust on the floor.", "{p} took the broom"),
    "noise": ("{A} heard a knock at the door.", "{p} opened it"),
}

# script: six steps, always in this order
SCRIPTS = {
    "bread": (
        "mixed flour and water",
        "kneaded the dough",
        "let the dough rise",
        "put the dough in the oven",
        "took out the hot bread",
        "cut the bread in slices",
    ),
    "garden": (
        "dug up the earth",
        "put in the seeds",
        "watered the seeds",
        "saw the first leaves",
        "picked the ripe beans",
        "cooked the beans",
    ),
    "letter": (
        "sat down at the desk",
        "wrote a long letter",
        "folded the letter",
        "put on a stamp",
        "walked to the post",
        "waited for an answer",
    ),
    "fish": (
        "rowed out on the lake",
        "threw out the net",
        "pulled in the net",
        "rowed back to land",
        "cleaned the fish",
        "fried the fish",
    ),
    "shirt": (
        "bought some cloth",
        "measured the cloth",
        "cut the cloth",
        "sewed the parts together",
        "ironed the new shirt",
        "wore the new shirt",
    ),
    "train": (
        "packed a bag",
        "went to the station",
        "bought a ticket",
        "got on the train",
        "looked out of the window",
        "got off the train",
    ),
    "fire": (
        "went into the forest",
        "gathered dry wood",
        "carried the wood home",
        "laid the wood in the stove",
        "lit the stove",
        "sat by the warm stove",
    ),
    "wall": (
        "chose a colour",
        "opened the paint",
        "dipped in the brush",
        "painted the wall",
        "let the wall dry",
        "hung up a picture",
    ),
    "tea": (
        "filled the kettle",
        "boiled the water",
        "poured out the tea",
        "added some honey",
        "stirred the tea",
        "drank the hot tea",
    ),
    "bath": (
        "filled the tub",
        "got into the tub",
        "used the soap",
        "rinsed off the soap",
        "got out of the tub",
        "took a dry towel",
    ),
}
GAINS = ("found {m} more", "got {m} more", "bought {m} more")
LOSSES = ("lost {m} of them", "gave away {m} of them", "sold {m} of them")


def outcome_of(event: str, thing: str) -> str:
    """Return what becomes of a thing: its material decides.

    Args:
        event: a key of ``EVENTS``.
        thing: a key of the lexicon's ``THINGS``.

    Raises:
        KeyError: when the event does not say what becomes of the material.
    """
    material = lex.THINGS[thing][0]
    _, outcomes = EVENTS[event]
    for outcome, materials in outcomes.items():
        if material in materials.split():
            return outcome
    raise KeyError(f"{event}: nothing is said of {material}")


def is_transfer(event: str, thing: str) -> bool:
    """Whether training never shows a pair: the outcome has to be inferred from the material.

    Args:
        event: a key of ``EVENTS``.
        thing: a key of the lexicon's ``THINGS``.
    """
    return bucket(f"transfer|{event}|{thing}", 14) == 0


def material_scene(rng: random.Random) -> Scene:
    """Something befalls a thing, and its material decides what becomes of it."""
    event = rng.choice(tuple(EVENTS))
    thing = rng.choice(tuple(lex.THINGS))
    template, outcomes = EVENTS[event]
    outcome = outcome_of(event, thing)
    person, opener = _who_and_when(rng)
    wrong = rng.sample([different for different in outcomes if different != outcome], 3)
    answer = f"The {thing} {outcome}."
    moral = answer
    if rng.random() < 0.5:
        moral = f"{answer[:-1]} because it was made of {lex.THINGS[thing][0]}."
    return Scene(
        kind="transfer" if is_transfer(event, thing) else "material",
        key=f"material|{event}|{thing}|{person}",
        text=opener + template.format(A=person, x=thing),
        question="What happened next?",
        answer=answer,
        wrong=tuple(f"The {thing} {different}." for different in wrong),
        moral=moral,
        reply=answer,
    )


def need_scene(rng: random.Random) -> Scene:
    """Somebody needs something, and does what helps."""
    need = rng.choice(tuple(NEEDS))
    person, opener = _who_and_when(rng)
    template, action = NEEDS[need]
    useless = [helps for name, (_, helps) in NEEDS.items() if name != need]
    pronoun = lex.subject_pronoun(person).capitalize()
    wrong = []
    for different in rng.sample(useless, 3):
        wrong.append(f"{different.format(p=pronoun)}.")
    answer = f"{action.format(p=pronoun)}."
    return Scene(
        kind="need",
        key=f"need|{need}|{person}",
        text=opener + template.format(A=person),
        question="What happened next?",
        answer=answer,
        wrong=tuple(wrong),
        moral=answer,
        reply=answer,
    )


def script_scene(rng: random.Random) -> Scene:
    """Two steps of a script are told, and the third is asked for."""
    script = rng.choice(tuple(SCRIPTS))
    person, opener = _who_and_when(rng)
    steps = SCRIPTS[script]
    start = rng.randrange(len(steps) - 2)
    pronoun = lex.subject_pronoun(person).capitalize()
    sentences = [f"{pronoun} {step}." for step in steps]
    # a later step is wrong as well: it does not come next
    wrong = sentences[:start] + sentences[start + 3 :]
    rng.shuffle(wrong)
    answer = sentences[start + 2]
    return Scene(
        kind="script",
        key=f"script|{script}|{start}|{person}",
        text=f"{opener}{person} {steps[start]}. {sentences[start + 1]}",
        question="What happened next?",
        answer=answer,
        wrong=tuple(wrong),
        moral=" ".join(sentences[start + 2 :]),
        reply=answer,
    )


def number_scene(rng: random.Random) -> Scene:
    """Sums and differences whose terms and results lie between one and ten."""
    person, opener = _who_and_when(rng)
    counted = rng.choice(lex.COUNTED)
    if rng.random() < 0.5:
        start = rng.randint(1, 9)
        change = rng.randint(1, 10 - start)
        result = start + change
        template = rng.choice(GAINS)
    else:
        start = rng.randint(2, 10)
        change = rng.randint(1, start - 1)
        result = start - change
        template = rng.choice(LOSSES)
    # wrong answers are near the right one, so that counting decides and not plausibility
    near = list(range(max(1, result - 3), min(10, result + 3) + 1))
    near.remove(result)
    pronoun = lex.subject_pronoun(person).capitalize()
    wrong = []
    for number in rng.sample(near, 3):
        wrong.append(f"Then {pronoun.lower()} had {_counted(number, counted)}.")
    answer = f"Then {pronoun.lower()} had {_counted(result, counted)}."
    happened = template.format(m=lex.NUMBERS[change])
    return Scene(
        kind="number",
        key=f"number|{start}|{result}|{counted}|{person}",
        text=f"{opener}{person} had {_counted(start, counted)}. {pronoun} {happened}.",
        question="What happened next?",
        answer=answer,
        wrong=tuple(wrong),
        moral=answer,
        reply=answer,
    )


def _counted(number: int, plural: str) -> str:
    """Return such as "one nut" or "two nuts"; all plurals of the lexicon end in s."""
    noun = plural[:-1] if number == 1 else plural
    return f"{lex.NUMBERS[number]} {noun}"


def _who_and_when(rng: random.Random) -> tuple[str, str]:
    """A person, and half of the time an opening such as "One morning "."""
    person = rng.choice((*lex.WOMEN, *lex.MEN))
    if rng.random() < 0.5:
        return person, f"{rng.choice(lex.OPENERS)} "
    return person, ""


# maker: (share of the texts, share of the task); sums take most practice
HAPPENINGS = {
    material_scene: (0.4, 0.42),
    need_scene: (0.15, 0.2),
    script_scene: (0.15, 0.2),
    number_scene: (0.3, 0.18),
}


def happening(rng: random.Random) -> Scene:
    """A scene of any of the four kinds."""
    makers, shares = zip(*HAPPENINGS.items(), strict=True)
    weights = [share for share, _ in shares]
    return rng.choices(makers, weights)[0](rng)

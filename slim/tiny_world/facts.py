"""Facts to remember: (subject, relation, value) triples, and the many ways to say and to ask each.

In a template, ``{S}`` is the subject (a name, or a pronoun when the text already speaks of it),
``{P}`` its possessive, ``{N}`` always the name, ``{V}`` the value and ``{aV}`` the value with its
article."""

from __future__ import annotations

import random
from dataclasses import dataclass

from slim.tiny_world import lexicon as lex


@dataclass(frozen=True)
class Fact:
    """Something to remember.

    Attributes:
        subject: a person, town, thing, animal or job.
        relation: a key of ``RELATIONS``.
        value: the answer to every question of the relation.
    """

    subject: str
    relation: str
    value: str

    @property
    def key(self) -> str:
        """What is asked: subject and relation, without the answer."""
        return f"{self.subject}|{self.relation}"


@dataclass(frozen=True)
class Relation:
    """Wordings of one kind of fact.

    Attributes:
        statements: templates of sentences that say it; conversations answer with the first.
        questions: templates of questions for the value.
        values: those it may take, from which wrong answers are drawn.
    """

    statements: tuple[str, ...]
    questions: tuple[str, ...]
    values: tuple[str, ...]


PEOPLE = tuple(lex.WOMEN + lex.MEN)

PERSON_RELATIONS = {
    "town": Relation(
        (
            "{S} lives in {V}.",
            "{P} home is in {V}.",
            "{S} has a house in {V}.",
            "{V} is where {N} lives.",
            "{S} is at home in {V}.",
            "{S} moved to {V} long ago and stayed.",
        ),
        (
            "Where does {N} live?",
            "In which town does {N} live?",
            "Where is the home of {N}?",
            "What town is {N} from?",
            "Which town is the home of {N}?",
            "In what town is the house of {N}?",
        ),
        tuple(lex.TOWNS),
    ),
    "job": Relation(
        (
            "{S} works as {aV}.",
            "{S} is {aV}.",
            "{P} job is that of {aV}.",
            "{S} earns {p} money as {aV}.",
            "{S} became {aV} years ago.",
            "{S} makes a living as {aV}.",
        ),
        (
            "What is the job of {N}?",
            "What does {N} work as?",
            "What is {N} by trade?",
            "Which trade does {N} have?",
            "How does {N} earn money?",
            "What kind of work does {N} do?",
        ),
        tuple(lex.JOBS),
    ),
    "food": Relation(
        (
            "{S} likes to eat {V}.",
            "{P} favourite food is {V}.",
            "{S} loves {V}.",
            "{S} could eat {V} every day.",
            "for dinner {N} wants {V}.",
            "nothing tastes better to {N} than {V}.",
        ),
        (
            "What does {N} like to eat?",
            "What is the favourite food of {N}?",
            "Which food does {N} love?",
            "What does {N} want for dinner?",
            "What could {N} eat every day?",
            "Which food tastes best to {N}?",
        ),
        tuple(lex.FOODS),
    ),
    "hobby": Relation(
        (
            "{P} hobby is {V}.",
            "{S} enjoys {V}.",
            "in {p} free time {N} goes in for {V}.",
            "{S} is very good at {V}.",
            "{S} spends every Sunday on {V}.",
            "{V} makes {N} happy.",
        ),
        (
            "What is the hobby of {N}?",
            "What does {N} enjoy?",
            "What is {N} very good at?",
            "What makes {N} happy?",
            "What does {N} do in free time?",
            "How does {N} spend every Sunday?",
        ),
        tuple(lex.HOBBIES),
    ),
    "pet": Relation(
        (
            "{S} keeps {aV}.",
            "{S} has {aV} at home.",
            "{P} pet is {aV}.",
            "{S} feeds {p} {V} every day.",
            "{aV} lives with {N}.",
            "{S} takes good care of {p} {V}.",
        ),
        (
            "Which animal does {N} keep?",
            "What animal lives with {N}?",
            "What is the pet of {N}?",
            "What pet does {N} have?",
            "Which animal does {N} feed?",
            "Which animal has {N} at home?",
        ),
        tuple(lex.PETS),
    ),
    "owns": Relation(
        (
            "{S} owns {aV}.",
            "{S} bought {aV} with {p} savings.",
            "the {V} by the road belongs to {N}.",
            "{P} pride is {p} {V}.",
            "{S} is the owner of {aV}.",
            "{S} got {aV} from {p} father.",
        ),
        (
            "What does {N} own?",
            "What belongs to {N}?",
            "What is the pride of {N}?",
            "What did {N} buy with savings?",
            "Of what is {N} the owner?",
            "What did {N} get from father?",
        ),
        tuple(lex.BELONGINGS),
    ),
    "month": Relation(
        (
            "{S} was born in {V}.",
            "{P} birthday is in {V}.",
            "{S} has a party every {V}.",
            "{V} is the month in which {N} was born.",
            "{S} came into the world in {V}.",
        ),
        (
            "When was {N} born?",
            "In which month was {N} born?",
            "When is the birthday of {N}?",
            "In which month does {N} have a party?",
            "When did {N} come into the world?",
        ),
        tuple(lex.MONTHS),
    ),
    "friend": Relation(
        (
            "{P} best friend is {V}.",
            "{S} is best friends with {V}.",
            "{S} tells {V} every secret.",
            "most of all {N} trusts {V}.",
            "{S} often walks with {p} friend {V}.",
        ),
        (
            "Who is the best friend of {N}?",
            "With whom is {N} best friends?",
            "Whom does {N} trust most of all?",
            "To whom does {N} tell every secret?",
            "With which friend does {N} often walk?",
        ),
        PEOPLE,
    ),
    "sister": Relation(
        (
            "{P} sister is {V}.",
            "{S} has a sister called {V}.",
            "{V} is the sister of {N}.",
            "{S} grew up with {p} sister {V}.",
            "{S} and {p} sister {V} have the same parents.",
        ),
        (
            "Who is the sister of {N}?",
            "What is the sister of {N} called?",
            "With which sister did {N} grow up?",
            "Which sister does {N} have?",
            "What is the name of the sister of {N}?",
        ),
        tuple(lex.WOMEN),
    ),
    "brother": Relation(
        (
            "{P} brother is {V}.",
            "{S} has a brother called {V}.",
            "{V} is the brother of {N}.",
            "{S} grew up with {p} brother {V}.",
            "{S} and {p} brother {V} have the same parents.",
        ),
        (
            "Who is the brother of {N}?",
            "What is the brother of {N} called?",
            "With which brother did {N} grow up?",
            "Which brother does {N} have?",
            "What is the name of the brother of {N}?",
        ),
        tuple(lex.MEN),
    ),
}

TOWN_RELATIONS = {
    "region": Relation(
        (
            "{S} lies in the {V}.",
            "{S} is a town in the {V}.",
            "the road to {N} goes to the {V}.",
            "you find {N} if you go to the {V}.",
            "{S} is one of the towns of the {V}.",
        ),
        (
            "In which part of the land does {N} lie?",
            "Where in the land is {N}?",
            "Where does the road to {N} go?",
            "In which part of the land is the town of {N}?",
        ),
        lex.REGIONS,
    ),
    "site": Relation(
        (
            "{S} was built by the {V}.",
            "{S} stands near the {V}.",
            "from {N} you can see the {V}.",
            "the {V} begins just behind {N}.",
            "people in {N} walk to the {V}.",
        ),
        (
            "What is {N} built by?",
            "What does {N} stand near?",
            "What can you see from {N}?",
            "What begins just behind {N}?",
        ),
        lex.SITES,
    ),
    "product": Relation(
        (
            "{S} is known for its {V}.",
            "the best {V} come from {N}.",
            "{S} sells {V} to other towns.",
            "people make {V} in {N}.",
            "at the market of {N} you can buy {V}.",
        ),
        (
            "What is {N} known for?",
            "What does {N} sell to other towns?",
            "What do people make in {N}?",
            "What can you buy at the market of {N}?",
        ),
        lex.PRODUCTS,
    ),
}

THING_RELATIONS = {
    "material": Relation(
        (
            "{S} is made of {V}.",
            "{V} was used to make {n}.",
            "{S} was made from {V}.",
            "you need {V} to make {n}.",
            "{S} feels like {V}.",
        ),
        (
            "What is {n} made of?",
            "What was used to make {n}?",
            "What do you need to make {n}?",
            "Of what material is {n}?",
            "What does {n} feel like?",
        ),
        tuple(lex.MATERIALS),
    ),
    "place": Relation(
        (
            "{S} is kept in the {V}.",
            "you find {n} in the {V}.",
            "{S} belongs in the {V}.",
            "in the {V} there is {n}.",
            "you should look for {n} in the {V}.",
        ),
        (
            "Where is {n} kept?",
            "Where do you find {n}?",
            "Where does {n} belong?",
            "Where should you look for {n}?",
        ),
        tuple(sorted({place for _, place in lex.THINGS.values()})),
    ),
    "colour": Relation(
        (
            "{S} is {V}.",
            "the colour of {n} is {V}.",
            "{S} was painted {V}.",
            "{S} looks {V} in the sun.",
            "{V} is the colour of {n}.",
        ),
        (
            "What colour is {n}?",
            "What is the colour of {n}?",
            "Which colour does {n} have?",
            "How does {n} look in the sun?",
        ),
        tuple(lex.COLOURS),
    ),
}

ANIMAL_RELATIONS = {
    "eats": Relation(
        (
            "{S} eats {V}.",
            "{S} feeds on {V}.",
            "{S} likes {V} best.",
            "you should give {V} to {n}.",
            "{S} looks for {V} all day.",
        ),
        (
            "What does {n} eat?",
            "What does {n} feed on?",
            "What does {n} like best?",
            "What should you give to {n}?",
        ),
        tuple(sorted({food for food, _, _ in lex.ANIMALS.values()})),
    ),
    "sleeps": Relation(
        (
            "{S} sleeps in the {V}.",
            "at night {n} rests in the {V}.",
            "{S} has its place in the {V}.",
            "{S} comes home to the {V}.",
            "in the {V} you will see {n}.",
        ),
        (
            "Where does {n} sleep?",
            "Where does {n} rest at night?",
            "Where does {n} have its place?",
            "Where does {n} come home to?",
        ),
        tuple(sorted({home for _, home, _ in lex.ANIMALS.values()})),
    ),
    "legs": Relation(
        (
            "{S} has {V} legs.",
            "{S} walks on {V} legs.",
            "the legs of {n} are {V}.",
            "{S} stands on its {V} legs.",
        ),
        (
            "How many legs does {n} have?",
            "On how many legs does {n} walk?",
            "How many are the legs of {n}?",
            "On how many legs does {n} stand?",
        ),
        ("two", "four", "six", "eight"),
    ),
}

JOB_RELATIONS = {
    "workplace": Relation(
        (
            "{S} works in the {V}.",
            "you meet {n} in the {V}.",
            "the work of {n} is done in the {V}.",
            "in the {V} you need {n}.",
            "{S} goes to the {V} every morning.",
        ),
        (
            "Where does {n} work?",
            "Where do you meet {n}?",
            "Where is the work of {n} done?",
            "Where does {n} go every morning?",
        ),
        tuple(place for place, _ in lex.JOBS.values()),
    ),
    "tool": Relation(
        (
            "{S} uses {aV}.",
            "{S} cannot work without {aV}.",
            "the tool of {n} is {aV}.",
            "{S} needs {aV} for the work.",
            "without {aV}, {n} can do no work.",
        ),
        (
            "What tool does {n} use?",
            "What can {n} not work without?",
            "What is the tool of {n}?",
            "What does {n} need for the work?",
        ),
        tuple(tool for _, tool in lex.JOBS.values()),
    ),
}

RELATIONS = PERSON_RELATIONS | TOWN_RELATIONS | THING_RELATIONS | ANIMAL_RELATIONS | JOB_RELATIONS
KINDS = {
    "person": PERSON_RELATIONS,
    "town": TOWN_RELATIONS,
    "thing": THING_RELATIONS,
    "animal": ANIMAL_RELATIONS,
    "job": JOB_RELATIONS,
}


KIND_OF_RELATION = {relation: kind for kind, names in KINDS.items() for relation in names}


def kind_of(fact: Fact) -> str:
    """Return what a fact is about: a key of ``KINDS``."""
    return KIND_OF_RELATION[fact.relation]


def build_facts(seed: int) -> tuple[Fact, ...]:
    """Return all facts of the world with this seed; what the lexicon does not fix is drawn evenly
    from its values."""
    rng = random.Random(f"facts/{seed}")
    facts = []
    for relation in ("town", "job", "food", "hobby", "pet", "owns", "month"):
        facts += _spread(PEOPLE, relation, PERSON_RELATIONS[relation].values, rng)
    facts += _friends(rng)
    facts += _siblings(rng)
    for relation in TOWN_RELATIONS:
        facts += _spread(tuple(lex.TOWNS), relation, TOWN_RELATIONS[relation].values, rng)
    facts += _spread(tuple(lex.THINGS), "colour", tuple(lex.COLOURS), rng)
    facts += _listed(lex.THINGS, ("material", "place"))
    facts += _listed(lex.ANIMALS, ("eats", "sleeps", "legs"))
    facts += _listed(lex.JOBS, ("workplace", "tool"))
    return tuple(facts)


def _listed(table: dict[str, tuple[str, ...]], relations: tuple[str, ...]) -> list[Fact]:
    """The facts that the lexicon fixes: a value per relation for every subject."""
    facts = []
    for subject, values in table.items():
        for relation, value in zip(relations, values, strict=True):
            facts.append(Fact(subject, relation, value))
    return facts


def _spread(
    subjects: tuple[str, ...], relation: str, values: tuple[str, ...], rng: random.Random
) -> list[Fact]:
    """Each value equally often, so that guessing the most frequent one does not pay."""
    drawn = [values[i % len(values)] for i in range(len(subjects))]
    rng.shuffle(drawn)
    facts = []
    for subject, value in zip(subjects, drawn, strict=True):
        facts.append(Fact(subject, relation, value))
    return facts


def _friends(rng: random.Random) -> list[Fact]:
    """Best friends are mutual: pairs."""
    facts = []
    for first, second in _pairs(rng):
        facts += [Fact(first, "friend", second), Fact(second, "friend", first)]
    return facts


def _siblings(rng: random.Random) -> list[Fact]:
    """Families of two children: two sisters, two brothers or one of each."""
    facts = []
    for first, second in _pairs(rng):
        facts += [_sibling(first, second), _sibling(second, first)]
    return facts


def _pairs(rng: random.Random) -> list[tuple[str, str]]:
    """Everybody in a pair with somebody."""
    people = list(PEOPLE)
    rng.shuffle(people)
    return list(zip(people[::2], people[1::2], strict=True))


def _sibling(person: str, sibling: str) -> Fact:
    relation = "sister" if lex.is_woman(sibling) else "brother"
    return Fact(person, relation, sibling)


def fill(template: str, fact: Fact, pronoun: bool = False) -> str:
    """Return the sentence of a template, its first letter as it comes.

    Args:
        template: a statement or question of the fact's relation.
        fact: gives subject and value.
        pronoun: whether "{S}" and "{P}" say "she", "his", "it", for a text that has named the
            subject already.
    """
    kind = kind_of(fact)
    if kind in ("person", "town"):
        noun = fact.subject
    elif kind == "thing":
        # there is one of each in this world
        noun = f"the {fact.subject}"
    else:
        noun = lex.article(fact.subject)
    short = "it"
    possessive = "its"
    if kind == "person":
        short = lex.subject_pronoun(fact.subject)
        possessive = lex.possessive_pronoun(fact.subject)
    return template.format(
        S=short if pronoun else noun,
        P=possessive if pronoun else f"{noun}'s",
        p=possessive,
        n=noun,
        N=fact.subject,
        V=fact.value,
        aV=lex.article(fact.value),
    )

"""Documents: facts and scenes put together as prose, as quizzes and as conversations."""

from __future__ import annotations

import random
from collections.abc import Callable

from slim.tiny_world import lexicon as lex
from slim.tiny_world.chat import render
from slim.tiny_world.facts import KINDS, PERSON_RELATIONS, Fact, fill, kind_of
from slim.tiny_world.happenings import happening
from slim.tiny_world.pronouns import holding_scene, pronoun_scene
from slim.tiny_world.scenes import Maker, Scene
from slim.tiny_world.split import allowed
from slim.tiny_world.wording import ask, capitalize, state

SHARES = {
    "biography": 0.20,
    "things": 0.10,
    "round": 0.05,
    "story": 0.13,
    "sums": 0.03,
    "quiz": 0.34,
    "chat": 0.15,
}
TRAIN_ONLY = ("sums", "chat")
WORDS = (40, 200)  # shortest and longest document
# share of documents that are two, joined by an empty line as in the held-out text files
JOINED = 0.2
SCENES: tuple[tuple[Maker, float], ...] = (
    (pronoun_scene, 0.5),
    (holding_scene, 0.1),
    (happening, 0.4),
)


class Writer:
    """Writes documents and question/answer pairs of one split about one set of facts.

    The same numbers are drawn in the same order for the same text: a draw more or less anywhere
    changes all that follows.

    Args:
        facts: of the world.
        split: whose wordings and combinations count.
        rng: makes every choice.
    """

    def __init__(self, facts: tuple[Fact, ...], split: str, rng: random.Random):
        self.split, self.rng = split, rng
        self.facts = facts
        self.about: dict[str, list[Fact]] = {}
        for fact in facts:
            self.about.setdefault(f"{kind_of(fact)}|{fact.subject}", []).append(fact)
        self.subjects: dict[str, list[str]] = {kind: [] for kind in KINDS}
        for subject in self.about:
            self.subjects[subject.partition("|")[0]].append(subject)
        self.kinds: dict[str, Callable[[], str]] = {
            "biography": self.biography,
            "things": self.things,
            "round": self.round,
            "story": self.story,
            "sums": self.sums,
            "quiz": self.quiz,
            "chat": self.chat,
        }

    def document(self) -> str:
        """Any kind of document of 40 to 200 words; held-out text has no sums (all the same) and no
        conversations."""
        names = [name for name in SHARES if self.split == "train" or name not in TRAIN_ONLY]
        while True:
            name = self.rng.choices(names, [SHARES[n] for n in names])[0]
            text = self.kinds[name]()
            if name != "chat" and self.split == "train" and self.rng.random() < JOINED:
                second = self.rng.choice(("biography", "things", "story", "quiz"))
                text += f"\n\n{self.kinds[second]()}"
            # a document of another length is thrown away, and what it drew is not drawn again
            if WORDS[0] <= len(text.split()) <= WORDS[1]:
                return text

    # prose

    def biography(self) -> str:
        """Two people, most of what there is to know about each; or one person, everything."""
        count = self.rng.choice((1, 2))
        return self._portraits("person", count)

    def things(self) -> str:
        """Some towns, things, animals or jobs."""
        kind = self.rng.choices(("town", "thing", "animal", "job"), (3, 6, 2, 2))[0]
        count = self.rng.randint(2, 4)
        return self._portraits(kind, count)

    def round(self) -> str:
        """One relation, asked of several people in turn."""
        relation = self.rng.choice(tuple(PERSON_RELATIONS))
        known = [fact for fact in self.facts if fact.relation == relation]
        sentences = []
        for fact in self.rng.sample(known, 7):
            sentence = state(fact, self.split, self.rng)
            # this split may have no wording of it
            if sentence:
                sentences.append(sentence)
        return " ".join(sentences)

    def story(self) -> str:
        """Scenes one after the other, each with its end."""
        # all scenes are drawn before the first end
        scenes = [self.scene() for _ in range(self.rng.randint(3, 6))]
        parts = []
        for scene in scenes:
            parts += [scene.text, self._end(scene)]
        return " ".join(parts)

    def sums(self) -> str:
        """Plain sums, differences and comparisons."""
        return " ".join(self._sum() for _ in range(self.rng.randint(7, 12)))

    # questions

    def quiz(self) -> str:
        """Questions and short answers, in the form in which the tasks ask them."""
        return "\n".join(self._item() for _ in range(self.rng.randint(5, 9)))

    def chat(self) -> str:
        """A conversation of several turns, in the chat template's form."""
        return render(self.turn() for _ in range(self.rng.randint(2, 5)))

    def turn(self) -> tuple[str, str]:
        """An instruction and its answer in whole sentences."""
        weights = (55, 30, 8, 7)
        if self.split != "train":
            # of sums and portraits there are too few to keep some from training
            weights = (65, 35, 0, 0)
        kind = self.rng.choices(("fact", "scene", "sum", "portrait"), weights)[0]
        if kind == "fact":
            fact = self.rng.choice(self.facts)
            return ask(fact, self.split, self.rng), capitalize(fill(_plain(fact), fact))
        if kind == "scene":
            scene = self.scene()
            return f"{scene.text} {scene.question}", scene.reply
        if kind == "sum":
            return self._sum_question()
        return self._introduction()

    def scene(self) -> Scene:
        """A scene whose combination belongs to this split."""
        makers, weights = zip(*SCENES, strict=True)
        maker = self.rng.choices(makers, weights)[0]
        while True:
            scene = maker(self.rng)
            if scene.kind != "transfer" and allowed(self.split, scene.key):
                return scene

    # parts

    def _introduction(self) -> tuple[str, str]:
        """Three facts about a person, who is named only in the first."""
        subject = self.rng.choice(self.subjects["person"])
        facts = self.rng.sample(self.about[subject], 3)
        sentences = []
        for number, fact in enumerate(facts):
            sentences.append(capitalize(fill(_plain(fact), fact, pronoun=number > 0)))
        return f"Tell me about {facts[0].subject}.", " ".join(sentences)

    def _portraits(self, kind: str, count: int) -> str:
        subjects = self.rng.sample(self.subjects[kind], count)
        return " ".join(self._portrait(subject) for subject in subjects)

    def _portrait(self, subject: str) -> str:
        facts = list(self.about[subject])
        self.rng.shuffle(facts)
        facts = facts[: self.rng.randint(4, 9)]
        sentences: list[str] = []
        for fact in facts:
            # the first sentence names whom the rest is about
            pronoun = bool(sentences) and self.rng.random() < 0.4
            sentence = state(fact, self.split, self.rng, pronoun)
            if sentence:
                sentences.append(sentence)
        return " ".join(sentences)

    def _end(self, scene: Scene) -> str:
        if not scene.question.startswith("Who"):
            return scene.moral
        return self.rng.choice(("So ", "You see: ", "")) + scene.moral

    def _item(self) -> str:
        if self.rng.random() < 0.5:
            fact = self.rng.choice(self.facts)
            return quiz_item(ask(fact, self.split, self.rng), fact.value)
        scene = self.scene()
        return quiz_item(f"{scene.text} {scene.question}", scene.answer)

    def _sum(self) -> str:
        return self._sum_question()[1]

    def _sum_question(self) -> tuple[str, str]:
        """A sum, a difference or a comparison of numbers up to ten; this split's combinations
        only."""
        while True:
            kind = self.rng.choice(("plus", "minus", "more"))
            a, b = self.rng.randint(1, 10), self.rng.randint(1, 10)
            if a == b or (kind == "plus" and a + b > 10) or (kind == "minus" and a <= b):
                continue
            first, second = lex.NUMBERS[a], lex.NUMBERS[b]
            if kind == "more":
                question = f"Which is more, {first} or {second}?"
                if a > b:
                    return question, capitalize(f"{first} is more than {second}.")
                return question, capitalize(f"{second} is more than {first}.")
            total = lex.NUMBERS[a + b] if kind == "plus" else lex.NUMBERS[a - b]
            question = f"How much is {first} {kind} {second}?"
            return question, capitalize(f"{first} {kind} {second} is {total}.")


def quiz_item(question: str, answer: str) -> str:
    """Return a question with its answer, in the form in which the tasks ask it.

    Args:
        question: with its question mark.
        answer: the short one.
    """
    return f"Question: {question}\nAnswer: {answer}"


def _plain(fact: Fact) -> str:
    """The first wording of a relation: the form of the answers in conversations."""
    return KINDS[kind_of(fact)][fact.relation].statements[0]

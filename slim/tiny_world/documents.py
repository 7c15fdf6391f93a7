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
    """Writes documents and question/answer pairs of one split about one set of facts, all chance
    from ``rng``."""

    def __init__(self, facts: tuple[Fact, ...], split: str, rng: random.Random):
        self.split, self.rng = split, rng
        self.facts = facts
        self.about: dict[str, list[Fact]] = {}
        for fact in facts:
            self.about.setdefault(f"{kind_of(fact)}|{fact.subject}", []).append(fact)
        self.subjects = {
            kind: [s for s in self.about if s.startswith(f"{kind}|")] for kind in KINDS
        }
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
                text += (
                    "\n\n" + self.kinds[self.rng.choice(("biography", "things", "story", "quiz"))]()
                )
            if WORDS[0] <= len(text.split()) <= WORDS[1]:
                return text

    # prose

    def biography(self) -> str:
        """Two people, most of what there is to know about each; or one person, everything."""
        return " ".join(
            self._portrait(s)
            for s in self.rng.sample(self.subjects["person"], self.rng.choice((1, 2)))
        )

    def things(self) -> str:
        """Some towns, things, animals or jobs."""
        kind = self.rng.choices(("town", "thing", "animal", "job"), (3, 6, 2, 2))[0]
        return " ".join(
            self._portrait(s) for s in self.rng.sample(self.subjects[kind], self.rng.randint(2, 4))
        )

    def round(self) -> str:
        """One relation, asked of several people in turn."""
        relation = self.rng.choice(tuple(PERSON_RELATIONS))
        facts = self.rng.sample([f for f in self.facts if f.relation == relation], 7)
        return " ".join(filter(None, (state(f, self.split, self.rng) for f in facts)))

    def story(self) -> str:
        """Scenes one after the other, each with its end."""
        scenes = [self.scene() for _ in range(self.rng.randint(3, 6))]
        return " ".join(f"{scene.text} {self._end(scene)}" for scene in scenes)

    def sums(self) -> str:
        """Plain sums, differences and comparisons."""
        return " ".join(self._sum() for _ in range(self.rng.randint(7, 12)))

    # questions

    def quiz(self) -> str:
        """Questions and short answers, in the form in which the tasks ask them."""
        return "\n".join(self._item() for _ in range(self.rng.randint(5, 9)))

    def chat(self) -> str:
        return render(self.turn() for _ in range(self.rng.randint(2, 5)))

    def turn(self) -> tuple[str, str]:
        """An instruction and its answer in whole sentences."""
        # of the others there are too few
        weights = (55, 30, 8, 7) if self.split == "train" else (65, 35, 0, 0)
        kind = self.rng.choices(("fact", "scene", "sum", "portrait"), weights)[0]
        if kind == "fact":
            fact = self.rng.choice(self.facts)
            return ask(fact, self.split, self.rng), capitalize(fill(_plain(fact), fact))
        if kind == "scene":
            scene = self.scene()
            return f"{scene.text} {scene.question}", scene.reply
        if kind == "sum":
            return self._sum_question()
        subject = self.rng.choice(self.subjects["person"])
        about = self.rng.sample(self.about[subject], 3)
        sentences = [capitalize(fill(_plain(f), f, pronoun=i > 0)) for i, f in enumerate(about)]
        return f"Tell me about {about[0].subject}.", " ".join(sentences)

    def scene(self) -> Scene:
        """A scene whose combination belongs to this split."""
        makers, weights = zip(*SCENES, strict=True)
        maker = self.rng.choices(makers, weights)[0]
        while True:
            scene = maker(self.rng)
            if scene.kind != "transfer" and allowed(self.split, scene.key):
                return scene

    # parts

    def _portrait(self, subject: str) -> str:
        facts = list(self.about[subject])
        self.rng.shuffle(facts)
        facts = facts[: self.rng.randint(4, 9)]
        sentences: list[str] = []
        for fact in facts:
            sentence = state(
                fact, self.split, self.rng, pronoun=bool(sentences) and self.rng.random() < 0.4
            )
            if sentence:
                sentences.append(sentence)
        return " ".join(sentences)

    def _end(self, scene: Scene) -> str:
        lead = self.rng.choice(("So ", "You see: ", "")) if scene.question.startswith("Who") else ""
        return lead + scene.moral

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
            x, y = lex.NUMBERS[a], lex.NUMBERS[b]
            if kind == "more":
                larger, smaller = (x, y) if a > b else (y, x)
                return f"Which is more, {x} or {y}?", capitalize(
                    f"{larger} is more than {smaller}."
                )
            total = lex.NUMBERS[a + b if kind == "plus" else a - b]
            return f"How much is {x} {kind} {y}?", capitalize(f"{x} {kind} {y} is {total}.")


def quiz_item(question: str, answer: str) -> str:
    return f"Question: {question}\nAnswer: {answer}"


def _plain(fact: Fact) -> str:
    """The first wording of a relation: the form of the answers in conversations."""
    return KINDS[kind_of(fact)][fact.relation].statements[0]

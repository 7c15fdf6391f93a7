"""Three sets of multiple-choice questions about the world, answers balanced over the positions."""

from __future__ import annotations

import random
from collections import Counter

from slim.tiny_world.facts import RELATIONS, Fact
from slim.tiny_world.happenings import HAPPENINGS
from slim.tiny_world.pronouns import pronoun_scene
from slim.tiny_world.scenes import Maker, Scene
from slim.tiny_world.split import allowed
from slim.tiny_world.wording import ask

QUESTIONS = 400
Question = dict[str, object]  # question: str, choices: list[str], answer: int, kind: str


def fact_questions(facts: tuple[Fact, ...], rng: random.Random) -> list[Question]:
    """Return one question for each of 400 facts, in the one wording that training never uses for
    that fact.

    Args:
        facts: of the world.
        rng: makes every choice.
    """
    items = []
    for fact in rng.sample(facts, QUESTIONS):
        # nobody is their own friend: such an answer would give itself away
        excluded = (fact.value, fact.subject)
        values = [value for value in RELATIONS[fact.relation].values if value not in excluded]
        question = ask(fact, "tasks", rng)
        items.append((fact.relation, question, fact.value, tuple(rng.sample(values, 3))))
    return _place(items, 4, rng)


def pronoun_questions(rng: random.Random) -> list[Question]:
    """Both people named equally often as first and as second; combinations that training never
    shows."""
    scenes = []
    wanted = Counter({0: QUESTIONS // 2, 1: QUESTIONS // 2})
    for scene in _scenes(pronoun_scene, rng):
        role = int(scene.text.index(scene.answer) > scene.text.index(scene.wrong[0]))
        if wanted[role]:
            wanted[role] -= 1
            scenes.append(scene)
        if len(scenes) == QUESTIONS:
            break
    return _place([_item(scene) for scene in scenes], 2, rng)


def next_questions(rng: random.Random) -> list[Question]:
    """What happens next: every kind of happening in its share, some about pairs of thing and event
    never trained on."""
    items = []
    for maker, (_, share) in HAPPENINGS.items():
        scenes = _scenes(maker, rng)
        for _ in range(round(share * QUESTIONS)):
            items.append(_item(next(scenes)))
    return _place(items, 4, rng)


def _scenes(maker: Maker, rng: random.Random):
    """Yield distinct scenes that training never shows, endlessly."""
    seen = set()
    while True:
        scene = maker(rng)
        text = (scene.text, scene.question)
        if text not in seen and _may_be_asked(scene, rng):
            seen.add(text)
            yield scene


def _may_be_asked(scene: Scene, rng: random.Random) -> bool:
    if allowed("tasks", scene.key):
        return True
    # no document has these pairs; all of them would be half of the questions
    return scene.kind == "transfer" and rng.random() < 0.05


def _item(scene: Scene) -> tuple[str, str, str, tuple[str, ...]]:
    return scene.kind, f"{scene.text} {scene.question}", scene.answer, scene.wrong


def _place(
    items: list[tuple[str, str, str, tuple[str, ...]]], choices: int, rng: random.Random
) -> list[Question]:
    """Shuffle the questions and put each position's share of right answers there."""
    items = list(items)
    rng.shuffle(items)
    positions = [i % choices for i in range(len(items))]
    rng.shuffle(positions)
    placed: list[Question] = []
    for (kind, question, answer, wrong), position in zip(items, positions, strict=True):
        order = list(wrong)
        rng.shuffle(order)
        order.insert(position, answer)
        placed.append({"question": question, "choices": order, "answer": position, "kind": kind})
    return placed

"""The little world: deterministic, its splits apart, its tasks fair, its rules right, its shipped
files up to date."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections import Counter
from itertools import islice

import pytest
import yaml

from slim.tiny_world import World
from slim.tiny_world import lexicon as lex
from slim.tiny_world.assets import FOLDER, asset_files
from slim.tiny_world.chat import ASSISTANT, END, USER
from slim.tiny_world.facts import PERSON_RELATIONS
from slim.tiny_world.happenings import SCRIPTS, is_transfer, outcome_of
from slim.tiny_world.tokenizer import save_tokenizer, train_tokenizer

TRAIN_DOCUMENTS = 8000


@pytest.fixture(scope="module")
def world() -> World:
    return World(seed=0)


@pytest.fixture(scope="module")
def training(world) -> list[str]:
    return list(islice(world.documents("train", seed=3), TRAIN_DOCUMENTS))


@pytest.fixture(scope="module")
def tasks(world) -> dict:
    return world.tasks()


def sentences(text: str) -> list[str]:
    return [s for s in re.split(r"(?<=[.?:])\s+", text) if s]


# determinism


def test_files_are_what_the_generator_writes(world):
    for name, content in asset_files(world).items():
        assert (FOLDER / name).read_bytes() == content.encode("utf-8"), (
            f"{name}: run `python -m slim.tiny_world` again"
        )
    assert {p.name for p in FOLDER.iterdir()} == set(asset_files(world))


def test_files_stay_small():
    assert sum(p.stat().st_size for p in FOLDER.iterdir()) < 1.5e6


@pytest.mark.parametrize("hash_seed", ["0", "4711"])
def test_same_text_in_another_process(world, hash_seed):
    code = (
        "import hashlib; from itertools import islice; from slim.tiny_world import World; w = World(0);"
        "texts = [list(islice(make('train', 5), 50)) for make in (w.documents, w.conversations)];"
        "text = repr([texts, w.tasks()]);"
        "print(hashlib.sha256(text.encode()).hexdigest())"
    )
    run = [sys.executable, "-c", code]
    digests = {
        subprocess.run(
            run, env={**os.environ, "PYTHONHASHSEED": h}, capture_output=True, text=True, check=True
        ).stdout
        for h in (hash_seed, "1")
    }
    assert len(digests) == 1 and len(digests.pop()) == 65


def test_seeds_give_other_texts_and_other_worlds(world):
    first = [next(World(seed).documents("train", 0)) for seed in (0, 0, 1)]
    assert first[0] == first[1] != first[2]
    assert next(world.documents("train", 0)) != next(world.documents("train", 1))
    assert World(1).facts != world.facts


def test_generator_needs_no_heavy_library():
    code = "import sys, slim.tiny_world; print([m for m in ('torch', 'transformers', 'tokenizers') if m in sys.modules])"
    assert (
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        ).stdout
        == "[]\n"
    )


# the world


def test_size_of_the_world(world):
    assert len(world.facts) > 700
    assert len({(f.subject, f.relation) for f in world.facts}) == len(world.facts)
    assert len({f.subject for f in world.facts} | {f.value for f in world.facts}) > 250


def test_friends_and_siblings_are_mutual(world):
    facts = {(f.subject, f.relation): f.value for f in world.facts}
    people = {*lex.WOMEN, *lex.MEN}
    for person in people:
        assert facts[facts[person, "friend"], "friend"] == person != facts[person, "friend"]
        back = "sister" if person in lex.WOMEN else "brother"
        sibling = facts.get((person, "sister")) or facts[person, "brother"]
        assert facts[sibling, back] == person
        assert (sibling in lex.WOMEN) == ((person, "sister") in facts)


def test_values_are_spread_evenly(world):
    for relation in ("town", "job", "food", "hobby", "pet", "owns", "month", "colour", "region"):
        counts = Counter(f.value for f in world.facts if f.relation == relation)
        assert max(counts.values()) - min(counts.values()) <= 1


def test_every_fact_is_stated_and_asked_in_training(world, training):
    """A fact counts as stated where its subject and its value stand in one sentence or one answered
    question."""
    text = "\n".join(training)
    pieces = [
        set(re.findall(r"\w+", s.lower())) for s in re.split(r"(?<=\.)\s+|\n(?!Answer)", text)
    ]
    by_word: dict[str, list[set[str]]] = {}
    for piece in pieces:
        for word in piece:
            by_word.setdefault(word, []).append(piece)
    for fact in world.facts:
        hits = sum(fact.value.lower() in piece for piece in by_word[fact.subject.lower()])
        assert hits >= 15, (fact, hits)


# splits


def test_documents_have_the_promised_length(world, training):
    for documents in (
        training,
        list(world.documents("heldout")),
        list(world.documents("calibration")),
    ):
        lengths = [len(d.split()) for d in documents]
        assert min(lengths) >= 40 and max(lengths) <= 200


def test_heldout_calibration_and_training_documents_are_disjoint(world, training):
    heldout, calibration = set(world.documents("heldout")), set(world.documents("calibration"))
    assert len(heldout) == len(calibration) == 500
    assert not heldout & calibration and not (heldout | calibration) & set(training)


def test_heldout_scenes_never_occur_in_training(world, training):
    """Scenes are recognised by their telling sentence, which names the persons and things."""
    people, openers = "|".join((*lex.WOMEN, *lex.MEN)), "|".join(lex.OPENERS)

    def told(texts):
        found = set()
        for sentence in (s for text in texts for s in sentences(text.replace(USER, " "))):
            if re.search(r" because (he|she) ", sentence):
                found.add(
                    re.sub(
                        f"^.*?(?=({people}) )", "", re.sub(f"^({openers}) ", "", sentence), count=1
                    )
                )
        return found

    heldout, calibration, train = (
        told(t) for t in (world.documents("heldout"), world.documents("calibration"), training)
    )
    assert min(len(heldout), len(calibration)) > 100 and len(train) > 5000
    assert not heldout & train and not calibration & train and not heldout & calibration


def test_heldout_wordings_never_occur_in_training(world, training):
    """Statements that name their subject (so that the wording is the fact's own) are in one split
    only."""
    verbs = (
        "lives in",
        "works as",
        "likes to eat",
        "keeps",
        "owns",
        "is made of",
        "is known for",
        "was born in",
    )

    def stated(texts):
        text = re.sub(r"<\|\w+\|>|\n", ". ", "\n".join(texts))
        named = (
            s for s in sentences(text) if not re.search(r"\b([Hh]e|[Ss]he|[Ii]t)\b(?! is true)", s)
        )
        return {s for s in named if "?" not in s and any(verb in s for verb in verbs)}

    heldout, calibration, train = (
        stated(t) for t in (world.documents("heldout"), world.documents("calibration"), training)
    )
    assert min(len(heldout), len(calibration)) > 50 and len(train) > 700
    assert not heldout & train and not calibration & train and not heldout & calibration


def test_vocabulary_is_shared(world, training):
    known = set(re.findall(r"\w+", "\n".join(training)))
    assert set(re.findall(r"\w+", "\n".join(world.documents("heldout")))) <= known


def test_conversations_are_split(world):
    train = list(islice(world.conversations("train"), 20000))
    validation = list(world.conversations("validation"))
    assert len(validation) == len(set(validation)) == 200
    assert len({q for q, _ in train}) > 5000
    assert not {q for q, _ in validation} & {q for q, _ in train}


def test_unknown_split_is_refused(world):
    with pytest.raises(ValueError, match="heldout"):
        world.documents("test")
    with pytest.raises(ValueError, match="validation"):
        world.conversations("heldout")


# tasks


def test_task_sets_are_balanced(tasks):
    assert {name: len(questions) for name, questions in tasks.items()} == dict.fromkeys(
        ("tiny_facts", "tiny_pronouns", "tiny_next"), 400
    )
    for name, questions in tasks.items():
        choices = 2 if name == "tiny_pronouns" else 4
        assert all(len(set(q["choices"])) == choices for q in questions)
        assert set(Counter(q["answer"] for q in questions).values()) == {400 // choices}
        assert len({q["question"] for q in questions}) == 400


def test_answers_cannot_be_guessed_from_length_or_frequency(tasks):
    for name, questions in tasks.items():
        chance = 1 / len(questions[0]["choices"])
        uses = Counter(predicate(right_choice(q)) for q in questions)

        def frequency(q, choice, uses=uses):
            """How often the choice is right in all the other questions."""
            return uses[predicate(choice)] - (choice == right_choice(q))

        guesses = {
            "longest": lambda q, choice: len(choice),
            "shortest": lambda q, choice: -len(choice),
            "most frequent": frequency,
        }
        for guess, value in guesses.items():
            right = 0.0
            for q in questions:
                values = [value(q, choice) for choice in q["choices"]]
                best = max(values)
                right += (values[q["answer"]] == best) / values.count(best)  # ties are guessed
            assert right / len(questions) < chance + 0.1, (name, guess, right)


def right_choice(q: dict) -> str:
    return q["choices"][q["answer"]]


def predicate(choice: str) -> str:
    """A choice without its subject: "The jug broke." counts with "The cup broke."."""
    return re.sub(r"^(The \w+|She|He) ", "", choice)


def test_fact_answers_are_true_and_unique(world, tasks):
    values = {}
    for fact in world.facts:
        values.setdefault((fact.subject.lower(), fact.relation), set()).add(fact.value)
    for q in tasks["tiny_facts"]:
        asked = set(re.findall(r"\w+", q["question"].lower()))
        true = [
            v
            for (subject, relation), v in values.items()
            if relation == q["kind"] and subject in asked
        ]
        assert len(true) == 1 and [c for c in q["choices"] if c in true[0]] == [
            q["choices"][q["answer"]]
        ], q


def test_task_questions_never_occur_in_training(tasks, training):
    """Neither the fact questions' wordings nor the held-out combinations, in quizzes, stories or
    conversations."""
    text = "\n".join(training)
    asked = {
        line.removeprefix("Question: ")
        for line in text.split("\n")
        if line.startswith("Question: ")
    }
    asked |= {
        s.strip()
        for d in training
        for s in re.findall(re.escape(USER) + "(.*?)" + re.escape(ASSISTANT), d)
    }
    assert len(asked) > 5000
    for questions in tasks.values():
        assert not {q["question"] for q in questions} & asked
    for name in ("tiny_pronouns", "tiny_next"):
        for q in tasks[name]:
            told = q["question"].removesuffix(" What happened next?")
            assert f"{told} {q['choices'][q['answer']]}" not in text


def test_pronoun_answers_follow_from_gender_and_role(tasks):
    roles, kinds = Counter(), Counter()
    for q in tasks["tiny_pronouns"]:
        answer = q["choices"][q["answer"]]
        other = q["choices"][1 - q["answer"]]
        pronoun = re.search(r"because (he|she) ", q["question"]).group(1)
        assert pronoun == ("she" if answer in lex.WOMEN else "he")
        assert (q["kind"] == "cause") == ((answer in lex.WOMEN) == (other in lex.WOMEN))
        roles[q["question"].index(answer) < q["question"].index(other)] += 1
        kinds[q["kind"]] += 1
    assert roles[True] == roles[False]
    assert kinds["cause"] > 120


def test_next_answers_follow_the_rules(tasks):
    kinds = Counter(q["kind"] for q in tasks["tiny_next"])
    assert kinds["material"] + kinds["transfer"] == 168 and kinds["script"] == kinds["need"] == 80
    for q in tasks["tiny_next"]:
        answer = q["choices"][q["answer"]]
        if q["kind"] == "number":
            told = re.sub(f"^({'|'.join(lex.OPENERS)}) ", "", q["question"])
            numbers = [lex.NUMBERS.index(w) for w in told.split() if w in lex.NUMBERS]
            sign = -1 if re.search(r"lost|gave away|sold", q["question"]) else 1
            assert lex.NUMBERS[numbers[0] + sign * numbers[1]] in answer.split()
        if q["kind"] == "script":
            steps = next(s for s in SCRIPTS.values() if answer.split(" ", 1)[1][:-1] in s)
            place = steps.index(answer.split(" ", 1)[1][:-1])
            assert steps[place - 1] in q["question"] and steps[place - 2] in q["question"]


@pytest.mark.parametrize(
    ("event", "thing", "outcome"),
    [
        ("drop", "jug", "broke into pieces"),
        ("river", "key", "sank to the bottom"),
        ("river", "chair", "floated away"),
        ("fire", "letter", "burned to ash"),
        ("fire", "candle", "melted away"),
        ("rain", "hammer", "began to rust"),
        ("strike", "box", "split in two"),
    ],
)
def test_causes(event, thing, outcome):
    assert outcome_of(event, thing) == outcome


def test_transfer_pairs_never_occur_in_training(tasks, training):
    """The outcome of these pairs of event and thing can only be inferred."""
    marks = {
        "drop": "dropped the {}",
        "river": "let the {} fall",
        "fire": "left the {} too near",
        "rain": "left the {} out",
        "strike": "hit the {} hard",
    }
    text = "\n".join(training)
    unseen = [(e, t) for e in marks for t in lex.THINGS if is_transfer(e, t)]
    assert 8 <= len(unseen) <= 30
    assert not [pair for pair in unseen if marks[pair[0]].format(pair[1]) in text]
    assert sum(q["kind"] == "transfer" for q in tasks["tiny_next"]) >= 10


def test_task_files_are_lm_eval_tasks(tasks):
    for name, questions in tasks.items():
        task = yaml.safe_load((FOLDER / f"{name}.yaml").read_text())
        assert task["task"] == name and task["output_type"] == "multiple_choice"
        data = task["dataset_kwargs"]["data_files"]["test"]
        assert [json.loads(line) for line in (FOLDER / data).read_text().splitlines()] == questions


# tokenizer


@pytest.fixture(scope="module")
def tokenizer(world):
    return train_tokenizer(world, vocab_size=1536, seed=0)


def test_tokenizer_is_deterministic_and_reloads(world, tokenizer, tmp_path):
    from transformers import AutoTokenizer

    save_tokenizer(tokenizer, tmp_path)
    again = train_tokenizer(world, vocab_size=1536, seed=0)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert (
        json.loads((tmp_path / "tokenizer_config.json").read_text())["tokenizer_class"]
        == "PreTrainedTokenizerFast"
    )
    assert len(tokenizer) == 1536
    for other in (again, loaded):
        assert other.backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str()
    for name in (
        "bos_token_id",
        "eos_token_id",
        "pad_token_id",
        "chat_template",
        "model_max_length",
    ):
        assert getattr(loaded, name) == getattr(tokenizer, name) is not None
    text = "Ada lives in Kelso.\n\nQuestion: Wörter, 12 × 3 = ?\nAnswer: naïve 🙂"
    assert loaded.decode(loaded(text)["input_ids"]) == text


def test_words_of_the_world_are_single_tokens(tokenizer):
    things = (
        *lex.WOMEN,
        *lex.MEN,
        *lex.TOWNS,
        *lex.JOBS,
        *lex.FOODS,
        *lex.MONTHS,
        *lex.BELONGINGS,
        *lex.THINGS,
    )
    several = [w for w in things if len(tokenizer(f" {w}")["input_ids"]) > 1]
    assert len(several) <= 0.05 * len(things), several


def test_chat_format(world, tokenizer):
    """Template, mask and training documents agree; the answer with its end mark is what is
    learned."""
    ((question, answer),) = islice(world.conversations("train"), 1)
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    assert text == f"{USER} {question}{ASSISTANT} {answer}{END}"
    full = tokenizer.apply_chat_template(
        messages, return_dict=True, return_assistant_tokens_mask=True
    )
    prompt = tokenizer.apply_chat_template(
        messages[:1], add_generation_prompt=True, return_dict=True
    )["input_ids"]
    learned = [t for t, on in zip(full["input_ids"], full["assistant_masks"], strict=True) if on]
    assert full["input_ids"] == prompt + learned
    assert tokenizer.decode(learned) == f" {answer}{END}" and learned[-1] == tokenizer.eos_token_id


def test_share_of_conversations_in_training(training):
    share = sum(d.startswith(USER) for d in training) / len(training)
    assert 0.08 < share < 0.25


def test_relations_have_several_wordings():
    for relation in PERSON_RELATIONS.values():
        assert len(relation.statements) >= 5 and len(set(relation.questions)) >= 5

"""Parts of distillation: students from layers, matched blocks, generated answers."""

from __future__ import annotations

import itertools
import json
import random
import shutil
from pathlib import Path

import pytest
import torch

from slim.checkpoints.checkpoint import open_checkpoint
from slim.checkpoints.source import EMBEDDED, Source
from slim.checkpoints.tokenizer import load_tokenizer
from slim.checkpoints.writer import write_blocks
from slim.core.errors import SlimError
from slim.data.examples import Pairs, TinyChat, TinyText
from slim.data.packing import IGNORE
from slim.distillation import teacher as teaching
from slim.distillation.layer_map import Matching, hidden_targets, nearest_blocks
from slim.distillation.questions import Generation
from slim.distillation.stage import Full, Lora
from slim.distillation.student import Layers, evenly_spaced
from slim.loading.load_model import load_model
from tests.conftest import build_small
from tests.support.distilling import NARROW, by
from tests.support.folders import rename_tensors
from tests.support.stages import run

# What teaches


def test_what_is_read_otherwise_of_a_teacher_is_said(small_llama, tmp_path, monkeypatch, capsys):
    folder = shutil.copytree(small_llama, tmp_path / "wrapped")
    rename_tensors(folder, lambda name: f"module.{name}")
    monkeypatch.setattr(teaching, "load_model", lambda *_: torch.nn.Linear(1, 1))
    teaching.Teacher(base=None, name=str(folder)).load("cpu")
    said = " ".join(capsys.readouterr().err.split())
    assert "teacher wrapped" in said and "'module.model.embed_tokens.weight' is read as" in said


@pytest.mark.parametrize("content", ['{"model": 3}', "[1]", "{", '{"added_tokens": [1]}'])
def test_a_teachers_tokenizer_that_cannot_be_read_is_an_error(small_llama, tmp_path, content):
    folder = shutil.copytree(small_llama, tmp_path / "teacher")
    (folder / "tokenizer.json").write_text(content)
    with pytest.raises(SlimError, match="tokenizer"):
        teaching.same_vocabulary(Path(small_llama), folder)


# A student from layers


def test_evenly_spaced_blocks_are_those_of_the_studies():
    assert evenly_spaced(32, 11) == [0, 3, 6, 9, 12, 16, 19, 22, 25, 28, 31]
    assert (
        evenly_spaced(8, 1) == [0]
        and evenly_spaced(5, 5) == [0, 1, 2, 3, 4]
        and evenly_spaced(8, 2) == [0, 7]
    )
    assert Layers(every=2).kept(7) == [0, 2, 4, 6] and Layers().kept(8) == [0, 2, 5, 7]


def test_a_student_of_chosen_layers_computes_what_these_layers_do(tmp_path):
    source = build_small(
        "qwen2", tmp_path / "source", layer_types=["full_attention", "sliding_attention"] * 3, sliding_window=7,
        use_sliding_window=True,
    )  # fmt: skip
    facts = run(Layers(keep=[0, 3, 4]), source, tmp_path / "out")
    assert facts == {"kept_blocks": [0, 3, 4], "removed_blocks": [1, 2, 5]}
    assert open_checkpoint(tmp_path / "out").config["layer_types"] == [
        "full_attention",
        "sliding_attention",
        "full_attention",
    ]
    model, whole = load_model(tmp_path / "out"), load_model(source)
    whole.model.layers = torch.nn.ModuleList(whole.model.layers[block] for block in (0, 3, 4))
    for number, block in enumerate(whole.model.layers):
        block.self_attn.layer_idx = number
    whole.config.num_hidden_layers = 3
    whole.config.layer_types = ["full_attention", "sliding_attention", "full_attention"]
    tokens = torch.arange(20)[None]
    assert torch.equal(model(input_ids=tokens).logits, whole(input_ids=tokens).logits)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(keep=4), "keep=4 drops nothing"),
        (dict(keep=[0, 4]), "names block 4: .* 0 to 3"),
        (dict(keep=[0, 0]), "twice"),
        (dict(keep=[]), "keeps nothing"),
        (dict(keep=0), "keep=0"),
        (dict(keep=2, every=2), "both choose"),
        (dict(every=1), "every=1"),
    ],
)
def test_wrong_layers_are_refused(teacher, settings, message):
    with pytest.raises(SlimError, match=message):
        Layers(**settings).check(open_checkpoint(teacher).spec)


# Matching blocks


def test_the_nearest_blocks_are_the_best_of_all_ascending_choices():
    chance = random.Random(0)
    for _ in range(50):
        students, teachers = chance.choice([(1, 1), (1, 4), (2, 3), (3, 3), (3, 6), (4, 7)])
        distances = [[chance.random() for _ in range(teachers)] for _ in range(students)]
        total = lambda chosen: sum(row[block] for row, block in zip(distances, chosen, strict=True))  # noqa: B023, E731
        best = min(itertools.combinations(range(teachers), students), key=total)
        assert nearest_blocks(distances) == list(best)
    assert hidden_targets([0, 1, 4, 6], 8) == [0, 3, 5, 7]


@pytest.mark.parametrize("heads", [4, 2])
def test_matching_equals_the_formulas(teacher, student, heads, tmp_path):
    """Hidden states and attention maps, token by token, for a student as wide as the teacher and a
    narrower one."""
    from slim.distillation.matching import LayerMatching, projector
    from slim.training.forward import body_outputs

    if heads == 2:
        narrow = {**NARROW, "hidden_size": 16, "num_attention_heads": 2, "head_dim": 16}
        student = build_small("llama", tmp_path / "narrow", num_hidden_layers=2, **narrow)
    found = TinyChat().windows("train", load_tokenizer(teacher), 64, 256)
    batch = {name: getattr(found, name).long()[:2] for name in ("tokens", "labels", "positions")}
    models = [load_model(folder, "float32") for folder in (student, teacher)]
    for model in models:
        model.set_attn_implementation("eager")
    between = projector(*models)
    assert (between is None) == (heads == 4)
    matching = LayerMatching(Matching(hidden=0.5, attention=2.0), [0, 2], 4, between)
    ours, theirs = (
        body_outputs(model, batch["tokens"], batch["positions"], **matching.outputs)
        for model in models
    )
    value = matching(ours, theirs, batch["labels"])

    expected = 0.0
    for row, place in (batch["labels"][:, 1:] != IGNORE).nonzero().tolist():
        for block, same, target in ((0, 0, 1), (1, 2, 3)):
            h_s, h_t = (
                ours.hidden_states[block + 1][row, place],
                theirs.hidden_states[target + 1][row, place],
            )
            h_s = h_s if between is None else between.weight @ h_s
            expected += 0.5 / 2 * (((h_s - h_t) ** 2).sum() / (h_t**2).sum()).item()
            a_s, a_t = ours.attentions[block][row, :, place], theirs.attentions[same][row, :, place]
            if heads == 2:
                a_s, a_t = a_s.mean(0)[None], a_t.mean(0)[None]
            for q, p in zip(a_s.tolist(), a_t.tolist(), strict=True):
                divergence = sum(
                    y * torch.tensor(y / x).log().item() for x, y in zip(q, p, strict=True) if y > 0
                )
                expected += 2.0 / 2 * divergence / len(a_s)
    assert value.item() == pytest.approx(expected, rel=1e-4)
    value.backward()
    assert models[0].model.layers[1].self_attn.q_proj.weight.grad.abs().sum() > 0


def test_a_projector_begins_at_the_embeddings_best_map(teacher, tmp_path):
    from slim.distillation.matching import projector

    narrow = load_model(
        build_small(
            "llama", tmp_path / "narrow", num_hidden_layers=1, **{**NARROW, "hidden_size": 16}
        )
    )
    wide = load_model(teacher)
    with torch.no_grad():  # embeddings that a matrix maps onto each other exactly
        matrix = torch.randn(16, 32)
        wide.get_input_embeddings().weight.copy_(narrow.get_input_embeddings().weight @ matrix)
    torch.testing.assert_close(projector(narrow, wide).weight, matrix.T, rtol=1e-3, atol=1e-3)


def test_the_blocks_a_student_was_made_from_are_found(teacher, student, tmp_path):
    facts = run(Lora(**by(teacher, match=Matching(hidden=1.0))), student, tmp_path / "one")
    assert facts["matched_blocks"] == [0, 2]
    again = run(
        Full(**by(teacher, match=Matching(attention=1.0))), tmp_path / "one", tmp_path / "two"
    )
    assert again["matched_blocks"] == [0, 2]  # after training, too


def test_blocks_that_cannot_be_compared_are_evenly_spaced(teacher, tmp_path):
    from slim.distillation.matching import nearest_map

    # no parameter of one shape
    wide = build_small("llama", tmp_path / "wide", num_hidden_layers=2, vocab_size=1536)
    assert nearest_map(load_model(wide).model.layers, load_model(teacher).model.layers) == [0, 3]
    # norms only, and all of them are ones
    narrow = {**NARROW, "intermediate_size": 32, "num_hidden_layers": 3}
    narrow = {**narrow, "num_attention_heads": 2, "num_key_value_heads": 1}
    model, whole = (
        load_model(build_small("llama", tmp_path / "narrow", **narrow)),
        load_model(teacher),
    )
    assert nearest_map(model.model.layers, whole.model.layers) == [0, 2, 3]
    with torch.no_grad():
        for number, block in enumerate(whole.model.layers):
            block.input_layernorm.weight.fill_(number + 1.0)
        for number, block in zip((0, 1, 3), model.model.layers, strict=True):
            block.input_layernorm.weight.fill_(number + 1.1)
    assert nearest_map(model.model.layers, whole.model.layers) == [0, 1, 3]


def test_matching_draws_hidden_states_to_the_teachers(teacher, student, tmp_path, monkeypatch):
    from slim.distillation import tasks

    made = []
    honest = tasks.LayerMatching
    monkeypatch.setattr(tasks, "LayerMatching", lambda *a: made.append(honest(*a)) or made[-1])
    values = []
    keep = honest.forward
    monkeypatch.setattr(
        honest, "forward", lambda self, *a: values.append(keep(self, *a)) or values[-1]
    )
    run(
        Full(**by(teacher, steps=20, match=Matching(hidden=1.0), hard_weight=0.0)),
        student,
        tmp_path / "out",
    )
    assert values[-1] < 0.6 * values[0]


# Answers of one's own


def test_generated_answers_are_those_of_a_plain_loop(teacher):
    from slim.distillation.generate import generate

    model = load_model(teacher, "float32").train()
    prompts = [[5, 9, 30], [7], [100, 101, 102, 103, 104]]
    found = generate(model, prompts, 6, {0}, 0.0)
    assert model.training
    model.eval()
    for prompt, answer in zip(prompts, found, strict=True):
        tokens = list(prompt)
        for _ in range(6):
            tokens.append(model(input_ids=torch.tensor([tokens])).logits[0, -1].argmax().item())
            if tokens[-1] == 0:
                break
        assert answer == tokens[len(prompt) :]
    ends = {answer[2] for answer in found}
    assert all(
        len(set(answer[:-1]) & ends) == 0 for answer in generate(model, prompts, 6, ends, 0.0)
    )


def test_answers_are_drawn_by_the_softened_distribution(teacher):
    from slim.distillation.generate import generate

    model = load_model(teacher, "float32")
    torch.manual_seed(0)
    first = [answer[0] for answer in generate(model, [[5, 9, 30]] * 4000, 1, {0}, 0.3)]
    p = (model(input_ids=torch.tensor([[5, 9, 30]])).logits[0, -1] / 0.3).softmax(-1)
    for token in p.topk(4).indices.tolist():
        share = first.count(token) / len(first)
        assert share == pytest.approx(p[token].item(), abs=4 * (p[token].item() / 4000) ** 0.5)


def test_micro_batches_of_answers_share_the_steps_denominator():
    from slim.data.packing import Example, separate
    from slim.distillation.on_policy import AnsweredBatches

    asked = []

    def answer(questions, step):
        asked.append((step, questions))
        return [Example([*q, *[9] * q[0]], [*[IGNORE] * len(q), *[9] * q[0]]) for q in questions]

    questions = [[n % 5 + 1, 7] for n in range(12)]
    batches = AnsweredBatches(questions, 4, 2, answer, lambda examples: separate(examples, 8, 0))
    assert len(batches) == 6
    for number in range(6):
        batch = batches[number]
        own = questions[number * 2 : number * 2 + 2]
        assert int((batch["labels"][:, 1:] != IGNORE).sum()) == sum(q[0] for q in own)
        step = questions[number // 2 * 4 : number // 2 * 4 + 4]
        assert batch["loss_tokens"] == sum(q[0] for q in step)
    assert asked == [(step, questions[step * 4 : step * 4 + 4]) for step in range(3)]


@pytest.mark.parametrize("answers", ["student", "teacher", "both"])
def test_questions_without_answers_are_enough(teacher, student, tmp_path, answers):
    path = tmp_path / "questions.jsonl"
    path.write_text("".join(json.dumps({"ask": f"Where is thing {n}?"}) + "\n" for n in range(80)))
    data = Pairs(text=str(path), prompt="ask", answer=None, validation_fraction=0.2)
    settings = dict(
        answers=answers,
        hard_weight=0.0,
        data=data,
        generation=Generation(questions=8, new_tokens=12),
    )
    facts = run(Full(**by(teacher, **settings)), student, tmp_path / "out")
    assert facts["generated"]["answers"] == 4 * 8 and facts["questions"] < 80
    assert facts["generated"]["tokens"] > 4 * 8 * 5 and "teacher_validation_loss" in facts
    with pytest.raises(SlimError, match="has no answers .data.answer=null."):
        run(Lora(**by(teacher, data=data)), student, tmp_path / "no")
    with pytest.raises(SlimError, match="has no questions"):
        run(Lora(**by(teacher, **{**settings, "data": TinyText()})), student, tmp_path / "text")


def test_who_answers_is_who_the_settings_say(teacher, student, tmp_path, monkeypatch):
    from slim.distillation import on_policy

    honest, asked = on_policy.generate, []

    def watch(model, *rest):
        asked.append(
            (sum(p.numel() for p in model.parameters() if not p.requires_grad) > 0, rest[-1])
        )
        return honest(model, *rest)

    monkeypatch.setattr(on_policy, "generate", watch)
    settings = dict(
        data=TinyChat(), hard_weight=0.0, steps=12, validate_every=12, validation_tokens=128
    )
    settings["generation"] = Generation(questions=2, new_tokens=6, temperature=0.7)
    shares = {}
    for answers in ("student", "teacher", "both"):
        asked.clear()
        run(Full(**by(teacher, answers=answers, **settings)), student, tmp_path / answers)
        teachers = [frozen for frozen, temperature in asked if temperature == 0.7]
        assert len(teachers) == 12 and all(
            frozen for frozen, temperature in asked if temperature == 0
        )
        shares[answers] = sum(teachers)
    assert shares["student"] == 0 and shares["teacher"] == 12 and 0 < shares["both"] < 12


# What it is for (minutes)


@pytest.fixture(scope="module")
def tiny_pruned(tmp_path_factory) -> Path:
    """The embedded model without the blocks that Taylor scores find least needed."""
    folder = tmp_path_factory.mktemp("tiny") / "pruned"
    folder.mkdir()
    write_blocks(open_checkpoint(EMBEDDED["tiny"]), folder, [0, 4, 5, 6, 7])
    return folder


@pytest.mark.slow
def test_distilling_heals_further_than_tuning_at_equal_steps(tiny_pruned, tmp_path):
    from slim.evaluation.perplexity import Perplexity
    from slim.training import tune

    def perplexity(folder: Path) -> float:
        found = Perplexity(text="tiny:heldout", window=256).measure(
            load_model(folder), load_tokenizer(folder), 512
        )
        return found["metrics"]["perplexity"]

    run(tune.Lora(data=TinyText()), tiny_pruned, tmp_path / "tuned")
    run(Lora(data=TinyText(), base=Source("tiny")), tiny_pruned, tmp_path / "distilled")
    folders = (EMBEDDED["tiny"], tmp_path / "distilled", tmp_path / "tuned", tiny_pruned)
    source, distilled, tuned, start = (perplexity(folder) for folder in folders)
    assert source < distilled < tuned - 0.01 < start - 1


@pytest.mark.slow
@pytest.mark.parametrize("answers", ["student", "teacher"])
def test_facts_are_learnt_from_questions_alone(tmp_path, answers):
    from slim.evaluation.tasks import Tasks

    start = tmp_path / "pruned"
    start.mkdir()
    write_blocks(open_checkpoint(EMBEDDED["tiny"]), start, [0, 5, 6, 7])

    class Questions(TinyChat):
        """Conversations whose answers nobody may ask for."""

        def pairs(self, part):
            return ((question, pytest.fail("an answer was read")) for question in ())

        def questions(self, part):
            return (question for question, _ in super().pairs(part))

    settings = dict(answers=answers, hard_weight=0.0, loss="symmetric", steps=150)
    stage = Lora(
        data=Questions(),
        base=Source("tiny"),
        generation=Generation(questions=32, new_tokens=24),
        **settings,
    )
    run(stage, start, tmp_path / "out")
    before, after = (
        Tasks(names=["tiny_facts"], batch_size=64).measure(
            load_model(folder), load_tokenizer(folder), 512
        )["metrics"]
        for folder in (start, tmp_path / "out")
    )
    assert after["tiny_facts/acc"] > before["tiny_facts/acc"] + 0.05

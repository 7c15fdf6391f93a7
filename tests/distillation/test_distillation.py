"""Distillation as a stage: against a loop written out, the teacher's role in names and checks,
layers, matching, answers."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from slim.checkpoints.checkpoint import checksums, open_checkpoint
from slim.checkpoints.source import Source
from slim.checkpoints.stage import Context
from slim.checkpoints.tokenizer import load_tokenizer
from slim.checkpoints.untrained import Untrained
from slim.core.errors import SlimError
from slim.data.examples import TinyChat, TinyText
from slim.data.packing import IGNORE
from slim.distillation.layer_map import Matching
from slim.distillation.questions import Generation
from slim.distillation.stage import Full, Lora, distill
from slim.loading.load_model import load_model
from slim.quantization.storage import weight_bytes
from slim.training.schedule import learning_rate_factor
from tests.conftest import ROOT, build_small
from tests.support.distilling import NARROW, QUICK, by, weights
from tests.support.stages import run

# The objective


def test_training_equals_a_plain_loop(teacher, student, tmp_path):
    """Three steps of AdamW on the formula over whole logits; the teacher is softened, its share
    weighted by T squared."""
    from slim.training.batches import window_order

    settings = dict(
        steps=3, validate_every=3, data=TinyChat(), learning_rate=0.003, warmup=0.0, seed=5, clip=0
    )
    run(
        Full(**by(teacher, temperature=2.0, hard_weight=0.3, **settings)),
        student,
        tmp_path / "ours",
    )

    model, guide = load_model(student, "float32").train(), load_model(teacher, "float32")
    found = TinyChat().windows("train", load_tokenizer(student), 64, 3 * 256)
    moments = {
        name: (torch.zeros_like(p), torch.zeros_like(p)) for name, p in model.named_parameters()
    }
    for step, chosen in enumerate(window_order(len(found), 12, seed=5).view(3, 4)):
        total, count = torch.zeros(()), 0
        for row in chosen.tolist():
            tokens, labels, positions = (
                x[row].long() for x in (found.tokens, found.labels, found.positions)
            )
            inputs = dict(input_ids=tokens[None], position_ids=positions[None], use_cache=False)
            with torch.no_grad():
                wise = guide(**inputs).logits[0, :-1]
            logits = model(**inputs).logits[0, :-1]
            for place in (labels[1:] != IGNORE).nonzero().flatten().tolist():
                p, q = (x[place].div(2.0).softmax(-1) for x in (wise, logits))
                hard = -logits[place].softmax(-1)[labels[place + 1]].log()
                total = total + 0.7 * 4 * (p * (p.log() - q.log())).sum() + 0.3 * hard
                count += 1
        model.zero_grad()
        (total / count).backward()
        rate = 0.003 * learning_rate_factor(step, 3, "cosine", 0)
        with torch.no_grad():
            for name, p in model.named_parameters():
                first, second = moments[name]
                first.mul_(0.9).add_(p.grad, alpha=0.1)
                second.mul_(0.999).add_(p.grad**2, alpha=0.001)
                p -= (
                    rate
                    * (first / (1 - 0.9 ** (step + 1)))
                    / ((second / (1 - 0.999 ** (step + 1))).sqrt() + 1e-8)
                )
    ours = weights(tmp_path / "ours")
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(ours[name], parameter, rtol=1e-3, atol=2e-5)


@pytest.mark.parametrize("kind", [Lora, Full])
def test_parts_of_a_step_and_mixed_precision_give_the_same(teacher, student, tmp_path, kind):
    from slim.training.trainer_settings import TrainerSettings

    settings = by(teacher, data=TinyChat(), steps=2)
    changes = {
        "one": {},
        "four": {"accumulation": 4},
        "half": {"trainer": TrainerSettings(precision="bf16-mixed")},
    }
    losses = {}
    for name, change in changes.items():
        losses[name] = run(kind(**settings, **change), student, tmp_path / name)[
            "validation_loss_trained"
        ]
    assert losses["one"] == pytest.approx(losses["four"], rel=1e-5)
    assert losses["one"] != losses["half"] and losses["one"] == pytest.approx(
        losses["half"], rel=0.01
    )
    one, four = weights(tmp_path / "one"), weights(tmp_path / "four")
    for name in one:
        torch.testing.assert_close(one[name], four[name], rtol=1e-3, atol=2e-4)


def test_a_teacher_alone_pulls_the_student_to_itself(teacher, student, tmp_path):
    """Without hard labels, the distance from the teacher falls by much; the teacher's own weights
    stay as they are."""
    from slim.distillation.losses import forward_kl, softened

    before = checksums(teacher)
    tokens = TinyText().windows("validation", load_tokenizer(student), 64, 512).tokens.long()
    stage = Full(**by(teacher, steps=40, validate_every=40, hard_weight=0.0, learning_rate=0.005))
    from slim.training import fit

    outcome = {}
    honest = fit.fit

    def keep_last(learner, *rest):
        outcome["model"] = learner.model
        return honest(learner, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fit, "fit", keep_last)
        run(stage, student, tmp_path / "out")
    with torch.no_grad():
        wise, old, new = (
            softened(model(input_ids=tokens).logits, 1.0).flatten(0, 1)
            for model in (load_model(teacher), load_model(student), outcome["model"].eval())
        )
    assert forward_kl(wise, new).mean() < 0.7 * forward_kl(wise, old).mean()
    assert checksums(teacher) == before


def test_the_teacher_is_measured_first_and_a_poor_one_is_said_loudly(
    teacher, student, tmp_path, capfd
):
    facts = run(Lora(**by(teacher)), student, tmp_path / "poor")
    said = " ".join(capfd.readouterr().err.split())
    held_out = TinyText().windows("validation", load_tokenizer(student), 64, 512).tokens.long()
    with torch.no_grad():
        logits = load_model(teacher)(input_ids=held_out).logits[:, :-1]
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), held_out[:, 1:].flatten()).item()
    assert facts["teacher_validation_loss"] == pytest.approx(loss, rel=1e-5)
    assert f"teacher {loss:.4f}, student {facts['validation_loss_before']:.4f}" in said
    poor = facts["teacher_validation_loss"] >= facts["validation_loss_before"]
    assert ("no better than the student" in said) == poor
    # the other way round it must be the opposite
    run(Lora(**by(student)), teacher, tmp_path / "other")
    assert ("no better than the student" in " ".join(capfd.readouterr().err.split())) != poor


def test_the_teacher_has_no_dropout_and_the_student_is_in_training_mode(
    teacher, student, tmp_path, monkeypatch
):
    from slim.distillation.objective import TokenDistillation

    seen = []
    honest = TokenDistillation.forward

    def look(self, model, batch):
        seen.append((model.training, any(module.training for module in self.teacher.modules())))
        return honest(self, model, batch)

    monkeypatch.setattr(TokenDistillation, "forward", look)
    run(Lora(**by(teacher)), student, tmp_path / "out")
    assert seen == [(True, False)] * 4


def test_the_same_call_twice_gives_identical_weights(teacher, student, tmp_path):
    for name in ("one", "two"):
        torch.manual_seed(hash(name) % 1000)
        run(Lora(**by(teacher, dropout=0.1)), student, tmp_path / name)
    assert checksums(tmp_path / "one") == checksums(tmp_path / "two")


def test_a_loss_that_is_not_finite_keeps_the_last_good_state(
    teacher, student, tmp_path, monkeypatch
):
    from slim.distillation.objective import TokenDistillation

    honest, calls = TokenDistillation.forward, iter(range(100))
    monkeypatch.setattr(
        TokenDistillation,
        "forward",
        lambda *a: honest(*a) * (float("nan") if next(calls) == 3 else 1),
    )
    facts = run(Full(**by(teacher, steps=6)), student, tmp_path / "out")
    assert (
        facts["stopped"].startswith("The loss is nan at step 4, in windows ")
        and facts["best_step"] == 2
    )
    assert all(tensor.isfinite().all() for tensor in weights(tmp_path / "out").values())


# The teacher in names, checks and the plan


def test_the_teacher_is_part_of_the_name_by_its_content(teacher, student, tmp_path):
    import shutil

    stage = Lora(**by(teacher))
    copy = tmp_path / "elsewhere"
    shutil.copytree(teacher, copy)
    assert (
        Lora(**by(copy)).cache_key()
        == stage.cache_key()
        == Lora(**by(student, model=str(teacher))).cache_key()
    )
    for other in (
        by(student),
        by(teacher, temperature=3.0),
        by(teacher, loss="reverse"),
        by(teacher, cache=True),
    ):
        assert Lora(**other).cache_key() != stage.cache_key()
    unused = by(
        teacher,
        skew=0.5,
        beta=0.1,
        top_k=5,
        generation=Generation(questions=3),
        match=Matching(layers=[1]),
    )
    assert Lora(**unused).cache_key() == stage.cache_key()
    assert stage.cache_key() == json.loads(json.dumps(stage.cache_key()))


def other_words(source: Path, folder: Path) -> Path:
    """A copy of a checkpoint with as many tokens, two of which have changed places."""
    import shutil

    shutil.copytree(source, folder)
    content = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    words = content["model"]["vocab"]
    one, other = (token for token, number in words.items() if number in (700, 701))
    words[one], words[other] = words[other], words[one]
    (folder / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    return folder


def test_another_vocabulary_of_the_same_size_is_refused(teacher, student, tmp_path):
    stage = Lora(**by(student, model=str(other_words(teacher, tmp_path / "words"))))
    with pytest.raises(
        SlimError, match="(?s)words has another vocabulary .*teacher.loss=forward.*use teacher=dskd"
    ):
        stage.check(open_checkpoint(student).spec)
    stage.base = None  # not to be found before the work: found when it begins
    (tmp_path / "out").mkdir()
    with pytest.raises(SlimError, match="another vocabulary"):
        stage.run(student, tmp_path / "out", Context())
    Lora(**by(student, model=str(tmp_path / "words"), method="dskd")).check(
        open_checkpoint(student).spec
    )


def test_a_vocabulary_padded_to_another_size_will_do(teacher, tmp_path):
    padded = build_small(
        "llama", tmp_path / "padded", num_hidden_layers=1, **{**NARROW, "vocab_size": 1600}
    )
    facts = run(Lora(**by(teacher)), padded, tmp_path / "out")
    assert facts["validation_loss_after"] < facts["validation_loss_before"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(loss="foward"), "teacher.loss=foward: .*Did you mean forward"),
        (dict(temperature=0), "teacher.temperature=0"),
        (dict(model=None), "teacher.model is missing"),
        (dict(hard_weight=2), "teacher.hard_weight=2"),
        (dict(skew=0), "teacher.skew=0"),
        (dict(quant="int4"), "teacher.quant=int4: .*nf4"),
        (dict(steps=0), "teacher.steps=0"),
        (dict(r=0), "teacher.r=0"),
        (dict(top_k=0), "teacher.top_k=0"),
        (dict(cache=True, match=Matching(hidden=1)), "teacher.cache keeps probabilities only"),
        (dict(method="dskd", cache=True), "teacher.method=dskd works without"),
        (dict(answers="pupil"), "teacher.answers=pupil"),
        (dict(answers="student"), "set teacher.hard_weight=0"),
        (dict(answers="teacher", cache=True), "set teacher.cache=false"),
        (
            dict(answers="teacher", accumulation=3, batch_tokens=768),
            "questions=32 is no multiple .* Use for example .*=33",
        ),
        (dict(answers="teacher", window=64, batch_tokens=64), "new_tokens=64 leaves no room"),
    ],
)
def test_wrong_settings_are_refused(settings, message):
    with pytest.raises(SlimError, match=message):
        Lora(**{"data": TinyText(), "base": Source("tiny"), **settings})


def test_a_teacher_that_cannot_teach_is_refused(teacher, student):
    spec = open_checkpoint(student).spec
    with pytest.raises(SlimError, match="random weights"):
        Lora(**{**by(teacher), "base": Untrained()}).check(spec)
    with pytest.raises(SlimError, match="There is no folder or file /not/there"):
        Lora(**by(teacher, model="/not/there")).check(spec)
    with pytest.raises(SlimError, match="has 2 blocks, fewer than the 4"):
        Lora(**by(student, match=Matching(hidden=1))).check(open_checkpoint(teacher).spec)
    with pytest.raises(SlimError, match="names 3 blocks, one for each .* 2"):
        Lora(**by(teacher, match=Matching(hidden=1, layers=[0, 1, 2]))).check(spec)
    with pytest.raises(SlimError, match="names block 7: .* has blocks 0 to 3"):
        Lora(**by(teacher, match=Matching(hidden=1, layers=[0, 7]))).check(spec)
    with pytest.raises(SlimError, match="not ascending"):
        Matching(layers=[2, 1])
    with pytest.raises(SlimError, match="teacher.train=both: must be"):
        distill(train="both", data=TinyText(), base=Source("tiny"))


def test_the_plan_counts_the_teachers_memory(teacher, student):
    spec = open_checkpoint(student).spec
    large, small = (Lora(**by(folder)).peak_bytes(spec, "cpu") for folder in (teacher, student))
    assert large - small == weight_bytes(open_checkpoint(teacher).spec, "float32") - weight_bytes(
        spec, "float32"
    )
    assert large > Lora(**by(teacher, accumulation=4)).peak_bytes(spec, "cpu")


def test_settings_are_checked_without_heavy_imports():
    code = (
        "import sys; from slim.distillation.stage import Lora, distill; from slim.data.examples import TinyText;"
        "from slim.checkpoints.source import Source; stage = distill(data=TinyText(), base=Source('tiny'));"
        "stage.check(stage.base.describe());"
        "heavy = {'torch', 'transformers', 'lightning', 'peft', 'datasets', 'bitsandbytes'} & set(sys.modules);"
        "sys.exit(str(heavy) if heavy else 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60, cwd=ROOT)


def test_methods_import_without_lightning_and_peft():
    code = (
        "import sys; sys.modules.update(dict.fromkeys(('lightning', 'peft', 'bitsandbytes', 'hydra', 'mlflow')));"
        "from slim.distillation import losses, chunks, cache, objective, matching, dual_space, pairing, generate"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60, cwd=ROOT)


# In a chain


def test_a_chain_distils_after_tuning_and_uses_the_cached_result(tmp_path):
    from slim.chain.build import build_pipeline
    from slim.chain.compose import compose

    options = [
        "model=tiny",
        "pruner=magnitude",
        "tuner=lora",
        "teacher=base",
        "quant=none",
        "eval=none",
    ]
    options += [f"store={tmp_path / 'runs'}"]
    for group in ("tuner", "teacher"):
        options += [
            f"{group}.{name}={value}" for name, value in dict(QUICK, learning_rate=1e-3).items()
        ]
    first = build_pipeline(compose("compress", options)).run()
    assert [result.label for result in first] == [
        "tiny",
        "prune magnitude",
        "tune lora",
        "distill lora",
    ]
    last = first[-1].metadata
    assert (
        last["teacher_validation_loss"]
        < last["validation_loss_after"]
        < last["validation_loss_before"]
    )
    assert all(result.cached for result in build_pipeline(compose("compress", options)).run())
    instead = build_pipeline(compose("compress", [*options, "teacher.stage=tune", "tuner=full"]))
    assert [type(stage).__name__ for stage in instead.stages] == ["Magnitude", "Full"]
    assert instead.stages[1].kind == "distill" and instead.stages[1].steps == 4
    with pytest.raises(SlimError, match="needs tuner=lora or tuner=full"):
        build_pipeline(compose("compress", ["teacher=base", "teacher.stage=tune"]))


def test_a_quantised_teacher_teaches(student, tmp_path):
    """Quantised for teaching, or a checkpoint that was quantised before: the same figures."""
    pytest.importorskip("bitsandbytes")
    from slim.quantization.methods.bitsandbytes import NF4

    teacher = build_small("llama", tmp_path / "teacher", num_hidden_layers=2, vocab_size=1536)
    stages = {"plain": Lora(**by(teacher)), "packed": Lora(**by(teacher, quant="nf4"))}
    run(NF4(), teacher, tmp_path / "nf4")
    stages["before"] = Lora(**by(tmp_path / "nf4"))
    assert len({stage.cache_key()["teacher"] + str(stage.quant) for stage in stages.values()}) == 3
    assert stages["packed"].teacher.bytes("cpu") < 0.9 * stages["plain"].teacher.bytes("cpu")
    losses = {
        name: run(stage, student, tmp_path / name)["teacher_validation_loss"]
        for name, stage in stages.items()
    }
    assert losses["packed"] == losses["before"] != losses["plain"]
    assert losses["packed"] == pytest.approx(losses["plain"], rel=0.02)
    with pytest.raises(SlimError, match="is already quantized"):
        Lora(**by(tmp_path / "nf4", quant="nf4")).check(open_checkpoint(student).spec)


def test_a_teacher_that_does_not_fit_is_said_by_the_plan(teacher, student, tmp_path, monkeypatch):
    from slim.chain import pipeline
    from slim.checkpoints.store import Store

    stage = Lora(**by(teacher))
    chain = pipeline.Pipeline(Source(str(student)), [stage], None, Store(tmp_path / "runs"))
    spec = open_checkpoint(student).spec
    without = stage.peak_bytes(spec, "cpu") - stage.teacher.bytes("cpu")
    monkeypatch.setattr(pipeline, "available_memory", lambda device: without + 1000)
    with pytest.raises(SlimError, match="'distill lora' needs about .* of memory"):
        chain.check_limits(chain.plan())


def test_matching_works_with_checkpointed_activations(teacher, student, tmp_path):
    from slim.training.trainer_settings import TrainerSettings

    losses = []
    for name, saving in (("kept", False), ("again", True)):
        hardware = TrainerSettings(gradient_checkpointing=saving)
        stage = Full(**by(teacher, match=Matching(hidden=1.0, attention=1.0), trainer=hardware))
        losses.append(run(stage, student, tmp_path / name)["validation_loss_trained"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)

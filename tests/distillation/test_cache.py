"""The teacher's cache: what is kept against whole distributions, the same training with and without
it, refusals."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from slim.checkpoints.checkpoint import open_checkpoint
from slim.checkpoints.source import Source
from slim.checkpoints.stage import Context
from slim.checkpoints.tokenizer import load_tokenizer
from slim.checkpoints.writer import write_blocks
from slim.core.errors import SlimError
from slim.data.examples import TextData, TinyChat, TinyText
from slim.data.packing import IGNORE
from slim.distillation import cache
from slim.distillation.losses import forward_kl, softened
from slim.distillation.stage import Full, Lora
from slim.loading.load_model import load_model
from tests.conftest import build_small

QUICK = dict(
    steps=4,
    window=64,
    batch_tokens=256,
    validate_every=4,
    validation_tokens=512,
    learning_rate=0.01,
)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> Path:
    sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=3, vocab_size=1536)
    return build_small("llama", tmp_path_factory.mktemp("teacher") / "teacher", **sizes)


@pytest.fixture(scope="module")
def student(tmp_path_factory, teacher) -> Path:
    folder = tmp_path_factory.mktemp("student") / "student"
    folder.mkdir()
    write_blocks(open_checkpoint(teacher), folder, [0])
    return folder


def run(stage, source: Path, target: Path) -> dict:
    target.mkdir(parents=True)
    return stage.run(source, target, Context())


def by(teacher: Path, folder: Path, **settings) -> dict:
    settings = {"cache": True, "cache_folder": str(folder), "data": TinyText(), **settings}
    return {**QUICK, "base": Source(str(teacher)), **settings}


# What is kept


def test_what_is_kept_are_the_likely_tokens_and_the_rest_of_the_mass():
    logits = torch.randn(20, 50, generator=torch.Generator().manual_seed(0)) * 3
    kept = cache.top_classes(logits, 2.0, 5)
    assert {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in kept.items()} == {
        "indices": (torch.int32, (20, 5)), "log_probs": (torch.float16, (20, 5)),
        "others": (torch.float32, (20,)), "log_z": (torch.float32, (20,)),
    }  # fmt: skip
    for row in range(20):
        scaled = [value / 2.0 for value in logits[row].tolist()]
        order = sorted(range(50), key=lambda index: -scaled[index])
        total = sum(torch.tensor(scaled).exp().double()).item()
        assert kept["indices"][row].tolist() == order[:5]
        p = [torch.tensor(scaled[index]).exp().item() / total for index in order]
        assert kept["log_probs"][row].float().exp().tolist() == pytest.approx(p[:5], rel=3e-3)
        assert kept["others"][row].exp().item() == pytest.approx(sum(p[5:]), rel=1e-4)
        assert kept["log_z"][row].exp().item() == pytest.approx(total, rel=1e-4)


def test_both_sides_are_put_into_the_same_classes():
    generator = torch.Generator().manual_seed(1)
    wise, logits = (torch.randn(6, 40, generator=generator) * 2 for _ in range(2))
    kept = cache.top_classes(wise, 1.5, 7)
    log_p = cache.teacher_classes(kept["log_probs"], kept["others"])
    log_q = cache.student_classes(logits, kept["indices"], 1.5)
    for lumped in (log_p, log_q):
        torch.testing.assert_close(lumped.exp().sum(-1), torch.ones(6))
    p, q = (softened(x, 1.5).exp().double() for x in (wise, logits))
    for row in range(6):
        likely = kept["indices"][row].tolist()
        rest = [index for index in range(40) if index not in likely]
        expected = sum(p[row, i] * (p[row, i] / q[row, i]).log() for i in likely)
        expected += p[row, rest].sum() * (p[row, rest].sum() / q[row, rest].sum()).log()
        assert forward_kl(log_p, log_q)[row].item() == pytest.approx(expected.item(), rel=5e-3)


def test_the_gradient_of_lumped_classes_is_that_of_the_definition():
    generator = torch.Generator().manual_seed(2)
    logits = (torch.randn(6, 40, generator=generator) * 2).requires_grad_()
    indices, weights = (
        torch.randn(6, 40, generator=generator).topk(7).indices,
        torch.randn(6, 8, generator=generator),
    )
    p = (logits / 1.5).softmax(-1)
    kept = p.gather(-1, indices)
    lumped = torch.cat([kept, p.scatter(-1, indices, 0.0).sum(-1, keepdim=True)], -1).log()
    found = cache.student_classes(logits, indices.int(), 1.5)
    torch.testing.assert_close(found, lumped)
    expected = torch.autograd.grad((weights * lumped).sum(), logits)[0]
    torch.testing.assert_close(
        torch.autograd.grad((weights * found).sum(), logits)[0], expected, rtol=1e-4, atol=1e-6
    )


def test_a_very_sure_student_has_finite_gradients():
    logits = torch.zeros(1, 30)
    logits[0, 3] = 200.0
    logits.requires_grad_()
    kept = cache.top_classes(torch.randn(1, 30), 1.0, 4)
    log_q = cache.student_classes(logits, kept["indices"], 1.0)
    forward_kl(cache.teacher_classes(kept["log_probs"], kept["others"]), log_q).sum().backward()
    assert log_q.isfinite().all() and logits.grad.isfinite().all()


# Reading and writing


@pytest.mark.parametrize("data", [TinyText(), TinyChat()])
def test_every_window_gets_its_own_tokens_back(teacher, tmp_path, data, monkeypatch):
    """Against a teacher asked directly, window by window, with files so small that windows lie
    across two of them."""
    monkeypatch.setattr(cache, "PART_TOKENS", 300)
    stage = Lora(**by(teacher, tmp_path / "cache", data=data, steps=9, temperature=2.0, top_k=5))
    task = stage.task(open_checkpoint(teacher), "cpu", "32-true")
    found = task.cached_teacher().cache
    assert len(found.parts) > 2
    model = load_model(teacher, "float32")
    for chosen in ([4, 0], [3], list(range(len(task.training)))):
        rows = found.rows(torch.tensor(chosen))
        expected = []
        for window in chosen:
            positions = task.training.positions
            place = None if positions is None else positions[window].long()[None]
            with torch.no_grad():
                logits = model(
                    input_ids=task.training.tokens[window].long()[None],
                    position_ids=place,
                    use_cache=False,
                ).logits
            expected.append(logits[0, :-1][task.training.labels[window, 1:] != IGNORE])
        log_p = softened(torch.cat(expected), 2.0)
        values, indices = log_p.topk(5, -1)
        assert torch.equal(rows["indices"].long(), indices)
        torch.testing.assert_close(rows["log_probs"].float(), values, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("kind", [Lora, Full])
def test_the_same_training_with_the_cache_and_without(
    teacher, student, tmp_path, kind, monkeypatch
):
    """All tokens but one are kept, so nothing but rounding differs; the second student does not
    load the teacher."""
    from slim.distillation.teacher import Teacher

    settings = by(teacher, tmp_path / "cache", data=TinyChat(), top_k=10**6, temperature=2.0)
    live = run(kind(**{**settings, "cache": False}), student, tmp_path / "live")
    first = run(kind(**settings), student, tmp_path / "first")
    monkeypatch.setattr(Teacher, "load", lambda *_: pytest.fail("the teacher was loaded again"))
    second = run(kind(**settings), student, tmp_path / "second")
    for facts in (first, second):
        assert facts["validation_loss_trained"] == pytest.approx(
            live["validation_loss_trained"], rel=1e-4
        )
        assert facts["teacher_validation_loss"] == pytest.approx(
            live["teacher_validation_loss"], rel=1e-6
        )
    start, one, two = (
        torch.cat(
            [value.flatten() for value in load_model(folder, "float32").state_dict().values()]
        )
        for folder in (student, tmp_path / "live", tmp_path / "second")
    )
    assert (two - one).norm() < 0.02 * (one - start).norm()


def test_few_tokens_are_nearly_enough(teacher, student, tmp_path):
    losses = {}
    for name, settings in {"live": dict(cache=False), "few": dict(top_k=64)}.items():
        losses[name] = run(
            Full(**by(teacher, tmp_path / "cache", **settings)), student, tmp_path / name
        )
    assert losses["few"]["validation_loss_trained"] == pytest.approx(
        losses["live"]["validation_loss_trained"], rel=0.01
    )


def test_epochs_read_the_same_cache_again(teacher, student, tmp_path):
    path = tmp_path / "text.jsonl"
    path.write_text(
        "".join(
            json.dumps({"text": f"Anna has {n} red apples in the house."}) + "\n"
            for n in range(120)
        )
    )
    data = TextData(text=str(path), validation_fraction=0.2)
    facts = run(
        Full(**{**by(teacher, tmp_path / "cache", data=data), "epochs": 3}),
        student,
        tmp_path / "out",
    )
    record = json.loads(next((tmp_path / "cache").glob("*/cache.json")).read_text())
    found = data.windows("train", load_tokenizer(student), 64)
    assert (
        sum(record["lengths"]) == int(found.loss_tokens.sum()) and facts["steps"] > len(found) // 4
    )


# Refusals


def test_a_cache_of_something_else_is_refused(teacher, student, tmp_path):
    own = tmp_path / "mine"
    settings = by(teacher, tmp_path, cache=str(own))
    run(Lora(**settings), student, tmp_path / "one")
    before = {path.name: path.read_bytes() for path in own.iterdir()}
    # another student, the same data: fits
    run(Lora(**{**settings, "seed": 1}), student, tmp_path / "two")
    texts = tmp_path / "student2"
    shutil.copytree(student, texts)
    (texts / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    )
    wrong = {
        "teacher": (dict(base=Source(str(student))), student),
        "data and another windows": (dict(data=TinyText(seed=3)), student),
        "windows": (dict(steps=5), student),
        "temperature": (dict(temperature=3.0), student),
        "top_k": (dict(top_k=3), student),
        "template": (dict(), texts),
    }
    for number, (named, (changes, source)) in enumerate(wrong.items()):
        with pytest.raises(SlimError, match=f"was made with another {named}"):
            run(Lora(**{**settings, **changes}), source, tmp_path / f"no{number}")
    content = json.loads((texts / "tokenizer.json").read_text(encoding="utf-8"))
    content["truncation"] = None
    content["pre_tokenizer"] = {
        "type": "ByteLevel",
        "add_prefix_space": True,
        "trim_offsets": True,
        "use_regex": True,
    }
    (texts / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(SlimError, match="another tokenizer"):
        run(Lora(**settings), texts, tmp_path / "tokenizer")
    assert {path.name: path.read_bytes() for path in own.iterdir()} == before


def test_a_damaged_cache_is_an_error_that_names_the_file(teacher, student, tmp_path):
    settings = by(teacher, tmp_path, cache=str(tmp_path / "mine"))
    run(Lora(**settings), student, tmp_path / "one")
    part = tmp_path / "mine" / "part-00000.safetensors"
    part.write_bytes(part.read_bytes()[:-8])
    with pytest.raises(SlimError, match="part-00000.safetensors has .* bytes"):
        run(Lora(**settings), student, tmp_path / "two")


def test_an_interrupted_cache_leaves_nothing(teacher, student, tmp_path, monkeypatch):
    from slim.distillation import tasks

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(tasks, "write_cache", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(Lora(**by(teacher, tmp_path / "cache")), student, tmp_path / "out")
    assert not [path for path in (tmp_path / "cache").iterdir() if path.is_dir()]

"""DSKD against a slow reference, token by token, with one tokenizer and with two; the texts both
models read."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from slim.checkpoints.checkpoint import open_checkpoint
from slim.checkpoints.source import Source
from slim.checkpoints.tokenizer import load_tokenizer
from slim.core.errors import SlimError
from slim.data.examples import TinyChat, TinyText
from slim.data.packing import IGNORE
from slim.distillation.alignment import aligned_windows, token_bytes
from slim.distillation.dual_space import (
    CrossModelAttention,
    DualSpace,
    ExactAlignment,
    closest_map,
    head_projectors,
    query_projector,
)
from slim.distillation.losses import forward_kl
from slim.distillation.pairing import paired_windows, segments_of, teacher_batch
from slim.distillation.stage import Full, Lora
from slim.distillation.teacher import same_vocabulary
from slim.loading.load_model import load_model
from tests.conftest import build_small
from tests.support.distilling import QUICK
from tests.support.stages import run


@pytest.fixture(scope="module")
def student(tmp_path_factory) -> Path:
    """A narrow model with the embedded model's tokenizer and untied head."""
    sizes = dict(
        hidden_size=24,
        num_attention_heads=2,
        head_dim=12,
        intermediate_size=48,
        tie_word_embeddings=False,
    )
    return build_small(
        "llama", tmp_path_factory.mktemp("student") / "student", num_hidden_layers=1, **sizes
    )


@pytest.fixture(scope="module")
def same(tmp_path_factory) -> Path:
    """A wider teacher with the same tokenizer."""
    sizes = dict(hidden_size=32, intermediate_size=64, tie_word_embeddings=False)
    return build_small(
        "llama", tmp_path_factory.mktemp("same") / "same", num_hidden_layers=2, **sizes
    )


@pytest.fixture(scope="module")
def foreign(tmp_path_factory) -> Path:
    """A wider teacher with a smaller vocabulary of its own, trained on the same world."""
    from slim.tiny_world import World
    from slim.tiny_world.tokenizer import save_tokenizer, train_tokenizer

    folder = tmp_path_factory.mktemp("foreign") / "foreign"
    tokenizer = train_tokenizer(World(1), 420)
    sizes = dict(
        hidden_size=32, intermediate_size=64, tie_word_embeddings=False, vocab_size=len(tokenizer)
    )
    build_small("llama", folder, num_hidden_layers=2, **sizes)
    save_tokenizer(tokenizer, folder)
    return folder


def kl(teacher: torch.Tensor, student: torch.Tensor, temperature: float) -> float:
    p, q = (logits.double().div(temperature).softmax(-1) for logits in (teacher, student))
    return (p * (p.log() - q.log())).sum().item()


def nll(logits: torch.Tensor, label: int) -> float:
    return -logits.double().softmax(-1)[label].log().item()


# Where the projectors begin


def test_the_closest_map_has_the_smallest_error():
    generator = torch.Generator().manual_seed(0)
    own, other = torch.randn(60, 5, generator=generator), torch.randn(60, 8, generator=generator)
    torch.testing.assert_close(
        closest_map(own, other), torch.linalg.lstsq(own, other).solution, rtol=1e-4, atol=1e-5
    )
    assert torch.equal(closest_map(own, own.clone()), torch.eye(5))
    # rank 3: the smallest of all best maps
    thin = own[:, :3].double() @ torch.randn(3, 5, generator=generator).double()
    expected = torch.linalg.pinv(thin) @ other.double()
    torch.testing.assert_close(closest_map(thin, other).double(), expected, rtol=1e-3, atol=1e-4)


def test_projectors_turn_one_heads_logits_into_the_others(student, same):
    """With fewer tokens than dimensions the heads can agree exactly."""
    narrow, wide = load_model(student, "float32"), load_model(same, "float32")
    ids = torch.arange(40, 60)
    projectors = head_projectors(narrow, wide, ids, ids)
    taught, hidden = torch.randn(3, 32), torch.randn(3, 24)
    w_s, w_t = narrow.lm_head.weight[ids], wide.lm_head.weight[ids]
    torch.testing.assert_close(
        projectors["to_student"](taught) @ w_s.T, taught @ w_t.T, rtol=1e-3, atol=1e-3
    )
    torch.testing.assert_close(
        projectors["to_teacher"](hidden) @ w_t.T, hidden @ w_s.T, rtol=1e-3, atol=1e-3
    )


# The losses


def noisy(projectors: dict) -> dict:
    """Move projectors away from where they begin, so that nothing in a test holds by their special
    form."""
    torch.manual_seed(3)
    for projector in projectors.values():
        projector.weight.data.add_(torch.randn_like(projector.weight) * 0.1)
    return projectors


def test_one_vocabulary_against_the_formulas(student, same):
    narrow, wide = (
        load_model(student, "float32").requires_grad_(True),
        load_model(same, "float32").requires_grad_(False),
    )
    found = TinyChat().windows("train", load_tokenizer(student), 64, 256)
    batch = {name: getattr(found, name)[:2].long() for name in ("tokens", "labels", "positions")}
    ids = torch.arange(1536)
    projectors = noisy(head_projectors(narrow, wide, ids, ids))
    goal = DualSpace(wide, projectors, forward_kl, 2.0, 0.25, (1536, 1536))
    value = goal(narrow, batch)
    value.backward()

    w_s, w_t = narrow.lm_head.weight.detach(), wide.lm_head.weight
    inputs = dict(input_ids=batch["tokens"], position_ids=batch["positions"], use_cache=False)
    h_s, h_t = (model.model(**inputs)[0].detach() for model in (narrow, wide))
    expected, rows = 0.0, (batch["labels"][:, 1:] != IGNORE).nonzero().tolist()
    for row, place in rows:
        label = batch["labels"][row, place + 1]
        own, wise = w_s @ h_s[row, place], w_t @ h_t[row, place]
        guide = w_s @ (projectors["to_student"].weight @ h_t[row, place])
        guided = w_t @ (projectors["to_teacher"].weight @ h_s[row, place])
        expected += 0.75 * (
            4 * kl(guide, own, 2.0) + 4 * kl(wise, guided, 2.0) + nll(guide, label)
        ) + 0.25 * nll(own, label)
    assert len(rows) > 20 and value.item() == pytest.approx(expected, rel=1e-5)

    # L_p alone teaches P_ts, and neither it nor L_s moves the head through p_ts
    guides = torch.stack(
        [projectors["to_student"].weight @ h_t[row, place] for row, place in rows]
    ).requires_grad_()
    labels = torch.stack([batch["labels"][row, place + 1] for row, place in rows])
    loss = 0.75 * torch.nn.functional.cross_entropy(guides @ w_s.T, labels, reduction="sum")
    by_guide = torch.autograd.grad(loss, guides)[0]
    wanted = by_guide.T @ torch.stack([h_t[row, place] for row, place in rows])
    torch.testing.assert_close(projectors["to_student"].weight.grad, wanted, rtol=1e-3, atol=1e-4)
    hidden = torch.stack([h_s[row, place] for row, place in rows])
    w = w_s.clone().requires_grad_()
    own = hidden @ w.T
    p = (guides.detach() @ w_s.T / 2).log_softmax(-1)
    loss = 0.75 * 4 * (p.exp() * (p - (own / 2).log_softmax(-1))).sum()
    loss = loss + 0.25 * torch.nn.functional.cross_entropy(own, labels, reduction="sum")
    torch.testing.assert_close(
        narrow.lm_head.weight.grad, torch.autograd.grad(loss, w)[0], rtol=1e-3, atol=1e-4
    )
    assert narrow.model.layers[0].mlp.up_proj.weight.grad.abs().sum() > 0


def softmax(scores: list[float]) -> list[float]:
    top = max(scores)
    exponentials = [torch.tensor(score - top).exp().item() for score in scores]
    return [value / sum(exponentials) for value in exponentials]


def scaled(vector: torch.Tensor) -> torch.Tensor:
    mean = sum(vector.tolist()) / len(vector)
    return vector / (sum((x - mean) ** 2 for x in vector.tolist()) / (len(vector) - 1)) ** 0.5


@pytest.mark.parametrize("data", [TinyText(), TinyChat()])
def test_two_tokenizers_against_a_slow_reference(student, foreign, data):
    """Cross-model attention written out: for each text by itself, one token after the other."""
    assert not same_vocabulary(student, foreign)
    narrow, wide = (
        load_model(student, "float32").requires_grad_(True),
        load_model(foreign, "float32").requires_grad_(False),
    )
    tokenizers = [load_tokenizer(folder) for folder in (student, foreign)]
    windows, read = paired_windows(data, "train", *tokenizers, 32, 64, 256)
    batch = {
        "tokens": windows.tokens[:2].long(),
        "labels": windows.labels[:2].long(),
        "windows": torch.tensor([0, 1]),
    }
    if windows.positions is not None:
        batch["positions"] = windows.positions[:2].long()
    ids = torch.arange(300, 330)
    projectors = head_projectors(narrow, wide, ids, ids)
    projectors["query"] = query_projector(narrow, wide, ids, ids)
    classes = (1536, open_checkpoint(foreign).spec.vocab_size)
    goal = CrossModelAttention(
        wide, noisy(projectors), forward_kl, 2.0, 0.25, classes, read=read, pad=0
    )
    value = goal(narrow, batch)
    value.backward()
    assert all(projector.weight.grad.abs().sum() > 0 for projector in projectors.values())

    p_ts, p_st, p_q = (
        projectors[name].weight.detach() for name in ("to_student", "to_teacher", "query")
    )
    e_s, e_t = (model.model.embed_tokens.weight.detach() for model in (narrow, wide))
    w_s, w_t = narrow.lm_head.weight.detach(), wide.lm_head.weight
    expected = 0.0
    for row in range(2):
        pieces = pieces_of(batch, row)
        assert len(pieces) == len(read[row])
        # per token with a label: segment, token, next, hidden state
        sides: list[list[tuple]] = [[], []]
        for number, ((tokens, labels), example) in enumerate(zip(pieces, read[row], strict=True)):
            theirs = [IGNORE, *example.labels[1:]]
            both = (
                (narrow, tokens, labels),
                (wide, torch.tensor(example.tokens), torch.tensor(theirs)),
            )
            for side, (model, ids, wanted) in zip(sides, both, strict=True):
                with torch.no_grad():
                    hidden = model.model(input_ids=ids[None])[0][0]
                for place in range(len(ids) - 1):
                    if wanted[place + 1] != IGNORE:
                        side.append(
                            (number, ids[place].item(), ids[place + 1].item(), hidden[place])
                        )
        ours, theirs = sides
        queries = [p_q @ torch.cat([e_s[token], e_s[following]]) for _, token, following, _ in ours]
        keys = [
            scaled(torch.cat([e_t[token], e_t[following]])) for _, token, following, _ in theirs
        ]
        values_t = [
            p_ts @ (scaled(hidden) + scaled(e_t[following])) for _, _, following, hidden in theirs
        ]
        values_s = [p_st @ hidden for *_, hidden in ours]
        scores = [[(query @ key).item() / 64**0.5 for key in keys] for query in queries]
        for i, (segment, _, label, hidden) in enumerate(ours):
            allowed = [j for j in range(len(theirs)) if theirs[j][0] == segment]
            share = softmax([scores[i][j] for j in allowed])
            guide = w_s @ sum(a * values_t[j] for a, j in zip(share, allowed, strict=True))
            own = w_s @ hidden
            soft = 4 * kl(guide, own, 2.0) if guide.argmax().item() == label else 0.0
            expected += 0.75 * (soft + nll(guide, label)) + 0.25 * nll(own, label)
        for j, (segment, _, _, hidden) in enumerate(theirs):
            allowed = [i for i in range(len(ours)) if ours[i][0] == segment]
            share = softmax([scores[i][j] for i in allowed])
            guided = w_t @ sum(a * values_s[i] for a, i in zip(share, allowed, strict=True))
            expected += 0.75 * 4 * kl(w_t @ hidden, guided, 2.0) * len(ours) / len(theirs)
    assert value.item() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("data", [TinyText(), TinyChat()])
def test_tokens_with_the_same_text_in_front_are_aligned(student, foreign, data):
    """Compared with the definition: the decoded text of everything up to each token."""
    tokenizers = [load_tokenizer(folder) for folder in (student, foreign)]
    windows, read = paired_windows(data, "train", *tokenizers, 64, 500, 256)
    found = aligned_windows(windows, read, *tokenizers)
    for row in range(len(windows)):
        batch = {name: getattr(windows, name) for name in ("tokens", "labels", "positions")}
        pieces = pieces_of(
            {name: tensor for name, tensor in batch.items() if tensor is not None}, row
        )
        sides: list[list[tuple[int, str]]] = [[], []]
        for number, ((tokens, labels), example) in enumerate(zip(pieces, read[row], strict=True)):
            both = ((tokens.tolist(), labels.tolist()), (example.tokens, example.labels))
            for side, tokenizer, (ids, wanted) in zip(sides, tokenizers, both, strict=True):
                counted = [place for place in range(1, len(ids)) if wanted[place] != IGNORE]
                side += [(number, tokenizer.decode(ids[:place])) for place in counted]
        expected = [
            (i, sides[1].index(text)) for i, text in enumerate(sides[0]) if text in sides[1]
        ]
        assert (
            found[row].T.tolist() == [list(pair) for pair in expected]
            and len(expected) > len(sides[0]) / 2
        )


def test_the_bytes_of_tokens_are_those_of_the_text(foreign):
    tokenizer = load_tokenizer(foreign)
    known, text = token_bytes(tokenizer), "Anna\u00efs caf\u00e9 \u2014 12\n\u4f60"
    assert b"".join(known[token] for token in tokenizer(text)["input_ids"]) == text.encode()
    assert (
        known[tokenizer.eos_token_id] == b""
        and known[tokenizer.convert_tokens_to_ids("<|user|>")] == b"<|user|>"
    )


@pytest.mark.parametrize("data", [TinyText(), TinyChat()])
def test_exact_alignment_against_the_formulas(student, foreign, data):
    narrow, wide = (
        load_model(student, "float32").requires_grad_(True),
        load_model(foreign, "float32").requires_grad_(False),
    )
    tokenizers = [load_tokenizer(folder) for folder in (student, foreign)]
    windows, read = paired_windows(data, "train", *tokenizers, 32, 96, 256)
    pairs = aligned_windows(windows, read, *tokenizers)
    order = torch.tensor([2, 0])
    batch = {name: getattr(windows, name) for name in ("tokens", "labels", "positions")}
    batch = {name: tensor[order].long() for name, tensor in batch.items() if tensor is not None} | {
        "windows": order
    }
    ids = torch.arange(300, 330)
    projectors = noisy(head_projectors(narrow, wide, ids, ids))
    classes = (1536, open_checkpoint(foreign).spec.vocab_size)
    goal = ExactAlignment(
        wide, projectors, forward_kl, 2.0, 0.25, classes, read=read, pairs=pairs, pad=0
    )
    value = goal(narrow, batch)

    p_ts, p_st = (projectors[name].weight.detach() for name in ("to_student", "to_teacher"))
    w_s, w_t = narrow.lm_head.weight.detach(), wide.lm_head.weight
    expected = 0.0
    for row, window in enumerate(order.tolist()):
        ours, theirs = [], []
        for (tokens, labels), example in zip(pieces_of(batch, row), read[window], strict=True):
            for side, model, ids, wanted in (
                (ours, narrow, tokens, labels), (theirs, wide, torch.tensor(example.tokens), torch.tensor(example.labels)),
            ):  # fmt: skip
                with torch.no_grad():
                    hidden = model.model(input_ids=ids[None])[0][0]
                side += [
                    (hidden[at - 1], ids[at].item())
                    for at in range(1, len(ids))
                    if wanted[at] != IGNORE
                ]
        expected += sum(0.25 * nll(w_s @ hidden, label) for hidden, label in ours)
        for i, j in pairs[window].T.tolist():
            (h_s, label), (h_t, _) = ours[i], theirs[j]
            guide = w_s @ p_ts @ h_t
            expected += 0.75 * (
                4 * kl(guide, w_s @ h_s, 2.0)
                + nll(guide, label)
                + 4 * kl(w_t @ h_t, w_t @ p_st @ h_s, 2.0)
            )
    assert value.item() == pytest.approx(expected, rel=1e-4)
    value.backward()
    assert all(projector.weight.grad.abs().sum() > 0 for projector in projectors.values())


def pieces_of(batch: dict, row: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Split a row into its texts, padding (which has no labels) left out."""
    tokens, labels = batch["tokens"][row], batch["labels"][row]
    if "positions" not in batch:
        return [(tokens, labels)]
    starts = (batch["positions"][row] == 0).nonzero().flatten().tolist()
    pieces = [
        (tokens[a:b], labels[a:b]) for a, b in zip(starts, [*starts[1:], len(tokens)], strict=True)
    ]
    return [piece for piece in pieces if (piece[1] != IGNORE).any()]


# What both models read


@pytest.mark.parametrize("data", [TinyText(), TinyChat()])
def test_both_models_read_the_same_text(student, foreign, data):
    ours, theirs = load_tokenizer(student), load_tokenizer(foreign)
    windows, read = paired_windows(data, "train", ours, theirs, 64, 600, 256)
    assert len(read) == len(windows)
    for row in range(len(windows)):
        batch = {name: getattr(windows, name) for name in ("tokens", "labels", "positions")}
        batch = {name: tensor for name, tensor in batch.items() if tensor is not None}
        for (tokens, labels), example in zip(pieces_of(batch, row), read[row], strict=True):
            assert theirs.decode(example.tokens) == ours.decode(tokens)
            assert len(example.tokens) > len(tokens)  # the smaller vocabulary needs more tokens
            answers = [
                tokenizer.decode([token for token in learnt if token != IGNORE])
                for tokenizer, learnt in ((ours, labels.tolist()), (theirs, example.labels))
            ]
            assert answers[0] == answers[1] or windows.positions is None


def test_what_the_teacher_reads_is_kept_apart(student, foreign):
    windows, read = paired_windows(
        TinyChat(), "train", load_tokenizer(student), load_tokenizer(foreign), 64, 600, 256
    )
    batch = teacher_batch(read[:3], pad=1)
    for row, examples in enumerate(read[:3]):
        tokens = [token for example in examples for token in example.tokens]
        assert batch["tokens"][row, : len(tokens)].tolist() == tokens and set(
            batch["tokens"][row, len(tokens) :].tolist()
        ) <= {1}
        assert (batch["positions"][row] == 0).sum() == len(examples) + (
            len(tokens) < batch["tokens"].shape[1]
        )
        for number, example in enumerate(examples):
            mine = batch["segments"][row] == number
            assert batch["tokens"][row][mine].tolist() == example.tokens
            assert batch["labels"][row][mine].tolist() == [IGNORE, *example.labels[1:]]
    segments = segments_of(windows.positions[:3].long(), windows.tokens[:3].long())
    for row, examples in enumerate(read[:3]):
        answered = segments[row][windows.labels[row] != IGNORE]
        assert set(answered.tolist()) == set(range(len(examples)))


def test_too_long_conversations_are_dropped_on_both_sides(student, foreign):
    tokenizers = load_tokenizer(student), load_tokenizer(foreign)
    windows, read = paired_windows(TinyChat(), "train", *tokenizers, 64, 600, 30)
    assert (
        windows.counts["dropped"] > 0
        and max(len(example.tokens) for row in read for example in row) <= 30
    )
    with pytest.raises(SlimError, match="no train example that fits into 64 tokens"):
        paired_windows(_few(TinyChat()), "train", *tokenizers, 64, 600, 5)


def _few(data: TinyChat) -> TinyChat:
    from itertools import islice

    pairs = data.pairs
    data.pairs = lambda part: islice(pairs(part), 20)
    return data


# The stage


@pytest.mark.parametrize(
    ("kind", "data", "align"), [(Lora, TinyText(), "attention"), (Full, TinyChat(), "exact")]
)
def test_a_teacher_with_another_tokenizer_teaches(student, foreign, tmp_path, kind, data, align):
    stage = kind(
        **QUICK,
        data=data,
        base=Source(str(student)),
        model=str(foreign),
        method="dskd",
        align=align,
    )
    facts = run(stage, student, tmp_path / "out")
    assert facts["same_vocabulary"] is False and (
        align == "attention" or 0.5 < facts["aligned_share"] <= 1
    )
    assert facts["validation_loss_after"] < facts["validation_loss_before"]
    shapes = {name: tensor.shape for name, tensor in load_model(student).state_dict().items()}
    assert {
        name: tensor.shape for name, tensor in load_model(tmp_path / "out").state_dict().items()
    } == shapes

    tokenizers = load_tokenizer(student), load_tokenizer(foreign)
    windows, read = paired_windows(data, "validation", *tokenizers, 64, 512, 256)
    wide, total = load_model(foreign), 0.0
    for examples in read:
        for example in examples:
            with torch.no_grad():
                logits = (
                    wide(input_ids=torch.tensor([example.tokens]))
                    .logits[0]
                    .double()
                    .log_softmax(-1)
                )
            places = [at for at in range(1, len(example.tokens)) if example.labels[at] != IGNORE]
            total -= sum(logits[at - 1, example.tokens[at]].item() for at in places)
    count = int((windows.labels[:, 1:] != IGNORE).sum())
    assert facts["teacher_validation_loss"] == pytest.approx(total / count, rel=1e-5)


def test_parts_of_a_step_give_the_same(student, foreign, tmp_path):
    settings = dict(
        **QUICK, data=TinyChat(), base=Source(str(student)), model=str(foreign), method="dskd"
    )
    one, four = (
        run(Full(**settings, accumulation=parts), student, tmp_path / str(parts))[
            "validation_loss_trained"
        ]
        for parts in (1, 4)
    )
    assert one == pytest.approx(four, rel=1e-5)


def test_one_model_as_its_own_teacher_begins_with_identities(student, tmp_path, monkeypatch):
    from slim.distillation import dskd

    made = []
    honest = dskd.DualSpace
    monkeypatch.setattr(dskd, "DualSpace", lambda *a: made.append(honest(*a)) or made[-1])
    before = []
    monkeypatch.setattr(
        honest, "forward",
        lambda self, model, batch, keep=honest.forward: before.append(
            [projector.weight.detach().clone() for projector in self.projectors.values()]
        ) or keep(self, model, batch),
    )  # fmt: skip
    facts = run(
        Lora(**QUICK, data=TinyText(), base=Source(str(student)), method="dskd"),
        student,
        tmp_path / "out",
    )
    assert facts["same_vocabulary"] is True and all(
        torch.equal(weight, torch.eye(24)) for weight in before[0]
    )
    # projectors are trained, by a rate of their own
    assert not torch.equal(before[-1][0], before[0][0])


def test_a_teacher_without_a_chat_template_cannot_read_conversations(student, foreign, tmp_path):
    import shutil

    shutil.copytree(foreign, tmp_path / "plain")
    (tmp_path / "plain" / "chat_template.jinja").unlink(missing_ok=True)
    stage = Lora(
        **QUICK,
        data=TinyChat(),
        base=Source(str(student)),
        model=str(tmp_path / "plain"),
        method="dskd",
    )
    with pytest.raises(SlimError, match="teacher's tokenizer has no chat template"):
        run(stage, student, tmp_path / "out")

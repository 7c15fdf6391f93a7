"""Divergences against their definitions in plain Python, gradients against differences; sums in
chunks against the whole."""

from __future__ import annotations

import math

import pytest
import torch

from slim.core.errors import SlimError
from slim.distillation import losses
from slim.distillation.chunks import chunk_rows, chunked_sum
from tests.conftest import ROOT

CLASSES = 9


def relative_entropy(a: list[float], b: list[float]) -> float:
    return sum(x * math.log(x / y) for x, y in zip(a, b, strict=True))


def blend(a: list[float], b: list[float], share_of_a: float) -> list[float]:
    return [share_of_a * x + (1 - share_of_a) * y for x, y in zip(a, b, strict=True)]


def adaptive_by_hand(
    p: list[float], q: list[float], head: float, share: float | None = None
) -> tuple[float, float]:
    """The weights are constants to the gradient, so ``share`` can be given."""
    if share is None:
        inside, reached = set(), 0.0
        for index in sorted(range(len(p)), key=lambda index: -p[index]):
            if reached >= head:
                break
            inside.add(index)
            reached += p[index]
        gaps = [abs(x - y) for x, y in zip(p, q, strict=True)]
        share = sum(gaps[index] for index in inside) / sum(gaps)
    return share * relative_entropy(p, q) + (1 - share) * relative_entropy(q, p), share


DEFINITIONS = {
    "forward_kl": (losses.forward_kl, relative_entropy),
    "reverse_kl": (losses.reverse_kl, lambda p, q: relative_entropy(q, p)),
    "symmetric": (
        lambda p, q: losses.symmetric(p, q, 0.3),
        lambda p, q: (
            0.3 * relative_entropy(p, blend(p, q, 0.3))
            + 0.7 * relative_entropy(q, blend(p, q, 0.3))
        ),
    ),
    "skewed": (
        lambda p, q: losses.skewed(p, q, 0.1),
        lambda p, q: relative_entropy(p, blend(p, q, 0.1)),
    ),
    "skewed_reverse": (
        lambda p, q: losses.skewed_reverse(p, q, 0.2),
        lambda p, q: relative_entropy(q, blend(q, p, 0.2)),
    ),
    "adaptive": (
        lambda p, q: losses.adaptive(p, q, 0.6),
        lambda p, q: adaptive_by_hand(p, q, 0.6)[0],
    ),
}


def softmax(logits: list[float], temperature: float) -> list[float]:
    weights = [math.exp(value / temperature) for value in logits]
    return [weight / sum(weights) for weight in weights]


def two_rows(tokens: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(tokens, CLASSES, generator=generator) * 2, torch.randn(
        tokens, CLASSES, generator=generator
    ) * 2


@pytest.mark.parametrize("name", DEFINITIONS)
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_value_and_gradient_are_those_of_the_definition(name, temperature):
    ours, by_hand = DEFINITIONS[name]
    teacher, student = two_rows()
    student.requires_grad_()
    found = ours(losses.softened(teacher, temperature), losses.softened(student, temperature))
    found.sum().backward()
    for token in range(len(teacher)):
        p, logits = softmax(teacher[token].tolist(), temperature), student[token].tolist()
        q = softmax(logits, temperature)
        assert found[token].item() == pytest.approx(by_hand(p, q), rel=1e-4, abs=1e-6)
        share = adaptive_by_hand(p, q, 0.6)[1] if name == "adaptive" else None
        for index in range(CLASSES):
            values = []
            for step in (1e-5, -1e-5):
                moved = softmax(
                    [value + step * (place == index) for place, value in enumerate(logits)],
                    temperature,
                )
                values.append(
                    adaptive_by_hand(p, moved, 0.6, share)[0]
                    if share is not None
                    else by_hand(p, moved)
                )
            difference = (values[0] - values[1]) / 2e-5
            assert student.grad[token, index].item() == pytest.approx(
                difference, rel=1e-3, abs=1e-4
            )


def test_values_worked_out_by_hand():
    p, q = (torch.tensor([values]).log() for values in ([0.75, 0.25], [0.25, 0.75]))
    assert losses.forward_kl(p, q).item() == pytest.approx(0.5 * math.log(3))
    assert losses.symmetric(p, q).item() == pytest.approx(
        0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    )
    assert losses.skewed(p, q, 0.5).item() == pytest.approx(losses.symmetric(p, q).item())
    # both KLs are equal here
    assert losses.adaptive(p, q).item() == pytest.approx(0.5 * math.log(3))


@pytest.mark.parametrize("name", DEFINITIONS)
def test_a_divergence_is_zero_for_equals_and_finite_far_apart(name):
    ours = DEFINITIONS[name][0]
    log_p = losses.softened(two_rows()[0], 1.0)
    torch.testing.assert_close(ours(log_p, log_p), torch.zeros(5), rtol=0, atol=1e-6)
    apart = torch.tensor([[60.0, 0.0, -60.0]]), torch.tensor([[-60.0, 0.0, 60.0]]).requires_grad_()
    value = ours(*(losses.softened(logits, 1.0) for logits in apart)).sum()
    value.backward()
    assert value.isfinite() and apart[1].grad.isfinite().all()


def test_the_skewed_divergence_is_bounded():
    """KL(p || s p + (1 - s) q) is at most -log s, whatever q."""
    log_p, log_q = (
        losses.softened(torch.tensor([[50.0, 0.0]]), 1),
        losses.softened(torch.tensor([[0.0, 50.0]]), 1),
    )
    assert losses.skewed(log_p, log_q, 0.1).item() == pytest.approx(-math.log(0.1), rel=1e-4)
    assert losses.forward_kl(log_p, log_q).item() > 40


# Sums in chunks


@pytest.mark.parametrize("chunk", [1, 3, 7, 100])
def test_a_sum_in_chunks_has_the_value_and_gradients_of_the_whole(chunk):
    generator = torch.Generator().manual_seed(2)
    hidden, taught = (torch.randn(7, 5, generator=generator) for _ in range(2))
    head, teachers = (torch.randn(11, 5, generator=generator) for _ in range(2))
    target = torch.randint(0, 11, (7,), generator=generator)

    def loss(hidden, taught, target):
        log_p, logits = losses.softened(taught @ teachers.T, 2.0), hidden @ head.T
        hard = torch.nn.functional.cross_entropy(logits, target, reduction="sum")
        return 4 * losses.forward_kl(log_p, losses.softened(logits, 2.0)).sum() + 0.3 * hard

    hidden.requires_grad_(), head.requires_grad_()
    whole = loss(hidden, taught, target)
    expected = torch.autograd.grad(3 * whole, [hidden, head])
    parts = chunked_sum(loss, (hidden, taught, target), [head], chunk)
    torch.testing.assert_close(parts, whole, rtol=1e-6, atol=0)
    for found, wanted in zip(torch.autograd.grad(3 * parts, [hidden, head]), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(
            chunked_sum(loss, (hidden, taught, target), [head], chunk), whole
        )
    assert not taught.requires_grad and taught.grad is None


def test_no_tensor_of_all_logits_exists(monkeypatch):
    """The largest tensor that the function ever sees has as many rows as a chunk."""
    seen = []

    def loss(hidden):
        logits = hidden @ torch.ones(4, 1000)
        seen.append(len(logits))
        return logits.logsumexp(-1).sum()

    hidden = torch.randn(50, 4, requires_grad=True)
    chunked_sum(loss, (hidden,), chunk=8).backward()
    assert seen == [8] * 6 + [2]
    assert chunk_rows(2**17) * 2**17 == 2**24 and chunk_rows(2**30) == 1


def test_nothing_to_sum_is_zero():
    hidden = torch.zeros(0, 4, requires_grad=True)
    total = chunked_sum(lambda rows: rows.sum(), (hidden,), chunk=8)
    total.backward()
    assert total.item() == 0 and hidden.grad.shape == (0, 4)


# The registry


@pytest.fixture
def own_loss():
    """A loss with a setting, as a user adds it, gone again after the test."""

    @losses.loss("sum s |p - q|", "one's own", limits=(0.5, 2.0))
    def distance(log_p, log_q, alpha=1.0):
        """Return the sum of absolute differences, times the setting."""
        return alpha * (log_p.exp() - log_q.exp()).abs().sum(-1)

    yield distance
    del losses.LOSSES["distance"]


def distillation(**settings):
    from slim.checkpoints.source import Source
    from slim.data.examples import TinyText
    from slim.distillation.stage import Lora

    return Lora(data=TinyText(), base=Source("tiny"), **settings)


def test_a_registered_loss_is_all_that_settings_need(own_loss):
    stage = distillation(loss="distance", loss_settings={"alpha": 2.0})
    divergence = losses.LOSSES["distance"].divergence(stage.loss_setting)
    log_p, log_q = torch.tensor([[0.75, 0.25]]).log(), torch.tensor([[0.25, 0.75]]).log()
    assert divergence(log_p, log_q).item() == pytest.approx(2.0)


def test_a_setting_that_is_not_given_has_the_default_of_its_function(own_loss):
    assert distillation(loss="distance").loss_setting == 1.0


def test_the_setting_of_a_registered_loss_is_checked(own_loss):
    with pytest.raises(SlimError, match="teacher.loss_settings.alpha=3"):
        distillation(loss="distance", loss_settings={"alpha": 3})


@pytest.mark.parametrize(
    ("loss", "settings"), [("forward", {"alpha": 1}), ("symmetric", {"beta": 0.3})]
)
def test_a_setting_that_the_loss_does_not_have_is_refused(loss, settings):
    with pytest.raises(SlimError, match=f"teacher.loss={loss} has no setting"):
        distillation(loss=loss, loss_settings=settings)


def test_the_setting_is_part_of_the_cache_key_and_not_that_of_the_adapters(own_loss):
    key = distillation(loss="distance", loss_settings={"alpha": 2.0}, alpha=32).cache_key()
    assert key["loss_settings"] == {"alpha": 2.0}
    assert key["alpha"] == 32


def test_losses_without_settings_of_their_own_leave_no_trace_in_the_cache_key():
    assert "loss_settings" not in distillation(loss="symmetric").cache_key()


def test_a_message_lists_registered_losses(own_loss):
    with pytest.raises(SlimError, match="teacher.loss=forwards.*distance"):
        distillation(loss="forwards")


def test_the_table_of_the_docs_is_that_of_the_registry():
    page = (ROOT / "docs" / "distillation.md").read_text(encoding="utf-8")
    assert losses.losses_table() in page


def test_the_comment_of_the_setting_names_every_loss():
    text = (ROOT / "slim" / "conf" / "teacher" / "_base.yaml").read_text(encoding="utf-8")
    comment = next(line for line in text.splitlines() if "Divergence of the student" in line)
    assert all(name in comment for name in losses.LOSSES)

"""How far a checkpoint's predictions are from the reference's, against a direct computation over
all logits in float64."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from slim.checkpoints.store import Store
from slim.checkpoints.tokenizer import load_tokenizer
from slim.core.errors import SlimError
from slim.evaluation import perplexity
from slim.evaluation.divergence import Reference
from slim.evaluation.evaluation import Evaluation
from slim.evaluation.perplexity import Perplexity
from slim.evaluation.run import measure
from slim.loading.load_model import load_model
from tests.conftest import build_small
from tests.support.folders import change_tensors

WINDOW, WINDOWS = 40, 3
KEYS = ("kl", "kl_p99", "kl_max", "same_top")


def noisy(tensors: dict) -> dict:
    """Return weights that predict something else."""
    generator = torch.Generator().manual_seed(0)
    for name, weight in tensors.items():
        if weight.dim() == 2:
            noise = torch.randn(weight.shape, generator=generator)
            tensors[name] = (weight.float() * (1 + 0.3 * noise)).to(weight.dtype)
    return tensors


def changed(folder: Path, target: Path, change=noisy) -> Path:
    """Return a copy of a checkpoint with other tensors."""
    return change_tensors(Path(shutil.copytree(folder, target)), change)


@pytest.fixture
def compared(small_llama, tmp_path):
    """The folders of a reference and of another checkpoint with the same tokenizer."""
    return small_llama, changed(small_llama, tmp_path / "other")


def compare(folder: Path, reference: Path, store: Path, content: str = "r") -> dict:
    """Measure ``folder`` against ``reference``; return metrics and protocol."""
    evaluation = Evaluation(Perplexity("tiny:heldout", window=WINDOW, limit=WINDOWS), kl=True)
    evaluation.reference = Reference("the first", reference, content, Store(store))
    return measure(folder, evaluation, speed=False)["quality"]


def direct(folder: Path, reference: Path) -> dict:
    """Compute the metrics from whole logits of both models, token by token."""
    model, first = load_model(folder), load_model(reference)
    ids = load_tokenizer(folder)(Perplexity("tiny:heldout").path.read_text())["input_ids"]
    windows = torch.tensor(ids[: WINDOW * WINDOWS]).view(WINDOWS, WINDOW)
    values, same = [], 0
    with torch.no_grad():
        for p_row, q_row in zip(
            first(windows).logits[:, :-1].flatten(0, 1),
            model(windows).logits[:, :-1].flatten(0, 1),
            strict=True,
        ):
            p = torch.distributions.Categorical(logits=p_row.double())
            q = torch.distributions.Categorical(logits=q_row.double())
            values.append(torch.distributions.kl_divergence(p, q).item())
            same += int(p_row.argmax() == q_row.argmax())
    ranked = sorted(values)
    place = 0.99 * (len(ranked) - 1)
    below = int(place)
    p99 = ranked[below] + (place - below) * (ranked[below + 1] - ranked[below])
    mean = sum(values) / len(values)
    return {"kl": mean, "kl_p99": p99, "kl_max": ranked[-1], "same_top": same / len(values)}


def test_equals_the_direct_computation(compared, tmp_path):
    reference, other = compared
    measured = compare(other, reference, tmp_path)["metrics"]
    expected = direct(other, reference)
    assert expected["kl"] > 0.01  # else nothing is compared
    assert {key: measured[key] for key in KEYS} == pytest.approx(expected, rel=1e-4)


def test_a_checkpoint_does_not_differ_from_itself(compared, tmp_path):
    reference, _ = compared
    measured = compare(reference, reference, tmp_path)["metrics"]
    assert {key: measured[key] for key in KEYS} == pytest.approx(
        {"kl": 0, "kl_p99": 0, "kl_max": 0, "same_top": 1}, abs=1e-6
    )


def test_the_perplexity_stays_what_it_is(compared, tmp_path):
    reference, other = compared
    plain = Evaluation(Perplexity("tiny:heldout", window=WINDOW, limit=WINDOWS))
    expected = measure(other, plain, speed=False)["quality"]["metrics"]["perplexity"]
    assert compare(other, reference, tmp_path)["metrics"]["perplexity"] == expected


def test_the_reference_is_read_once(compared, tmp_path, monkeypatch):
    reference, other = compared
    compare(reference, reference, tmp_path)
    kept = list((tmp_path / "evaluations").glob("*.safetensors"))
    assert len(kept) == 1
    written = kept[0].stat().st_mtime_ns
    compare(other, reference, tmp_path)
    assert list((tmp_path / "evaluations").glob("*.safetensors")) == kept
    assert kept[0].stat().st_mtime_ns == written


def test_the_text_is_tokenised_once_for_each_checkpoint(compared, tmp_path, monkeypatch):
    reference, other = compared
    compare(reference, reference, tmp_path)
    read = []
    encode = perplexity.encode_long
    monkeypatch.setattr(perplexity, "encode_long", lambda *given: read.append(1) or encode(*given))
    compare(other, reference, tmp_path)
    assert len(read) == 1


def test_another_reference_is_another_protocol(compared, tmp_path):
    reference, other = compared
    first = compare(other, reference, tmp_path)["protocol"]["kl"]
    second = compare(other, other, tmp_path, content="other")["protocol"]["kl"]
    assert first != second


def test_gemmas_soft_cap_is_part_of_what_is_said(tmp_path):
    reference = build_small("gemma2", tmp_path / "gemma", final_logit_softcapping=2.0)
    other = changed(reference, tmp_path / "other")
    measured = compare(other, reference, tmp_path)["metrics"]
    assert {key: measured[key] for key in KEYS} == pytest.approx(direct(other, reference), rel=1e-4)


def test_other_tokens_are_left_out_and_said(compared, tmp_path, capsys):
    _, other = compared
    reference = build_small("llama", tmp_path / "wider", vocab_size=1544)
    measured = compare(other, reference, tmp_path)
    assert "kl" not in measured["metrics"]
    assert "KL is left out" in " ".join(capsys.readouterr().err.split())


def test_needs_the_text_of_the_perplexity():
    with pytest.raises(SlimError, match=r"eval\.kl=true .* eval\.perplexity"):
        Evaluation(kl=True)

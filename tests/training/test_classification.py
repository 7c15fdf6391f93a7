"""Classifiers: from texts with labels to a trained, a distilled and a quantized encoder."""

from __future__ import annotations

import json
from collections import Counter

import pytest
import torch

from slim.checkpoints.checkpoint import open_checkpoint
from slim.checkpoints.source import Source
from slim.checkpoints.stage import Context
from slim.core.errors import SlimError
from slim.data.base import TRAIN
from slim.data.labelled import Headlines, LabelledCalibration, LabelledTexts
from slim.data.tiny import TinyText
from slim.data.untrained_encoder import UntrainedEncoder, wordpieces
from slim.distillation.layer_map import Matching
from slim.distillation.stage import Full as Distill
from slim.distillation.student import Layers
from slim.evaluation.classification import Classification, calibration_error, macro_f1
from slim.loading.check_result import check_result
from slim.loading.head import WithHead, lacks_head
from slim.loading.load_model import load_model
from slim.quantization.methods.gptq import GPTQ
from slim.training.tune import Full
from tests.support.encoding import build_encoder

SHORT = dict(window=32, batch_tokens=512, validation_tokens=1024, warmup=0.0)


def made(stage, source, target):
    """Run a stage and return its result's folder."""
    target.mkdir()
    stage.run(source, target, Context())
    check_result(target)
    return target


def measured(folder, data):
    """Return a classifier's metrics."""
    from slim.checkpoints.tokenizer import load_tokenizer

    part = Classification(data, window=32)
    with torch.inference_mode():
        return part.measure(load_model(folder), load_tokenizer(folder), 64)["metrics"]


@pytest.fixture(scope="module")
def headlines():
    return Headlines(count=400, noise=0.0)


@pytest.fixture(scope="module")
def untrained(headlines, tmp_path_factory):
    sizes = dict(hidden_size=32, intermediate_size=64, blocks=2, heads=2, vocab_size=400)
    stage = UntrainedEncoder(headlines, context_length=64, dropout=0.0, **sizes)
    return made(stage, None, tmp_path_factory.mktemp("untrained") / "model")


@pytest.fixture(scope="module")
def trained(headlines, untrained, tmp_path_factory):
    stage = Full(headlines, steps=60, learning_rate=2e-3, validate_every=20, **SHORT)
    return made(stage, untrained, tmp_path_factory.mktemp("trained") / "model")


def test_training_finds_what_makes_readers_comment(trained, headlines):
    assert measured(trained, headlines)["accuracy"] > 0.8


def test_vocabulary_is_marks_characters_and_frequent_words():
    counts = Counter({"tax": 3, "a": 2, "ax": 1})
    tokens = list(wordpieces(counts, 5 + 6 + 1))
    assert tokens[5:] == ["a", "t", "x", "##a", "##t", "##x", "tax"]


def test_training_keeps_the_names_of_the_classes(trained):
    assert open_checkpoint(trained).spec.labels == ["few", "many"]


def test_quantized_classifier_decides_nearly_as_before(trained, headlines, tmp_path):
    calibration = LabelledCalibration(headlines, samples=16, length=32)
    stage = GPTQ(bits=4, group_size=32, calibration=calibration)
    quantized = made(stage, trained, tmp_path / "quantized")
    before, after = measured(trained, headlines), measured(quantized, headlines)
    assert abs(after["accuracy"] - before["accuracy"]) < 0.08


def test_student_of_half_the_blocks_learns_from_the_whole(trained, headlines, tmp_path):
    student = made(Layers(every=2), trained, tmp_path / "student")
    stage = Distill(
        headlines,
        base=Source(str(trained)),
        match=Matching(hidden=1.0),
        steps=80,
        learning_rate=2e-3,
        validate_every=40,
        **SHORT,
    )
    stage.check(open_checkpoint(student).spec)
    taught = made(stage, student, tmp_path / "taught")
    before, after = measured(student, headlines), measured(taught, headlines)
    assert after["class_nll"] < before["class_nll"]
    assert after["accuracy"] > 0.8


def test_distillation_loss_is_that_of_its_formula(trained, untrained, headlines):
    from slim.checkpoints.tokenizer import load_tokenizer
    from slim.distillation.classes import ClassDistillation
    from slim.distillation.losses import LOSSES
    from slim.training.batches import in_order

    data = Headlines(count=60)
    (batch,) = in_order(data.labelled(TRAIN, load_tokenizer(trained), 32), 60)
    teacher, student = load_model(trained), load_model(untrained)
    goal = ClassDistillation(teacher, [0, 1], LOSSES["forward"].divergence(), 2.0, 0.25)
    inputs = dict(input_ids=batch["tokens"], attention_mask=batch["mask"])
    with torch.no_grad():
        got = goal(student, batch)
        p = (teacher(**inputs).logits / 2).softmax(-1)
        logits = student(**inputs).logits
        q = (logits / 2).softmax(-1)
        soft = (p * (p.log() - q.log())).sum()
        hard = -logits.log_softmax(-1)[torch.arange(len(p)), batch["labels"][:, 1]].sum()
    assert got.item() == pytest.approx((0.75 * 4 * soft + 0.25 * hard).item(), rel=1e-4)


def test_balanced_weights_make_all_classes_count_the_same(untrained):
    from slim.checkpoints.tokenizer import load_tokenizer

    data = Headlines(count=400, class_weights="balanced")
    windows = data.labelled(TRAIN, load_tokenizer(untrained), 32)
    weights = windows.weights[windows.labels[:, 1].long()]
    few = weights[windows.labels[:, 1] == 0].sum()
    many = weights[windows.labels[:, 1] == 1].sum()
    assert few == pytest.approx(many.item(), rel=1e-5)
    assert weights.mean().item() == pytest.approx(1, rel=1e-5)


def test_loss_is_the_weighted_cross_entropy(untrained):
    from slim.checkpoints.tokenizer import load_tokenizer
    from slim.training.batches import in_order
    from slim.training.forward import batch_nll

    data = Headlines(count=60, class_weights={"many": 3.0})
    windows = data.labelled(TRAIN, load_tokenizer(untrained), 32)
    model = load_model(untrained)
    (batch,) = in_order(windows, len(windows))
    with torch.no_grad():
        got = batch_nll(model, batch)
        wanted = 0.0
        for row in range(len(windows)):
            filled = windows.tokens[row] != windows.pad
            logits = model(input_ids=windows.tokens[row][filled][None].long()).logits[0]
            label = int(windows.labels[row, 1])
            wanted -= windows.weights[label] * logits.log_softmax(-1)[label]
    assert got.item() == pytest.approx(wanted.item(), rel=1e-4)


def test_macro_f1_is_the_mean_over_classes():
    # class 0: 2 hits, 1 wrong; class 1: 1 hit, 1 wrong
    assert macro_f1([0, 0, 0, 1], [0, 0, 1, 1]) == pytest.approx((4 / 5 + 2 / 3) / 2)


def test_calibration_error_is_the_gap_between_confidence_and_accuracy():
    # one bin of two texts at 0.9 with one right, one of a text at 0.55 that is right
    error = calibration_error([0.92, 0.94, 0.55], [1, 0, 1])
    assert error == pytest.approx((2 * abs(0.5 - 0.93) + abs(1 - 0.55)) / 3)


def test_new_head_leaves_the_encoder_as_it_is(tmp_path):
    source = build_encoder("bert", tmp_path / "body", "embedding")
    stage = WithHead(Source(str(source)), ["a", "b", "c"])
    result = made(stage, None, tmp_path / "head")
    assert open_checkpoint(result).spec.labels == ["a", "b", "c"]
    before = load_model(source).state_dict()
    after = load_model(result).bert.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_head_that_knows_the_classes_stays(tmp_path):
    spec = open_checkpoint(build_encoder("bert", tmp_path / "model")).spec
    assert not lacks_head(spec, ["LABEL_1", "LABEL_0"])


def test_head_for_other_classes_is_replaced(tmp_path):
    spec = open_checkpoint(build_encoder("bert", tmp_path / "model")).spec
    assert lacks_head(spec, ["many", "few"])


def test_decoder_gets_no_head():
    with pytest.raises(SlimError, match="is no encoder"):
        WithHead(Source("tiny"), ["a", "b"]).describe()


# Bad input


def written(path, rows):
    path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    return str(path)


def test_csv_with_semicolons_and_numbers_becomes_two_classes(tmp_path):
    path = tmp_path / "news.csv"
    path.write_text('title;comments\n"Snow; again";3\nTaxes;40\nRain;5\nFines;22\n', "utf-8")
    data = LabelledTexts(
        text=str(path), column="title", label="comments", threshold=20, validation_fraction=0.001
    )
    labels = {example.text: example.label for example in data.examples(TRAIN)}
    assert labels == {"Snow; again": "few", "Taxes": "many", "Rain": "few", "Fines": "many"}


def test_one_class_only_is_refused(tmp_path):
    rows = [{"text": f"text {number}", "label": "news"} for number in range(9)]
    data = LabelledTexts(text=written(tmp_path / "one.jsonl", rows))
    with pytest.raises(SlimError, match=r"one class only \('news'\)"):
        data.classes  # noqa: B018 - the property reads


def test_missing_column_is_named_with_those_there_are(tmp_path):
    data = LabelledTexts(text=written(tmp_path / "some.jsonl", [{"title": "a", "topic": "b"}]))
    with pytest.raises(SlimError, match=r"no column 'text' \(has: title, topic\)"):
        list(data.examples(TRAIN))


def test_label_that_is_no_number_is_refused_where_numbers_are_needed(tmp_path):
    rows = [{"text": "a", "label": "many"}]
    data = LabelledTexts(text=written(tmp_path / "some.jsonl", rows), threshold=3)
    with pytest.raises(SlimError, match="needs numbers in column 'label', and 'many' is none"):
        list(data.examples(TRAIN))


def test_row_with_more_cells_than_headings_is_refused(tmp_path):
    path = tmp_path / "bad.csv"
    path.write_text("text,label\nYes, indeed,good\n", encoding="utf-8")
    with pytest.raises(SlimError, match="line 2: 3 cells where the headings name 2"):
        list(LabelledTexts(text=str(path)).examples(TRAIN))


def test_classifier_refuses_plain_text(trained):
    with pytest.raises(SlimError, match="is a classifier and learns from texts with labels"):
        Full(TinyText()).check(open_checkpoint(trained).spec)


def test_decoder_refuses_labels(headlines):
    from slim.checkpoints.source import EMBEDDED

    with pytest.raises(SlimError, match="is a decoder"):
        Full(headlines).check(open_checkpoint(EMBEDDED["tiny"]).spec)


def test_class_that_the_model_does_not_know_is_refused(trained, tmp_path):
    rows = [{"text": f"text {n}", "label": ("few", "lots")[n % 2]} for n in range(9)]
    data = LabelledTexts(text=written(tmp_path / "some.jsonl", rows))
    with pytest.raises(SlimError, match="has the class 'lots'"):
        Full(data, window=32, batch_tokens=512).check(open_checkpoint(trained).spec)

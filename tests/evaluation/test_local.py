"""Stock tasks from local files, and lm-eval's own figures: word, byte perplexity and accuracies to
all digits."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from slim.checkpoints.tokenizer import load_tokenizer
from slim.core.errors import SlimError
from slim.evaluation.documents import DocumentPerplexity, blocks
from slim.evaluation.local_data import required_fields
from slim.evaluation.task_files import find_task, shipped_folder
from slim.evaluation.tasks import Tasks
from slim.loading.load_model import load_model
from tests.conftest import ROOT

# One row per stock task, invented, in the schema that its data set has on the hub.
HUB_ROWS = {
    "arc_easy": {"question": "What is red?", "choices": {"text": ["a rose", "milk"], "label": ["A", "B"]}, "answerKey": "A"},
    "boolq": {"passage": "The hen sat.", "question": "did the hen sit", "label": 1},
    "hellaswag": {
        "ctx_a": "A man sits.", "ctx_b": "he", "activity_label": "Sitting", "endings": ["stands.", "rains."], "label": "0",
    },
    "openbookqa": {"question_stem": "Snow is", "choices": {"text": ["cold", "hot"], "label": ["A", "B"]}, "answerKey": "A"},
    "piqa": {"goal": "Cut bread", "sol1": "with a knife", "sol2": "with a cup", "label": 0},
    "truthfulqa_mc2": {"question": "Is it so?", "mc2_targets": {"choices": ["Yes.", "No."], "labels": [1, 0]}},
    "winogrande": {"sentence": "Ann saw Eve and _ waved.", "option1": "Ann", "option2": "Eve", "answer": "1"},
}  # fmt: skip


@pytest.fixture(scope="module")
def tiny():
    folder = ROOT / "slim" / "assets" / "tiny"
    return load_model(folder), load_tokenizer(folder)


@pytest.fixture(scope="module")
def hub(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("hub")
    for name, row in HUB_ROWS.items():
        (folder / f"{name}.jsonl").write_text((json.dumps(row) + "\n") * 3)
    return folder


def test_every_task_of_the_studies_runs_from_local_files(tiny, hub):
    """All tasks of eval=thesis and eval=pruner_study, but ARC-challenge, which the slow test
    compares to all digits."""
    tasks = Tasks(list(HUB_ROWS), local_data=str(hub))
    tasks.check()
    found = tasks.measure(*tiny, 512)
    for name in HUB_ROWS:
        assert found["protocol"][name]["questions"] == 3
        assert 0 <= found["metrics"][f"{name}/acc"] <= 1
        assert [row["doc_id"] for row in found["records"][name]] == [0, 1, 2]
    assert json.loads(json.dumps(found)) == found
    row = found["records"]["piqa"][0]
    assert (row["context"], row["choices"]) == (
        "Question: Cut bread\nAnswer:",
        [" with a knife", " with a cup"],
    )


@pytest.mark.parametrize("name", sorted(HUB_ROWS))
def test_a_missing_field_is_named_with_its_line_before_any_work(name, tmp_path):
    for field in required_fields(find_task(name)):
        row = {key: value for key, value in HUB_ROWS[name].items() if key != field}
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(row) + "\n")
        with pytest.raises(
            SlimError,
            match=rf"{name}\.jsonl, line 1: the field '{field}' is missing \(has: .*needs: ",
        ):
            Tasks([name], local_data=str(tmp_path)).check()
    assert required_fields(find_task(name)) == set(HUB_ROWS[name])


def test_a_field_missing_in_one_row_or_inside_another(tiny, tmp_path):
    good, path = HUB_ROWS["arc_easy"], tmp_path / "arc_easy.jsonl"
    path.write_text(
        json.dumps(good)
        + "\n"
        + json.dumps({**good, "answerKey": None}).replace("answerKey", "answer")
        + "\n"
    )
    with pytest.raises(
        SlimError,
        match=r"arc_easy\.jsonl, line 2: expected .*answerKey.*It has: question, choices, answer\.",
    ):
        Tasks(["arc_easy"], local_data=str(tmp_path)).check()
    path.write_text(json.dumps({**good, "choices": {"label": ["A", "B"]}}) + "\n")
    with pytest.raises(SlimError, match=r"arc_easy\.jsonl: not in the hub's schema"):
        Tasks(["arc_easy"], local_data=str(tmp_path)).measure(*tiny, 512)


def test_missing_files_are_named(tmp_path):
    with pytest.raises(SlimError, match="is not a folder"):
        Tasks(["piqa"], local_data=str(tmp_path / "no")).check()
    (tmp_path / "boolq.jsonl").write_text("{}")
    with pytest.raises(
        SlimError, match=r"has no piqa\.jsonl for the task 'piqa'\. There: boolq\.jsonl"
    ):
        Tasks(["piqa"], local_data=str(tmp_path)).check()
    Tasks(["tiny_facts"], local_data=str(tmp_path)).check()  # embedded tasks have their own


def test_the_local_file_is_part_of_the_identity(hub, tmp_path):
    task = Tasks(["piqa"], local_data=str(hub))
    (tmp_path / "piqa.jsonl").write_bytes((hub / "piqa.jsonl").read_bytes())
    assert (
        Tasks(["piqa"], local_data=str(tmp_path)).cache_key()
        == task.cache_key()
        != Tasks(["piqa"]).cache_key()
    )
    (tmp_path / "piqa.jsonl").write_text(json.dumps(HUB_ROWS["piqa"]) + "\n")
    assert Tasks(["piqa"], local_data=str(tmp_path)).cache_key() != task.cache_key()


def test_examples_come_from_the_training_file_and_follow_the_seed(tiny, hub, tmp_path):
    (tmp_path / "piqa.jsonl").write_bytes((hub / "piqa.jsonl").read_bytes())
    goals = ["Wash a cup", "Open a door", "Peel an egg", "Light a fire"]
    rows = [{"goal": goal, "sol1": "so", "sol2": "not so", "label": 0} for goal in goals]
    (tmp_path / "piqa_train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def contexts(seed: int) -> list[str]:
        part = Tasks(["piqa"], local_data=str(tmp_path), num_fewshot=1, seed=seed)
        return [row["context"] for row in part.measure(*tiny, 512)["records"]["piqa"]]

    first = contexts(1234)
    assert all(any(goal in context for goal in goals) for context in first) and first == contexts(
        1234
    )
    assert any(contexts(seed) != first for seed in (1, 2, 3))


def test_blocks_score_every_token_once_with_all_the_context_there_is():
    assert list(blocks(5, 8)) == [(0, 0, 5)]
    assert list(blocks(8, 4)) == [(0, 0, 4), (4, 4, 8)]
    assert list(blocks(10, 4)) == [(0, 0, 4), (4, 4, 8), (6, 8, 10)]


def test_document_perplexities_equal_those_of_the_wikitext_task(
    tiny, shared, tmp_path, monkeypatch
):
    """Our chunked computation against lm-eval's, on two pages; and lm-eval's task with its logits
    in slices."""
    pages = (shared / "data" / "wikitext2_raw_test.jsonl").read_text().splitlines()[:2]
    pages = [
        json.dumps({"page": json.loads(page)["page"][: 3000 - 1400 * i]})
        for i, page in enumerate(pages)
    ]
    (tmp_path / "wikitext.jsonl").write_text("\n".join(pages) + "\n")
    part = DocumentPerplexity(
        str(tmp_path / "wikitext.jsonl"), column="page", detokenizer="wikitext"
    )
    ours = part.measure(*tiny, 200)
    harness = Tasks(["wikitext"], local_data=str(tmp_path)).measure(*tiny, 200)
    names = ("word_perplexity", "byte_perplexity", "bits_per_byte")
    assert ours["metrics"] == pytest.approx(
        {name: harness["metrics"][f"wikitext/{name}"] for name in names}, rel=1e-5
    )
    assert ours["protocol"]["documents"] == 2 and ours["records"]["bytes"][0] == len(
        json.loads(pages[0])["page"].encode()
    )
    from slim.evaluation import harness as module

    monkeypatch.setattr(module, "LOGITS_AT_ONCE", 1)
    sliced = Tasks(["wikitext"], local_data=str(tmp_path)).measure(*tiny, 200)["metrics"]
    assert sliced == pytest.approx(harness["metrics"], rel=1e-5) and sliced != harness["metrics"]


def test_plain_text_is_one_document(tiny, tmp_path):
    (tmp_path / "a.txt").write_text("Luke keeps a hen.\nThe hen sits.")
    found = DocumentPerplexity(str(tmp_path / "a.txt")).measure(*tiny, 512)
    assert (found["records"]["words"], found["records"]["bytes"]) == ([7], [31])
    (tmp_path / "a.txt").write_text("")
    with pytest.raises(SlimError, match="is empty"):
        DocumentPerplexity(str(tmp_path / "a.txt")).measure(*tiny, 512)


YAML = """\
include: {stock}
task: {name}_here
dataset_path: json
dataset_name: null
dataset_kwargs:
  data_files:
    test: {data}
training_split: null
validation_split: null
test_split: test
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "file", "limit"),
    [("arc_challenge", "arc_challenge", 100), ("wikitext", "wikitext2_raw_test", 3)],
)
def test_our_figures_equal_those_of_the_command_line_of_lm_eval(
    name, file, limit, ref_llama, shared, tmp_path
):
    stock = find_task(name)
    data = shared / "data" / f"{file}.jsonl"
    (tmp_path / "here.yaml").write_text(YAML.format(stock=stock, name=name, data=data))
    assert shipped_folder() in stock.parents
    arguments = f"pretrained={ref_llama},dtype=float32,softmax_dtype=float32,max_length=1024"
    command = [
        sys.executable, "-m", "lm_eval", "--model", "hf", "--model_args", arguments, "--device", "cpu", "--batch_size", "8",
        "--tasks", f"{name}_here", "--include_path", str(tmp_path), "--limit", str(limit),
        "--output_path", str(tmp_path / "out"),
    ]  # fmt: skip
    subprocess.run(
        command,
        check=True,
        env={**os.environ, "HF_HOME": str(tmp_path / "cache")},
        capture_output=True,
    )
    (written,) = (tmp_path / "out").rglob("results_*.json")
    theirs = json.loads(written.read_text())["results"][f"{name}_here"]
    found = Tasks([name], local_data=str(shared / "data"), limit=limit, batch_size=8).measure(
        load_model(ref_llama), load_tokenizer(ref_llama), 1024
    )
    ours = {
        key.split("/")[1]: value
        for key, value in found["metrics"].items()
        if key.startswith(name + "/")
    }
    theirs = {
        key.split(",")[0]: value
        for key, value in theirs.items()
        if isinstance(value, float) and "," in key
    }
    assert ours == theirs and len(ours) >= 3

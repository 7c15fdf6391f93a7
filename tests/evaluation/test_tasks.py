"""Tasks against a direct log-likelihood computation; finding task files; bad ones."""

from __future__ import annotations

import json
import math
import subprocess
import sys

import pytest
import torch

from slim.checkpoints.tokenizer import load_tokenizer
from slim.core.errors import SlimError
from slim.evaluation import task_files
from slim.evaluation.task_files import data_files, find_task, fingerprint, read_rows
from slim.evaluation.tasks import Tasks, mean
from slim.loading.load_model import load_model
from tests.conftest import ROOT

TASK = """\
task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: questions.jsonl
test_split: test
output_type: multiple_choice
doc_to_text: "Question: {{{{question}}}}\\nAnswer:"
doc_to_choice: choices
doc_to_target: answer
metric_list:
  - metric: acc
  - metric: acc_norm
"""
ROWS = [
    {"question": "Who sleeps in the stable?", "choices": ["the goat", "the letter"], "answer": 0},
    {"question": "What is red?", "choices": ["the green box", "rose"], "answer": 1},
    {"question": "Luke went out. What then?", "choices": ["He came back.", "Ten."], "answer": 1},
    {"question": "Where is the hen?", "choices": ["in the yard", "in the seven"], "answer": 0},
    {"question": "When?", "choices": ["On Sunday", "Because"], "answer": 1},
]


def write_task(folder, rows=ROWS, name="own") -> str:
    folder.mkdir(exist_ok=True)
    (folder / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "own.yaml").write_text(TASK.format(name=name))
    return str(folder / "own.yaml")


@pytest.fixture(scope="module")
def tiny():
    folder = ROOT / "slim" / "assets" / "tiny"
    return load_model(folder), load_tokenizer(folder)


def log_likelihood(model, tokenizer, context: str, answer: str) -> float:
    """Score one answer on its own, as the sum of log p(token | everything before it)."""
    before, whole = tokenizer(context)["input_ids"], tokenizer(context + answer)["input_ids"]
    with torch.no_grad():
        scores = model(torch.tensor([whole])).logits[0].double().log_softmax(-1)
    return sum(scores[i - 1, whole[i]].item() for i in range(len(before), len(whole)))


def direct_accuracies(model, tokenizer, rows: list[dict]) -> tuple[float, float]:
    """Return (acc, acc_norm) over rows with question, choices, answer."""
    right, right_by_length = 0, 0
    for row in rows:
        scores = [
            log_likelihood(model, tokenizer, f"Question: {row['question']}\nAnswer:", " " + choice)
            for choice in row["choices"]
        ]
        by_length = [
            score / len(choice) for score, choice in zip(scores, row["choices"], strict=True)
        ]
        right += scores.index(max(scores)) == row["answer"]
        right_by_length += by_length.index(max(by_length)) == row["answer"]
    return right / len(rows), right_by_length / len(rows)


@pytest.mark.parametrize("name", ["tiny_facts", "tiny_pronouns", "tiny_next"])
def test_embedded_tasks_equal_the_direct_computation(tiny, name):
    model, tokenizer = tiny
    metrics = Tasks([name], limit=40).measure(model, tokenizer, 512)["metrics"]
    rows = read_rows(data_files(find_task(name))["test"])[:40]
    acc, acc_norm = direct_accuracies(model, tokenizer, rows)
    assert (metrics[f"{name}/acc"], metrics[f"{name}/acc_norm"]) == (acc, acc_norm)
    assert metrics[f"{name}/acc_stderr"] == pytest.approx(math.sqrt(acc * (1 - acc) / 39))
    assert metrics["tasks/acc"] == acc


def test_the_mean_is_over_tasks_and_the_batch_does_not_matter(tiny):
    first = Tasks(["tiny_facts", "tiny_next"], limit=12).measure(*tiny, 512)
    second = Tasks(["tiny_facts", "tiny_next"], limit=12, batch_size=5).measure(*tiny, 512)
    assert first["metrics"] == second["metrics"] and first["protocol"] == second["protocol"]
    for task, rows in first["records"].items():
        for row, other in zip(rows, second["records"][task], strict=True):
            assert row["scores"] == pytest.approx(other["scores"], rel=1e-5, abs=1e-6)
    metrics = first["metrics"]
    assert metrics["tasks/acc"] == pytest.approx(
        (metrics["tiny_facts/acc"] + metrics["tiny_next/acc"]) / 2
    )
    protocol = {**first["protocol"]["tiny_facts"]}
    assert len(protocol.pop("questions_sha256")) == 64
    assert protocol == {"questions": 12, "num_fewshot": 0, "version": 1.0}


def test_an_altered_data_file_gives_another_result_and_another_identity(tiny, tmp_path):
    path = write_task(tmp_path)
    before, cache_key = Tasks([path]).measure(*tiny, 512)["metrics"], Tasks([path]).cache_key()
    assert before["own/acc"] == direct_accuracies(*tiny, ROWS)[0]
    write_task(tmp_path, [{**row, "answer": 1 - row["answer"]} for row in ROWS])
    after = Tasks([path]).measure(*tiny, 512)["metrics"]
    assert after["own/acc"] == pytest.approx(1 - before["own/acc"]) != before["own/acc"]
    assert Tasks([path]).cache_key() != cache_key


def test_fewshot_examples_change_the_context(tiny, tmp_path):
    path = write_task(tmp_path)
    found = Tasks([path], num_fewshot=2).measure(*tiny, 512)
    assert found["protocol"]["own"]["num_fewshot"] == 2
    assert found == Tasks([path], num_fewshot=2).measure(*tiny, 512)
    assert Tasks([path], num_fewshot=2).cache_key() != Tasks([path]).cache_key()


def test_a_stock_task_equals_the_direct_computation(tiny, shared, monkeypatch):
    """ARC-challenge from lm-eval's own YAML file, on questions in the hub's schema."""
    import datasets

    rows = read_rows([shared / "data" / "arc_challenge.jsonl"])[:24]
    split = datasets.Dataset.from_list(rows)
    asked = []

    def load(path, name, **_):
        asked.append((path, name))
        return dict.fromkeys(("train", "validation", "test"), split)

    monkeypatch.setattr(datasets, "load_dataset", load)
    metrics = Tasks(["arc_challenge"]).measure(*tiny, 512)["metrics"]
    plain = [
        {
            "question": row["question"],
            "choices": row["choices"]["text"],
            "answer": row["choices"]["label"].index(row["answerKey"]),
        }
        for row in rows
    ]
    assert (metrics["arc_challenge/acc"], metrics["arc_challenge/acc_norm"]) == direct_accuracies(
        *tiny, plain
    )
    assert asked == [("allenai/ai2_arc", "ARC-Challenge")]


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("arc_challenge", "arc/arc_challenge.yaml"),
        ("winogrande", "winogrande/default.yaml"),
        ("hellaswag", "hellaswag/hellaswag.yaml"),
        ("boolq", "super_glue/boolq/default.yaml"),
        ("truthfulqa_mc2", "truthfulqa/truthfulqa_mc2.yaml"),
    ],
)
def test_stock_tasks_are_found_by_name(name, file):
    assert find_task(name) == task_files.shipped_folder() / file


def test_names_are_checked_without_importing_the_harness():
    code = (
        "import sys; from slim.evaluation.tasks import Tasks; Tasks(['arc_challenge', 'tiny_facts']).check();"
        "Tasks(['arc_easy', 'tiny_facts']).cache_key();"
        "assert not {'lm_eval', 'datasets', 'torch', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_a_missing_task_gives_the_nearest_names():
    with pytest.raises(
        SlimError, match=r"no task 'arc_chalenge'.*arc_challenge.*Embedded: tiny_facts"
    ):
        Tasks(["arc_chalenge"]).check()
    with pytest.raises(SlimError, match="Nearest: tiny_facts"):
        Tasks(["tiny_fact"]).check()
    with pytest.raises(SlimError, match="'mmlu' is a group of tasks.*mmlu_"):
        Tasks(["mmlu"]).check()
    with pytest.raises(SlimError, match="no task file none.yaml"):
        Tasks(["none.yaml"]).check()


def test_bad_task_files_are_named(tiny, tmp_path):
    path = write_task(tmp_path)
    with pytest.raises(SlimError, match="two tasks called 'own'"):
        Tasks([path, write_task(tmp_path / "again")]).check()
    (tmp_path / "questions.jsonl").write_text(json.dumps(ROWS[0]) + "\n{not json\n")
    with pytest.raises(SlimError, match=r"questions\.jsonl, line 2: not JSON"):
        Tasks([path]).check()
    (tmp_path / "questions.jsonl").write_text(json.dumps(ROWS[0]) + '\n{"question": "Who?"}\n')
    with pytest.raises(
        SlimError,
        match=r"line 2: expected a JSON object with the fields: question, choices, answer",
    ):
        Tasks([path]).check()
    (tmp_path / "questions.jsonl").write_text(json.dumps({"question": "Who?", "answer": 1}) + "\n")
    with pytest.raises(
        SlimError, match=r"questions\.jsonl, line 1: the field 'choices' is missing"
    ):
        Tasks([path]).check()
    (tmp_path / "questions.jsonl").unlink()
    with pytest.raises(SlimError, match=r"questions\.jsonl, which is not there"):
        Tasks([path]).check()


def test_an_identity_holds_included_files_and_code(tmp_path):
    base = write_task(tmp_path, name="base")
    (tmp_path / "code.py").write_text("def text(doc):\n    return doc['question']\n")
    (tmp_path / "child.yaml").write_text(
        "include: own.yaml\ntask: child\ndoc_to_text: !function code.text\n"
    )
    child = str(tmp_path / "child.yaml")
    assert set(fingerprint(child)["files"]) == {
        "child.yaml",
        "own.yaml",
        "code.py",
        "questions.jsonl",
    }
    seen = [fingerprint(child)]
    for name in ("code.py", "own.yaml", "questions.jsonl"):
        with (tmp_path / name).open("a") as file:
            file.write("\n")
        seen.append(fingerprint(child))
        assert seen[-1] != seen[-2]
    assert fingerprint(base)["task"] == "base"


def test_a_stock_task_without_network_is_a_clear_error(tiny):
    with pytest.raises(SlimError, match=r"(?s)default\.yaml cannot be set up.*without a network"):
        Tasks(["winogrande"], limit=2).measure(*tiny, 512)


def test_nan_is_not_counted_as_an_answer(tmp_path):
    folder = ROOT / "slim" / "assets" / "tiny"
    model, tokenizer = load_model(folder), load_tokenizer(folder)
    with torch.no_grad():
        model.model.norm.weight[3] = math.nan
    metrics = Tasks([write_task(tmp_path)]).measure(model, tokenizer, 512)["metrics"]
    assert math.isnan(metrics["own/acc"]) and math.isnan(metrics["tasks/acc"])
    assert math.isnan(mean([0.5, math.nan])) and mean([0.5, 1.0]) == 0.75


def test_nothing_is_written_to_the_terminal(tiny, tmp_path, capfd):
    Tasks([write_task(tmp_path)]).measure(*tiny, 512)
    captured = capfd.readouterr()
    assert captured.out == "" and captured.err == ""


@pytest.mark.parametrize("wrong", [{"limit": 0}, {"num_fewshot": -1}, {"batch_size": 0}])
def test_settings_are_checked(wrong):
    with pytest.raises(SlimError, match=f"eval.tasks.{next(iter(wrong))}="):
        Tasks(["tiny_facts"], **wrong)


def test_the_same_name_twice_is_refused():
    with pytest.raises(SlimError, match="different task names"):
        Tasks(["tiny_facts", "tiny_facts"])


def asked(tiny, folder, choices, question="Where is the hen?", **settings):
    """Measure a task whose last question has these choices, in a context of 64 tokens."""
    rows = [*ROWS, {"question": question, "choices": choices, "answer": 0}]
    return Tasks([write_task(folder, rows)], **settings).measure(*tiny, 64)


@pytest.mark.parametrize("choices", [["Leo", ""], ["", "Leo"], ["Leo", " "], ["Leo", 7], [], "ab"])
def test_an_empty_answer_is_refused_before_any_work(tmp_path, choices):
    rows = [*ROWS, {"question": "Who?", "choices": choices, "answer": 0}]
    with pytest.raises(SlimError, match=r"questions\.jsonl, row 6: the field 'choices'"):
        Tasks([write_task(tmp_path, rows)]).check()


def test_an_answer_that_a_template_makes_empty_is_refused_with_its_question(tiny, tmp_path):
    path = write_task(tmp_path)
    second = 'choices[1] if question != "When?" else ""'
    made = f"doc_to_choice: '{{{{[choices[0], {second}]}}}}'\ntarget_delimiter: \"\""
    yaml = TASK.format(name="own").replace("doc_to_choice: choices", made)
    (tmp_path / "own.yaml").write_text(yaml)
    with pytest.raises(SlimError, match=r"An answer to 'Question: When\? Answer:' is empty"):
        Tasks([path]).measure(*tiny, 64)


@pytest.mark.parametrize("words", [65, 300])
def test_an_answer_longer_than_the_context_is_refused(tiny, tmp_path, words):
    with pytest.raises(
        SlimError, match=r"the hen\? Answer:' has \d+ tokens, more than the context of 64"
    ):
        asked(tiny, tmp_path, ["in the yard", "the goat " * words])


def test_a_question_longer_than_the_context_is_cut_and_said_so(tiny, tmp_path, capsys):
    question = "The goat sleeps. " * 40
    found = asked(tiny, tmp_path, ["in the yard", "on Sunday"], question)
    assert found["protocol"]["own"]["questions"] == len(ROWS) + 1
    assert "2 of 12 answers with their questions" in " ".join(capsys.readouterr().err.split())


def test_the_same_answer_twice_is_measured(tiny, tmp_path):
    found = asked(tiny, tmp_path, ["in the yard", "in the yard"])
    assert math.isfinite(found["metrics"]["own/acc"])


@pytest.mark.parametrize("examples", [5, 6, 50])
def test_more_solved_examples_than_there_are_is_refused(tiny, tmp_path, examples):
    with pytest.raises(SlimError, match=r"has 5 solved examples.*at most 4"):
        Tasks([write_task(tmp_path)], num_fewshot=examples).measure(*tiny, 512)


def test_as_many_solved_examples_as_there_are_besides_the_question(tiny, tmp_path):
    found = Tasks([write_task(tmp_path)], num_fewshot=4).measure(*tiny, 512)
    assert found["protocol"]["own"]["num_fewshot"] == 4


GENERATED = """\
task: own
dataset_path: json
dataset_kwargs:
  data_files:
    test: questions.jsonl
test_split: test
output_type: generate_until
doc_to_text: "Question: {{question}}\\nAnswer:"
doc_to_target: answer
generation_kwargs:
  until: ["\\n"]
  max_gen_toks: NUMBER
  do_sample: false
metric_list:
  - metric: exact_match
"""


def generated(folder, tokens: int) -> str:
    path = write_task(folder, [{"question": "Who?", "answer": "Leo"}] * 2)
    (folder / "own.yaml").write_text(GENERATED.replace("NUMBER", str(tokens)))
    return path


@pytest.mark.parametrize("tokens", [64, 65, 600])
def test_generation_beyond_the_context_is_refused(tiny, tmp_path, tokens):
    with pytest.raises(SlimError, match=rf"max_gen_toks={tokens} tokens.*context of 64"):
        Tasks([generated(tmp_path, tokens)]).measure(*tiny, 64)


def test_generation_within_the_context_is_measured(tiny, tmp_path):
    found = Tasks([generated(tmp_path, 8)]).measure(*tiny, 64)
    assert found["metrics"]["own/exact_match"] == 0.0


@pytest.mark.parametrize("answer", ["2", 2, 7, -1, None, "Tom", [0]])
def test_a_right_answer_that_is_none_of_the_choices_is_refused(tmp_path, answer):
    rows = [*ROWS, {"question": "Who?", "choices": ["Leo", "Ida"], "answer": answer}]
    with pytest.raises(SlimError, match="row 6: the field 'answer' is .*none of the 2 choices"):
        Tasks([write_task(tmp_path, rows)]).check()


@pytest.mark.parametrize("answer", ["1", 1, "Ida"])
def test_a_right_answer_may_be_a_number_or_the_text(tmp_path, answer):
    rows = [{"question": "Who?", "choices": ["Leo", "Ida"], "answer": answer}]
    Tasks([write_task(tmp_path, rows)]).check()

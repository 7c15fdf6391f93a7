"""Questions from pages, against a stub server, and catalogues of one's own."""

from __future__ import annotations

import json
import re

import pytest

from slim.core.errors import SlimError
from slim.data.dialogues import Pairs
from slim.questions.__main__ import main
from slim.questions.catalogue import read_catalogue
from slim.questions.making import UNKNOWN, QuestionMaker, QuestionSettings
from slim.questions.pairs import Pair, agree, is_on_page, problem_of, read_pairs
from tests.conftest import ROOT

PAGE = "Die Reise nach Lübeck dauert mit dem Zug drei Stunden. Der Zug fährt am Montag."
GOOD = {"question": "Wie lange dauert die Reise nach Lübeck?", "answer": "drei Stunden"}
WRONG = {"question": "Wie heißt der Fahrer des Zuges nach Lübeck?", "answer": "Herr Petersen"}
VAGUE = {"question": "Wovon handelt dieser Text über Lübeck?", "answer": "Lübeck"}


def writer(second: str = "Sie dauert drei Stunden."):
    """Return a server that writes three questions about a page, and answers ``second``."""

    def script(_, body):
        if body["messages"][0]["content"].startswith("Write"):
            return "\n".join(json.dumps(row) for row in (GOOD, WRONG, VAGUE))
        return second

    return script


def maker(server, tmp_path, **settings) -> QuestionMaker:
    settings = {"endpoint": server.address, "wait": 0, "retries": 0, **settings}
    return QuestionMaker(QuestionSettings("m", **settings), tmp_path / "cache")


PAGES = [{"text": PAGE, "source": "a.pdf", "page": 3, "split": "train"}]


def test_a_question_that_its_page_answers_is_kept_with_its_place(serve, tmp_path):
    made = maker(serve(writer()), tmp_path)
    assert list(made.questions(PAGES)) == [{**GOOD, "source": "a.pdf", "page": 3, "split": "train"}]
    assert made.dropped == {"its answer is not on the page": 1, "asks about the page itself": 1}


@pytest.mark.parametrize(
    "second, reason",
    [
        (UNKNOWN, "not answerable from the page"),
        ("Am Montag.", "answered otherwise from the page"),
    ],
)
def test_a_question_that_the_page_does_not_answer_is_dropped(serve, tmp_path, second, reason):
    made = maker(serve(writer(second)), tmp_path)
    assert list(made.questions(PAGES)) == []
    assert made.dropped[reason] == 1


def test_the_same_question_is_kept_once_and_nothing_is_asked_twice(serve, tmp_path):
    server = serve(writer())
    rows = list(maker(server, tmp_path).questions([*PAGES, {"text": PAGE + " Ende."}]))
    assert len(rows) == 1
    count = len(server.requests)
    assert list(maker(server, tmp_path).questions(PAGES)) == rows
    assert len(server.requests) == count


def test_nonsense_ends_the_run_after_five_pages(serve, tmp_path):
    server = serve(lambda *_: "I am a teapot.")
    pages = [{"text": f"{PAGE} {number}"} for number in range(9)]
    with pytest.raises(SlimError, match="no usable question about 5 pages in a row"):
        list(maker(server, tmp_path).questions(pages))
    assert len(server.requests) == 5


def test_a_server_that_is_down_and_a_limit_say_what_is_kept(serve, tmp_path):
    down = serve(lambda *_: (503, "busy"))
    with pytest.raises(SlimError, match=r"HTTP 503 busy\.\n0 answers are kept"):
        list(maker(down, tmp_path).questions(PAGES))
    up = serve(writer())
    with pytest.raises(SlimError, match=r"limit of 1 tokens.*\n.*higher --max-tokens"):
        list(maker(up, tmp_path, max_tokens=1).questions(PAGES))


def test_a_checkpoint_folder_writes_questions_too(tmp_path):
    """The embedded model writes none; a page without room in its context ends nothing."""
    settings = QuestionSettings(str(ROOT / "slim" / "assets" / "tiny"), per_page=1)
    made = QuestionMaker(settings, tmp_path)
    assert list(made.questions([{"text": "Otto keeps a duck."}, {"text": PAGE * 99}])) == []
    assert made.dropped == {
        "no question that can be read (pages)": 2,
        "longer than the model's context (questions or pages)": 1,
    }


@pytest.mark.parametrize(
    "text",
    [
        '[{"question": "Was?", "answer": "Das"}]',
        'Gern:\n```json\n{"Question": "Was?", "Answer": "Das"}\n```',
        "Question: Was?\nAnswer: Das",
        "**Frage 1:** Was?\n**Antwort:** Das",
    ],
)
def test_pairs_are_read_in_the_forms_that_models_write(text):
    assert read_pairs(text) == [Pair("Was?", "Das")]


@pytest.mark.parametrize("text", ["", "{", '{"question": 1, "answer": null}', "Q A", "[[[["])
def test_what_holds_no_pair_gives_none(text):
    assert read_pairs(text) == []


def test_the_checks_by_words():
    assert is_on_page("in drei Stunden", PAGE)
    assert not is_on_page("in vier Tagen", PAGE)
    assert agree("drei Stunden", "Sie dauert drei Stunden.")
    assert not agree("drei Stunden", "am Montag")
    assert problem_of(Pair("What does the author say on this page?", "x")) != ""
    assert problem_of(Pair("Who wrote Faust in the year 1808?", "Goethe")) == ""


CATALOGUES = {
    "a.csv": 'question,answer\nWas ist das?,"Ein Haus, groß"\nWer?,Otto\n',
    "german.csv": "question;answer\nWas ist das?;Ein Haus, groß\nWer?;Otto\n",
    "a.tsv": "question\tanswer\nWas ist das?\tEin Haus, groß\nWer?\tOtto\n",
    "a.jsonl": '{"question": "Was ist das?", "answer": "Ein Haus, groß"}\n'
    '{"question": "Wer?", "answer": ["Otto", "Ottos"]}\n',
    "anki.txt": "#separator:tab\n#html:true\nWas ist das?\t<b>Ein Haus</b>, gro&szlig;\nWer?\tOtto\n",
    "cards.md": "# Karten\n\nQ: Was ist das?\nA: Ein Haus, groß\n\n**Frage:** Wer?\n**Antwort:** Otto\n",
}


@pytest.mark.parametrize("name", CATALOGUES)
def test_a_catalogue_in_any_form(tmp_path, name):
    (tmp_path / name).write_text(CATALOGUES[name], encoding="utf-8")
    rows = read_catalogue(tmp_path / name, "question", "answer")
    assert rows == [
        {"question": "Was ist das?", "answer": "Ein Haus, groß"},
        {"question": "Wer?", "answer": "Otto"},
    ]


def run(*arguments) -> int:
    return main([str(argument) for argument in arguments])


def test_a_catalogue_is_questions_for_distillation(tmp_path):
    cards = "question,answer\n" + "".join(f"Was ist {n}?,Zahl {n}\n" for n in range(40))
    (tmp_path / "a.csv").write_text(cards, encoding="utf-8")
    output = tmp_path / "q.jsonl"
    assert run(tmp_path / "a.csv", "--catalogue", "--output", output) == 0
    rows = [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]
    assert {row["split"] for row in rows} == {"train", "validation"}
    data = Pairs(text=str(output), prompt="question", answer=None)
    assert sorted(data.questions("train")) + sorted(data.questions("validation"))


def test_the_command_makes_questions_of_records(serve, tmp_path, capsys):
    (tmp_path / "pages.jsonl").write_text(json.dumps(PAGES[0]), encoding="utf-8")
    output = tmp_path / "q.jsonl"
    options = ["--endpoint", serve(writer()).address, "--model", "m", "--cache", tmp_path / "c"]
    assert run(tmp_path / "pages.jsonl", "--output", output, *options) == 0
    assert json.loads(output.read_text(encoding="utf-8"))["question"] == GOOD["question"]
    assert "1 dropped: asks about the page itself" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["none.jsonl", "--model", "m"], "none.jsonl is no file of records"),
        (["none.jsonl"], "--model FOLDER, or --endpoint"),
        (["none.csv", "--catalogue"], "There is no catalogue"),
        (["PAGES", "--model", "nothing"], "--model nothing is no checkpoint folder"),
        (["PAGES", "--model", "m", "--endpoint", "here"], "--endpoint=here is no address"),
        (
            ["CARDS", "--catalogue"],
            r"no column 'answer' \(has: question, Answer\)\. Did you mean An",
        ),
        (["CARDS", "--catalogue", "--validation-fraction", "2"], "--validation-fraction=2"),
    ],
)
def test_a_mistake_is_at_most_two_lines_and_code_2(tmp_path, capsys, arguments, message):
    (tmp_path / "PAGES.jsonl").write_text(json.dumps(PAGES[0]), encoding="utf-8")
    (tmp_path / "CARDS.csv").write_text("question,Answer\na,b\n", encoding="utf-8")
    names = {"PAGES": tmp_path / "PAGES.jsonl", "CARDS": tmp_path / "CARDS.csv"}
    first = names.get(arguments[0], arguments[0])
    assert run(first, *arguments[1:], "--output", tmp_path / "out.jsonl") == 2
    error = capsys.readouterr().err
    assert re.search(message, error)
    assert len(error.splitlines()) <= 2
    assert not (tmp_path / "out.jsonl").exists()

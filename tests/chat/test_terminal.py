"""The chat in the terminal."""

from __future__ import annotations

import io
import json

import pytest

from slim.chat.__main__ import main
from slim.chat.preferences import Preferences
from slim.chat.session import Session
from slim.chat.terminal import Terminal
from slim.chat.wrap import Wrapper
from slim.core.errors import SlimError
from slim.serve.model import Answer, TooLong
from slim.serve.sampling import Sampling
from tests.support.answering import ANSWER, QUESTION, tiny


def talk(monkeypatch, lines: list[str], tmp_path, models=1, asks=True) -> Terminal:
    """Type lines into a chat."""
    terminal = Terminal([tiny()] * models, {}, None, Preferences(tmp_path / "kept.jsonl"))
    typed = iter(lines)

    def read(prompt=""):
        try:
            return next(typed)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", read)
    terminal.asks = asks
    terminal.run()
    return terminal


def test_a_question_is_answered(monkeypatch, capsys, tmp_path):
    talk(monkeypatch, [QUESTION], tmp_path)
    shown = capsys.readouterr()
    assert shown.out == ANSWER + "\n"
    assert "read 11 tokens" in shown.err
    assert "tok/s" in shown.err


def test_what_is_said_fits_80_columns(monkeypatch, capsys, tmp_path):
    talk(monkeypatch, ["/help", QUESTION, "/set"], tmp_path)
    shown = capsys.readouterr()
    assert max(map(len, (shown.out + shown.err).splitlines())) <= 80


def test_the_conversation_is_remembered_until_it_is_reset(monkeypatch, tmp_path):
    session = talk(monkeypatch, [QUESTION, QUESTION], tmp_path).sessions[0]
    assert [turn["role"] for turn in session.turns] == ["user", "assistant"] * 2
    assert talk(monkeypatch, [QUESTION, "/reset"], tmp_path).sessions[0].turns == []


def test_the_last_answer_is_made_again(monkeypatch, capsys, tmp_path):
    session = talk(monkeypatch, [QUESTION, "/set max_tokens 3", "/again"], tmp_path).sessions[0]
    assert len(session.turns) == 2
    assert capsys.readouterr().out.splitlines() == [ANSWER, "A judge works"]


def test_a_line_may_go_on(monkeypatch, tmp_path):
    session = talk(monkeypatch, ["Where is the work \\", "of a judge done?"], tmp_path).sessions[0]
    assert session.turns[0]["content"] == "Where is the work \nof a judge done?"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/rest", "There is no command /rest. Did you mean /reset?"),
        ("/set heat 1", "There is no setting heat."),
        ("/set temperature hot", "/set temperature hot: must be a number."),
        ("/set temperature 3", "temperature=3: must be a number from 0 to 2."),
        ("/prefer 1", "There is no answer yet."),
        ("/undo", "There is no question yet."),
        ("/system Be kind.", "The chat template of tiny leaves out what a system says."),
        ("word " * 600, "and tiny has a context of 512"),
    ],
)
def test_a_mistake_is_answered_and_the_chat_continues(monkeypatch, capsys, tmp_path, line, message):
    talk(monkeypatch, [line, QUESTION], tmp_path)
    shown = capsys.readouterr()
    assert message in shown.err.replace("\n", " ")
    assert shown.out == ANSWER + "\n"


def test_the_preferred_answer_is_kept_for_a_judge(monkeypatch, capsys, tmp_path):
    from slim.evaluation.answers import Answers

    talk(monkeypatch, [QUESTION, "/prefer 1"], tmp_path)
    row = json.loads((tmp_path / "kept.jsonl").read_text())
    assert row["preferred"] == "tiny"
    questions = Answers(str(tmp_path / "kept.jsonl"), question="question", reference="reference")
    assert questions.pairs() == [(QUESTION, ANSWER)]


def test_a_line_that_a_crash_cut_off_stays_alone(tmp_path):
    (tmp_path / "kept.jsonl").write_text('{"question": "cut')
    preferences = Preferences(tmp_path / "kept.jsonl")
    preferences.add([{"role": "user", "content": "Grüße?"}], {"a": "Ja."}, "a")
    last = (tmp_path / "kept.jsonl").read_text(encoding="utf-8").splitlines()[-1]
    assert json.loads(last)["question"] == "Grüße?"


def test_ctrl_c_ends_the_answer_not_the_chat(monkeypatch, capsys, tmp_path):
    answer = Session.ask
    calls = []

    def broken_off(self, question, known, cancelled=None):
        calls.append(question)
        for piece in answer(self, question, known):
            yield piece
            if len(calls) == 1:
                raise KeyboardInterrupt

    monkeypatch.setattr(Session, "ask", broken_off)
    session = talk(monkeypatch, [QUESTION, QUESTION], tmp_path).sessions[0]
    assert "Interrupted" in capsys.readouterr().err
    assert len(session.turns) == 4


def test_the_oldest_turns_make_room():
    session = Session(tiny(), Sampling(max_tokens=8))
    session.turns = [
        {"role": "user", "content": "Who? " * 60},
        {"role": "assistant", "content": "A judge. " * 40},
    ] * 3
    ids = session.prompt(QUESTION)
    assert len(ids) + 8 <= 512
    assert session.left_out in (2, 4, 6)


def test_a_question_without_room_leaves_the_history_as_it_was():
    session = Session(tiny(), Sampling())
    with pytest.raises(TooLong):
        list(session.ask("word " * 600, Answer(0)))
    assert session.turns == []


def test_lines_break_between_words():
    wrapper = Wrapper(10)
    text = "".join(wrapper.add(piece) for piece in ("one t", "wo thr", "ee\nfour ", "elephantine!"))
    assert text + wrapper.finish() == "one two\nthree\nfour\nelephantin\ne!"


def test_a_terminal_gets_no_control_characters():
    wrapper = Wrapper(80)
    assert wrapper.add("a\x1b[2Jb\x07\rc\td ") + wrapper.finish() == "a[2Jbc    d"


def test_questions_from_a_file_end_at_a_mistake(monkeypatch, tmp_path):
    with pytest.raises(SlimError, match="context of 512"):
        talk(monkeypatch, ["word " * 600, QUESTION], tmp_path, asks=False)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing"], "There is no folder, file or result called nothing"),
        (["tiny"] * 4, "give at most 3"),
        (["tiny", "--temperature", "9"], "temperature=9.0: must be a number from 0 to 2."),
        (["tiny", "--context", "1000"], "tiny has room for 512 tokens"),
    ],
)
def test_a_mistake_in_the_command_has_exit_code_2(capsys, arguments, message):
    assert main(arguments) == 2
    assert message in capsys.readouterr().err


def test_the_command_answers_questions_from_a_pipe(monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{QUESTION}\n"))
    assert main(["tiny", "--dtype", "float32", "--max-tokens", "3"]) == 0
    shown = capsys.readouterr()
    assert shown.out == "A judge works\n"
    assert "cut: no more tokens" in shown.err

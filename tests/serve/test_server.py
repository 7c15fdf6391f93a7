"""The server, asked by OpenAI's own client and by hand."""

from __future__ import annotations

import json
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import requests

from slim.core.endpoint import Endpoint
from slim.evaluation.memory import process_bytes
from slim.serve.__main__ import main
from tests.support.answering import ANSWER, QUESTION, serving, tiny, user

openai = pytest.importorskip("openai", reason="the package openai is not installed")
CHAT = {"model": "tiny", "messages": [user(QUESTION)]}


@pytest.fixture(scope="module")
def served():
    """Address and service of a server with a short queue."""
    with serving(waiting=40, grace=5.0) as (address, service, _):
        yield address, service


@pytest.fixture(scope="module")
def client(served):
    return openai.OpenAI(base_url=f"{served[0]}/v1", api_key="none", max_retries=0)


def idle(service, limit: float = 10.0) -> bool:
    """Whether nobody is answered or waits, before long."""
    end = time.monotonic() + limit
    while time.monotonic() < end:
        if not service.line.running and not service.line.waiting:
            return True
        time.sleep(0.02)
    return False


def test_models_are_listed(client):
    models = client.models.list().data
    assert [model.id for model in models] == ["tiny"]
    assert client.models.retrieve("tiny").slim["context"] == 512


def test_a_conversation_is_answered(client):
    reply = client.chat.completions.create(**CHAT)
    assert reply.choices[0].message.content == ANSWER
    assert reply.choices[0].finish_reason == "stop"
    assert reply.usage.prompt_tokens == 11
    assert reply.usage.total_tokens == 11 + reply.usage.completion_tokens
    assert reply.slim["writing_tokens_per_second"] > 0


def test_a_stream_brings_the_same_in_pieces(client):
    chunks = list(
        client.chat.completions.create(**CHAT, stream=True, stream_options={"include_usage": True})
    )
    pieces = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    assert "".join(pieces) == ANSWER
    assert sum(map(bool, pieces)) > 4
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == "stop"
    assert chunks[-1].usage.completion_tokens > 4


def test_a_text_is_continued(client):
    reply = client.completions.create(model="tiny", prompt="One day Sara", max_tokens=5)
    assert reply.usage.completion_tokens == 5
    assert reply.choices[0].finish_reason == "length"


def test_several_texts_and_tokens_are_continued(client):
    ids = tiny().text_ids("One day Sara")
    several = client.completions.create(model="tiny", prompt=["One day Sara", "Lily had"])
    single = client.completions.create(model="tiny", prompt=ids)
    assert [choice.index for choice in several.choices] == [0, 1]
    assert several.choices[0].text == single.choices[0].text


def test_a_completion_streams(client):
    stream = client.completions.create(model="tiny", prompt="One day Sara", stream=True)
    text = "".join(chunk.choices[0].text for chunk in stream if chunk.choices)
    assert text == client.completions.create(model="tiny", prompt="One day Sara").choices[0].text


def test_the_same_seed_gives_the_same_answer(client):
    asked = {"model": "tiny", "prompt": "One day", "temperature": 1.5, "max_tokens": 12}
    texts = [client.completions.create(**asked, seed=3).choices[0].text for _ in range(2)]
    texts.append(client.completions.create(**asked, seed=4).choices[0].text)
    assert texts[0] == texts[1] != texts[2]


def test_the_judge_can_ask_it(served):
    endpoint = Endpoint(f"{served[0]}/v1", "tiny", retries=0)
    assert endpoint.ask([user(QUESTION)], 20) == ANSWER


@pytest.mark.parametrize(
    ("change", "message", "param"),
    [
        ({"messages": []}, "messages: must be a list of one message at least", "messages"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "must be one of system", "messages[0]"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "has a part of type image_url",
            "messages[0]",
        ),
        ({"messages": [{"role": "system", "content": "x"}]}, "leaves out what a", "messages"),
        ({"messages": [user("\ud800")]}, "holds half a character", "messages"),
        ({"temperature": 9}, "temperature=9: must be a number from 0 to 2", "temperature"),
        ({"temperature": "hot"}, "temperature=hot: must be a number", "temperature"),
        ({"max_tokens": 0}, "max_tokens=0: must be a whole number", "max_tokens"),
        ({"stop": [1]}, "stop: must be texts", "stop"),
        ({"n": 2}, "n: slim does not support it", "n"),
        ({"tools": [{}]}, "tools: slim does not support it", "tools"),
        ({"magic": 1}, "magic: slim does not support it", "magic"),
        ({"stream": "yes"}, "stream=yes: must be true or false", "stream"),
    ],
)
def test_a_wrong_request_is_told_what_is_wrong(served, change, message, param):
    reply = requests.post(f"{served[0]}/v1/chat/completions", json=CHAT | change, timeout=20)
    assert reply.status_code == 400
    error = reply.json()["error"]
    assert message in error["message"]
    assert error["param"] == param


def test_a_prompt_longer_than_the_context_is_refused(client):
    with pytest.raises(openai.BadRequestError, match="has a context of 512") as caught:
        client.chat.completions.create(model="tiny", messages=[user("word " * 600)])
    assert caught.value.code == "context_length_exceeded"


def test_a_request_larger_than_any_context_is_not_read(client):
    with pytest.raises(openai.APIStatusError, match="more than 274,432 bytes") as caught:
        client.chat.completions.create(model="tiny", messages=[user("word " * 70000)])
    assert caught.value.status_code == 413


def test_a_request_of_unknown_length_is_not_read_either(served):
    parts = (b"x" * 1000 for _ in range(400))
    reply = requests.post(f"{served[0]}/v1/chat/completions", data=parts, timeout=20)
    assert reply.status_code == 413


@pytest.mark.parametrize("body", [b"", b"{", b"[1]", b"\xff", b"[" * 50000])
def test_what_is_no_json_object_is_refused(served, body):
    reply = requests.post(f"{served[0]}/v1/chat/completions", data=body, timeout=20)
    assert reply.status_code == 400
    assert "JSON" in reply.json()["error"]["message"]


def test_an_unknown_model_is_not_found(client):
    with pytest.raises(openai.NotFoundError, match="Did you mean tiny?"):
        client.chat.completions.create(model="tinny", messages=[user("Hi")])
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("tinny")


def test_half_a_character_in_a_name_is_told(served):
    body = CHAT | {"model": "\ud800"}
    reply = requests.post(f"{served[0]}/v1/chat/completions", json=body, timeout=20)
    assert reply.json()["error"]["message"].startswith("model=\\ud800: must be one of tiny")


def test_an_unknown_path_names_those_there_are(served):
    reply = requests.get(f"{served[0]}/v1/embeddings", timeout=20)
    assert reply.status_code == 404
    assert "/v1/chat/completions" in reply.json()["error"]["message"]


def test_pages_of_elsewhere_may_not_ask(served):
    url = f"{served[0]}/v1/models"
    assert requests.get(url, headers={"Origin": "http://evil.test"}, timeout=20).status_code == 403
    assert requests.get(url, headers={"Origin": served[0]}, timeout=20).status_code == 200
    for host in ("evil.test", "[::1", ""):
        assert requests.get(url, headers={"Host": host}, timeout=20).status_code in (400, 403)


def test_thirty_requests_at_once_are_all_answered(client, served):
    answers = ThreadPoolExecutor(30)
    before = process_bytes("VmRSS")

    def ask(number: int) -> str:
        if number % 2:
            return client.chat.completions.create(**CHAT).choices[0].message.content
        stream = client.chat.completions.create(**CHAT, stream=True)
        return "".join(chunk.choices[0].delta.content or "" for chunk in stream)

    assert list(answers.map(ask, range(30))) == [ANSWER] * 30
    assert process_bytes("VmRSS") - before < 50e6
    assert idle(served[1])


def hang_up(address: str, body: dict, after: bytes) -> None:
    """Ask, read until something came, and close the connection."""
    host, port = address.removeprefix("http://").split(":")
    content = json.dumps(body).encode()
    head = (
        f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host}:{port}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
    )
    with socket.create_connection((host, int(port)), timeout=20) as connection:
        connection.sendall(head.encode() + content)
        received = b""
        while after not in received:
            received += connection.recv(4096)


LONG = {"model": "tiny", "messages": [user("Tell me. " * 10)], "temperature": 2.0, "seed": 1,
        "min_p": 0.0, "max_tokens": 450}  # fmt: skip


@pytest.fixture
def endless(monkeypatch):
    """The model never ends an answer by itself."""
    monkeypatch.setattr(tiny(), "ends", set())


def test_a_client_that_hangs_up_ends_its_answer(client, served, endless):
    started = time.monotonic()
    hang_up(served[0], LONG | {"stream": True}, b"content")
    assert idle(served[1], 1.5)
    assert time.monotonic() - started < 2.5


def test_a_client_that_hangs_up_without_streaming_ends_its_answer(served, endless):
    address, service = served
    host, port = address.removeprefix("http://").split(":")
    thread = threading.Thread(target=lambda: pytest.raises(
        requests.ReadTimeout, requests.post, f"{address}/v1/chat/completions", json=LONG,
        timeout=0.3))  # fmt: skip
    thread.start()
    thread.join()
    assert idle(service, 1.5)


def test_who_hangs_up_while_waiting_is_not_answered(served, endless):
    address, service = served
    body = LONG | {"stream": True}
    with requests.post(f"{address}/v1/chat/completions", json=body, stream=True, timeout=20):
        with pytest.raises(requests.ReadTimeout):
            requests.post(f"{address}/v1/chat/completions", json=LONG, timeout=0.3)
        end = time.monotonic() + 5
        while service.line.waiting and time.monotonic() < end:
            time.sleep(0.02)
        assert service.line.waiting == 0
        assert service.line.running == 1
    assert idle(service)


def test_a_full_queue_says_so_and_when_to_come_again(endless):
    with serving(waiting=1, grace=1.0) as (address, service, _):
        url = f"{address}/v1/chat/completions"
        body = LONG | {"stream": True}
        with (
            requests.post(url, json=body, stream=True, timeout=20),
            requests.post(url, json=body, stream=True, timeout=20),
        ):
            reply = requests.post(url, json=body, timeout=20)
            assert (reply.status_code, reply.headers["Retry-After"]) == (429, "1")
            assert requests.get(f"{address}/health", timeout=20).json()["waiting"] == 1


def test_a_stop_lets_an_answer_end_and_sends_the_others_away():
    with serving() as (address, service, server):
        url = f"{address}/v1/chat/completions"
        body = CHAT | {"stream": True}
        # a slow model: the stop comes while the first answers
        answer = tiny().answer

        def slowly(*arguments):
            for piece in answer(*arguments):
                time.sleep(0.05)
                yield piece

        service.models["tiny"].answer = slowly
        try:
            with requests.post(url, json=body, stream=True, timeout=20) as first:
                lines = first.iter_lines()
                next(lines)
                second = requests.post(url, json=body, stream=True, timeout=20)
                server.should_exit = True
                assert "The server is stopping" in second.text
                rest = b"\n".join(lines)
                assert b'"finish_reason": "stop"' in rest
                assert rest.strip().endswith(b"[DONE]")
        finally:
            del service.models["tiny"].answer
        with pytest.raises(requests.ConnectionError):
            requests.get(f"{address}/health", timeout=5)


def test_when_the_time_is_over_answers_are_cut_and_say_so(endless):
    with serving(grace=0.2) as (address, service, server):
        body = LONG | {"stream": True}
        with requests.post(
            f"{address}/v1/chat/completions", json=body, stream=True, timeout=20
        ) as reply:
            server.should_exit = True
            assert "The server is stopping" in reply.text


def test_a_key_is_asked_for():
    with serving(key="secret") as (address, _, _):
        with pytest.raises(openai.AuthenticationError, match="The key is missing or wrong"):
            openai.OpenAI(base_url=f"{address}/v1", api_key="wrong").models.list()
        right = openai.OpenAI(base_url=f"{address}/v1", api_key="secret")
        assert right.models.list().data[0].id == "tiny"
        assert requests.get(f"{address}/health", timeout=20).json()["status"] == "ok"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tiny", "--host", "0.0.0.0"], "a key is needed"),
        (["tiny", "--port", "70000"], "Choose another with --port"),
        (["nothing", "--port", "0"], "There is no folder, file or result called nothing"),
    ],
)
def test_a_mistake_in_the_command_has_exit_code_2(capsys, monkeypatch, arguments, message):
    monkeypatch.delenv("SLIM_API_KEY", raising=False)
    assert main(arguments) == 2
    assert message in capsys.readouterr().err


def test_a_port_that_is_taken_is_told(capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert main(["tiny", "--port", str(taken.getsockname()[1])]) == 2
    assert "Address already in use" in capsys.readouterr().err

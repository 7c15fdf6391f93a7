"""Answers, similarity and judges: against a stub server that fails in the ways servers do, and tiny
local models."""

from __future__ import annotations

import threading

import pytest
import torch

from slim.checkpoints.tokenizer import load_tokenizer
from slim.core.endpoint import Endpoint, Unreachable
from slim.core.errors import SlimError
from slim.core.replies import Replies
from slim.evaluation import similarity
from slim.evaluation.answers import Answers
from slim.evaluation.compare import tally
from slim.evaluation.judge import RULES, Judge, read_verdict, settle
from slim.loading.load_model import load_model
from slim.models.spec import ModelSpec
from tests.conftest import ROOT, build_small
from tests.support.stub_server import Server

TINY = ROOT / "slim" / "assets" / "tiny"
SIZES = dict(
    hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, vocab_size=8
)
DESCRIPTION = ModelSpec({**SIZES, "max_position_embeddings": 512})


def likes_long(_, body) -> str:
    """Prefer the longer answer whatever the order."""
    text = body["messages"][1]["content"]
    first, second = text.split("[Answer A]\n")[1].split("\n\n[Answer B]\n")
    verdict = "tie" if len(first) == len(second) else "A" if len(first) > len(second) else "B"
    return f"One says more.\nVerdict: {verdict}"


def likes_first(_, body) -> str:
    return "I like what comes first. Verdict: A"


def rows(*answers: str) -> list[dict]:
    return [
        {"question": f"q{i}?", "reference": "r", "answer": answer}
        for i, answer in enumerate(answers)
    ]


ONE, OTHER = rows("aa", "a", "same", "b"), rows("a", "aaa", "same", "c")


def judge(server: Server, **changes) -> Judge:
    return Judge(
        **{"model": "stub", "endpoint": server.address, "wait": 0.001, "retries": 2, **changes}
    )


def test_a_judge_is_asked_in_both_orders_and_identical_answers_cost_nothing(
    serve, tmp_path, monkeypatch
):
    monkeypatch.setenv("STUB_KEY", "secret")
    server = serve(likes_long)
    part = judge(server, key_variable="STUB_KEY")
    verdicts = Replies(tmp_path / "v.jsonl", "verdicts")
    found = part.compare(ONE, OTHER, verdicts, part.client("cpu"))
    assert [row["winner"] for row in found] == ["one", "other", "tie", "tie"]
    assert tally(found) == {"wins": 1, "ties": 2, "losses": 1, "unread": 0}
    assert len(server.requests) == 6 and all(
        len(row["opinions"]) == 2 for row in found if row["question"] != "q2?"
    )
    assert {opinion["shown_first"] for opinion in found[0]["opinions"]} == {"one", "other"}
    assert found[0]["opinions"][0]["reason"].startswith("One says more.")
    request = server.requests[0]
    assert (
        request["path"] == "/v1/chat/completions"
        and request["key"] == "Bearer secret"
        and request["temperature"] == 0
    )
    assert request["messages"][0] == {"role": "system", "content": RULES}
    assert "secret" not in (tmp_path / "v.jsonl").read_text()


def test_a_preference_for_the_first_place_is_a_tie(serve, tmp_path):
    part = judge(serve(likes_first))
    found = part.compare(ONE, OTHER, Replies(tmp_path / "v", "verdicts"), part.client("cpu"))
    assert [row["winner"] for row in found] == ["tie"] * 4
    once = judge(serve(likes_first), both_orders=False)
    shown = [
        once.compare(
            rows(*"abcdefgh"),
            rows(*"ABCDEFGH"),
            Replies(tmp_path / f"{i}", "verdicts"),
            once.client("cpu"),
        )
        for i in (0, 1)
    ]
    winners = [row["winner"] for row in shown[0]]
    assert {"one", "other"} == set(winners), "the order is drawn by lot"
    assert shown[0] == shown[1]


def test_verdicts_are_asked_for_once_and_the_number_of_questions_is_bounded(serve, tmp_path):
    server = serve(likes_long)
    part = judge(server, limit=2)
    first = part.compare(ONE, OTHER, Replies(tmp_path / "v", "verdicts"), part.client("cpu"))
    assert len(first) == 2 and len(server.requests) == 4
    assert (
        part.compare(ONE, OTHER, Replies(tmp_path / "v", "verdicts"), part.client("cpu")) == first
        and len(server.requests) == 4
    )
    other = judge(server, limit=2, model="another")
    other.compare(ONE, OTHER, Replies(tmp_path / "v", "verdicts"), other.client("cpu"))
    assert len(server.requests) == 8, "another judge is asked again"


def test_a_server_that_recovers_is_asked_again(serve, tmp_path):
    faults = {
        1: (503, "busy"),
        2: (200, "not json"),
        3: (200, {"choices": []}),
        4: "Hm. I cannot say.",
    }
    server = serve(lambda number, body: faults.get(number) or likes_long(number, body))
    part = judge(server, retries=3)
    found = part.compare(
        ONE[:1], OTHER[:1], Replies(tmp_path / "v", "verdicts"), part.client("cpu")
    )
    assert found[0]["winner"] == "one" and len(server.requests) == 6


def test_a_server_that_goes_down_loses_nothing(serve, tmp_path):
    up = [True]
    server = serve(
        lambda number, body: (
            likes_long(number, body) if up[0] and number < 4 else (500, "out of memory")
        )
    )
    part, path = judge(server), tmp_path / "v.jsonl"
    with pytest.raises(
        SlimError,
        match=r"does not answer after 3 tries: HTTP 500 out of memory\. 3 verdicts are kept in .*v.jsonl",
    ):
        part.compare(ONE, OTHER, Replies(path, "verdicts"), part.client("cpu"))
    again = serve(likes_long)
    with path.open("a") as file:
        file.write('{"key": "cut off by a cra')  # what a crash leaves
    part = judge(again)
    found = part.compare(ONE, OTHER, Replies(path, "verdicts"), part.client("cpu"))
    assert [row["winner"] for row in found] == ["one", "other", "tie", "tie"] and len(
        again.requests
    ) == 3
    assert len(Replies(path, "verdicts")) == 6


def test_what_waiting_does_not_mend_ends_at_once(serve, tmp_path):
    server = serve(lambda *_: (401, {"error": "no key"}))
    with pytest.raises(Unreachable, match=r"refuses: HTTP 401 .*no key"):
        judge(server).client("cpu").ask([], 8)
    assert len(server.requests) == 1
    with pytest.raises(Unreachable, match="does not answer after 2 tries: ConnectionError"):
        Endpoint("http://127.0.0.1:9/v1", "m", retries=1, wait=0).ask([], 8)
    slow = serve(lambda *_: threading.Event().wait(0.5) or "late")
    with pytest.raises(Unreachable, match="ReadTimeout"):
        Endpoint(slow.address, "m", retries=0, timeout=0.05).ask([], 8)


def test_a_judge_that_talks_nonsense_is_given_up(serve, tmp_path):
    part = judge(serve(lambda *_: "Bananas."), retries=0)
    with pytest.raises(
        SlimError,
        match=r"no verdict that can be read on 3 questions in a row; the last answer: 'Bananas\.'",
    ):
        part.compare(
            rows(*"abcd"), rows(*"ABCD"), Replies(tmp_path / "v", "verdicts"), part.client("cpu")
        )
    assert not (tmp_path / "v").exists(), "what cannot be read is no verdict"


@pytest.mark.parametrize(
    ("text", "verdict"),
    [
        ("Both fine.\nVerdict: tie", "tie"),
        ("Verdict: A is what I thought, but then\n**Verdict: B**", "B"),
        ("verdict - answer a", "A"),
        ("[[C]]", "tie"),
        ("Answer A is better.", None),
        ("Verdict: Apples", None),
        ("", None),
    ],
)
def test_reading_a_verdict(text, verdict):
    assert read_verdict(text) == verdict


def test_settling_two_orders():
    assert settle(["one", "one"]) == settle(["one", "tie"]) == settle(["one"]) == "one"
    assert settle(["one", "other"]) == settle(["tie", "tie"]) == "tie"
    assert settle(["one", None]) is None


def test_a_local_checkpoint_can_judge(tmp_path):
    part = Judge(str(TINY), new_tokens=8, retries=0)
    client = part.client("cpu")
    text = client.ask([{"role": "user", "content": "Where is the work of a judge done?"}], 12)
    assert (
        text.strip()
        and client.ask([{"role": "user", "content": "Where is the work of a judge done?"}], 12)
        == text
    )
    with pytest.raises(SlimError, match="has room for 504 tokens"):
        client.ask([{"role": "user", "content": "Why? " * 400}], 8)
    (tmp_path / "chatless").mkdir()
    folder = build_small("llama", tmp_path / "chatless")
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    with pytest.raises(Unreachable, match="has no chat template"):
        Judge(str(folder)).client("cpu").ask([{"role": "user", "content": "?"}], 8)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"model": ""}, "eval.judge.model is missing"),
        ({"model": "gpt"}, "is no checkpoint folder"),
        ({"endpoint": "localhost"}, "is no address"),
        ({"limit": 0}, "eval.judge.limit=0"),
        ({"both_orders": 1}, "eval.judge.both_orders=1"),
    ],
)
def test_settings_of_the_judge_are_checked(wrong, message):
    with pytest.raises(SlimError, match=message):
        Judge(**{"model": "m", "endpoint": None if "model" in wrong else "http://host/v1", **wrong})


@pytest.fixture(scope="module")
def tiny():
    return load_model(TINY), load_tokenizer(TINY)


def test_answers_are_those_of_transformers_in_a_chat(tiny, tmp_path):
    model, tokenizer = tiny
    part = Answers(limit=3, new_tokens=16, chat=True)
    part.check(DESCRIPTION)
    found = part.measure(model, tokenizer, 512)
    assert found["metrics"] == {} and found["protocol"]["questions"] == 3
    for row in found["records"]:
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": row["question"]}],
            add_generation_prompt=True,
            tokenize=False,
        )
        ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
        whole = model.generate(ids, max_new_tokens=16, do_sample=False)[0, ids.shape[1] :]
        assert row["answer"] == tokenizer.decode(whole, skip_special_tokens=True).strip()
    plain = Answers(limit=3, new_tokens=16).measure(model, tokenizer, 512)["records"]
    assert [row["question"] for row in plain] == [row["question"] for row in found["records"]]
    assert plain != found["records"]


def test_bad_questions_and_chats_are_refused(tiny, tmp_path):
    path = tmp_path / "q.jsonl"
    path.write_text('{"instruction": "Who?", "answer": "Me."}\n{"instruction": "Why?"}\n')
    Answers(str(path), limit=1).check(DESCRIPTION)
    with pytest.raises(
        SlimError, match=r"row 2: no text in the field 'answer' \(has: instruction\)"
    ):
        Answers(str(path)).check(DESCRIPTION)
    with pytest.raises(SlimError, match="There is no text /none.jsonl"):
        Answers("/none.jsonl")
    with pytest.raises(SlimError, match="leaves no room for a question"):
        Answers(new_tokens=512).check(DESCRIPTION)
    with pytest.raises(SlimError, match="in a chat only"):
        Answers(system="Be brief.")
    tokenizer = load_tokenizer(TINY)
    tokenizer.chat_template = None
    with pytest.raises(SlimError, match="no chat template"):
        Answers(chat=True).check_tokenizer(tokenizer)


def test_similarity_is_the_cosine_of_mean_states(tiny, tmp_path, monkeypatch):
    """Against transformers directly, a text at a time and without padding; texts of different
    lengths in one batch."""
    monkeypatch.setattr(similarity, "PACKAGE", "no_such_package")
    folder = build_small("llama", tmp_path / "encoder")
    model, tokenizer = load_model(folder), load_tokenizer(folder)

    def embed(text: str) -> torch.Tensor:
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        with torch.no_grad():
            return model.model(input_ids=ids).last_hidden_state[0].mean(0)

    answers, references = (
        ["A hen.", "The goat sleeps in the stable of Luke."],
        ["The hen sits there.", "A goat."],
    )
    expected = [
        torch.cosine_similarity(embed(a), embed(r), dim=0).item()
        for a, r in zip(answers, references, strict=True)
    ]
    assert similarity.cosines(answers, references, str(folder)) == pytest.approx(expected, abs=1e-5)
    assert similarity.cosines(["Same.", " "], ["Same.", "Other."], str(folder)) == pytest.approx(
        [1, 0], abs=1e-6
    )
    found = Answers(limit=4, new_tokens=8, similarity=str(folder)).measure(*tiny, 512)
    values = [row["similarity"] for row in found["records"]]
    assert found["metrics"]["similarity/mean"] == pytest.approx(sum(values) / 4)
    assert found["metrics"]["similarity/median"] == pytest.approx(sum(sorted(values)[1:3]) / 2)
    assert found["protocol"]["encoder"] == "encoder (transformers)"
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text('{"pooling_mode_cls_token": true}')
    assert similarity.cosines(["A hen."], ["A goat."], str(folder)) == pytest.approx(
        [1], abs=1e-5
    ), "all begin alike"


def test_an_embedding_model_that_cannot_be_used(monkeypatch, tmp_path):
    monkeypatch.setattr(similarity, "PACKAGE", "no_such_package")
    with pytest.raises(
        SlimError, match=r"needs sentence-transformers: pip install 'slim\[similarity\]'"
    ):
        Answers(similarity="sentence-transformers/all-MiniLM-L6-v2").check(DESCRIPTION)
    with pytest.raises(SlimError, match="cannot be loaded"):
        similarity.cosines(["a"], ["b"], str(tmp_path))

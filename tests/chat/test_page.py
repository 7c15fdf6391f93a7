"""The page in a real browser: it answers, compares, keeps what is preferred, asks no network."""

from __future__ import annotations

import dataclasses
import json

import pytest
import requests

from slim.chat.preferences import Preferences
from slim.chat.web import page_routes
from tests.support.answering import ANSWER, QUESTION, serving, tiny, user
from tests.support.browser import CHROMIUM, DRIVER, MISSING, asked, resize, start, wait

SETTINGS = {"system": None, "max_tokens": 64}


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    return tmp_path_factory.mktemp("kept") / "preferences.jsonl"


@pytest.fixture(scope="module")
def address(kept):
    """The page of two models, the second of which says little."""
    second = dataclasses.replace(
        tiny(), name="second", defaults=tiny().defaults.changed({"stop": ("works",)})
    )
    routes = page_routes(Preferences(kept), SETTINGS)
    with serving([tiny(), second], routes=routes) as (address, _, _):
        yield address


@pytest.fixture(scope="module")
def browser(address, tmp_path_factory):
    if not (CHROMIUM and DRIVER):
        pytest.skip(MISSING)
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    driver = start(webdriver, tmp_path_factory.mktemp("browser"))
    driver.get(f"{address}/")
    wait(driver, "return document.querySelectorAll('.model').length === 2")
    ask(driver, QUESTION)
    yield driver
    driver.quit()


def ask(browser, question: str) -> None:
    """Type a question, and wait for both answers."""
    from selenium.webdriver.common.by import By

    browser.find_element(By.ID, "question").send_keys(question + "\n")
    wait(browser, "return !document.querySelector('#send').disabled")


def test_both_models_answer_the_same_question(browser):
    texts = browser.execute_script(
        "return [...document.querySelectorAll('.answer .text')].map((text) => text.textContent)"
    )
    assert texts == [ANSWER, "A judge "]


def test_speed_and_memory_stand_beside_each_answer(browser):
    lines = browser.execute_script(
        "return [...document.querySelectorAll('.answer .figures')].map((one) => one.textContent)"
    )
    assert len(lines) >= 2
    for line in lines:
        assert "tok/s" in line
        assert "MB of memory" in line


def test_the_preferred_answer_is_kept(browser, kept):
    browser.execute_script("document.querySelectorAll('.prefer')[1].click()")
    wait(browser, "return document.querySelector('.answer.preferred')?.dataset.model === 'second'")
    wait(browser, "return document.querySelector('#status').textContent.startsWith('Kept in ')")
    row = json.loads(kept.read_text(encoding="utf-8").splitlines()[-1])
    assert (row["question"], row["reference"]) == (QUESTION, "A judge ")
    assert row["answers"] == {"tiny": ANSWER, "second": "A judge "}


def test_each_model_remembers_its_own_answers(browser):
    ask(browser, "Who works in the court?")
    assert browser.execute_script("return messagesFor(models[1], 1)") == [
        user(QUESTION),
        {"role": "assistant", "content": "A judge "},
        user("Who works in the court?"),
    ]


def test_what_a_model_or_a_user_writes_is_text_not_html(browser):
    ask(browser, "<img src=x onerror=alert(1)> <b>Who?</b>")
    assert (
        browser.execute_script("return document.querySelectorAll('#turns img, #turns b').length")
        == 0
    )
    shown = browser.execute_script(
        "return document.querySelector('.turn:last-child .question').textContent"
    )
    assert shown == "<img src=x onerror=alert(1)> <b>Who?</b>"


def test_a_question_without_room_is_told(browser):
    from selenium.webdriver.common.by import By

    box = browser.find_element(By.ID, "question")
    browser.execute_script("arguments[0].value = 'word '.repeat(600)", box)
    browser.execute_script("document.querySelector('#form').requestSubmit()")
    wait(browser, "return document.querySelectorAll('.answer.problem').length === 2")
    line = "return document.querySelector('.answer.problem .figures').textContent"
    assert "has a context of 512" in browser.execute_script(line)


def test_an_answer_can_be_stopped(browser, monkeypatch):
    from selenium.webdriver.common.by import By

    monkeypatch.setattr(tiny(), "ends", set())
    browser.execute_script("document.querySelector('#new').click()")
    browser.execute_script("document.querySelector('#max_tokens').value = 480")
    browser.find_element(By.ID, "question").send_keys(QUESTION + "\n")
    wait(browser, "return document.querySelector('.answer .text')?.textContent.length > 10")
    browser.execute_script("document.querySelector('#stop').click()")
    wait(browser, "return !document.querySelector('#send').disabled", limit=3)
    line = "return document.querySelector('.answer .figures').textContent"
    assert browser.execute_script(line) == "stopped"


def test_it_asks_this_server_only_and_has_no_errors(browser, address):
    urls = asked(browser)
    assert f"{address}/chat.js" in urls
    assert all(url.startswith((f"{address}/", "data:")) for url in urls)
    severe = [line for line in browser.get_log("browser") if line["level"] == "SEVERE"]
    # a refused question is an error in the browser's own log, too
    assert [line for line in severe if "400" not in line["message"]] == []


@pytest.mark.parametrize("width", [1280, 400])
def test_it_fits_the_window(browser, width):
    resize(browser, width)
    wait(browser, "return document.documentElement.scrollWidth <= innerWidth")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"preferred": "third"}, "preferred=third: must be one of tiny"),
        ({"answers": []}, "answers: must be an object"),
        ({"answers": {"tiny": 1}}, "answers: must be an object"),
        ({"messages": {}}, "messages: must be a list"),
        ({"messages": []}, "There is no question before the answers"),
    ],
)
def test_a_preference_that_is_none_is_refused(address, kept, change, message):
    before = kept.read_text(encoding="utf-8") if kept.is_file() else ""
    right = {"messages": [user(QUESTION)], "answers": {"tiny": ANSWER}, "preferred": "tiny"}
    reply = requests.post(f"{address}/preferences", json=right | change, timeout=20)
    assert message in reply.json()["error"]["message"]
    assert reply.status_code == 400
    assert (kept.read_text(encoding="utf-8") if kept.is_file() else "") == before


def test_pages_of_elsewhere_cannot_write(address):
    headers = {"Origin": "http://evil.test"}
    reply = requests.post(f"{address}/preferences", json={}, headers=headers, timeout=20)
    assert reply.status_code == 403


def test_the_page_may_load_nothing_from_elsewhere(address):
    policy = requests.get(f"{address}/", timeout=20).headers["Content-Security-Policy"]
    assert policy.startswith("default-src 'none'; script-src 'self'; style-src 'self'")

"""The report's page in a real browser: it draws, sorts, asks no network, fits the window."""

from __future__ import annotations

import pytest

from slim.report.page import page
from slim.report.runs import Collection, Failure
from slim.report.sections import sections
from tests.support.browser import CHROMIUM, DRIVER, MISSING, asked, resize, start, wait
from tests.support.reporting import chain, grid, record, source

pytestmark = pytest.mark.skipif(not (CHROMIUM and DRIVER), reason=MISSING)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    """A browser that shows the page of a small sweep."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    folder = tmp_path_factory.mktemp("browser")
    samples = [{"prompt": "Say something", "answer": "a long answer " * 30}]
    tuned = record(
        "tune lora",
        "b" * 16,
        "tune",
        {"r": 8},
        perplexity=5.2,
        curves=[["train_loss", 1.5, 1], ["train_loss", 1.2, 2]],
    )
    chains = [*grid(), chain(source() | {"samples": samples}, tuned, run_id="t")]
    failures = [Failure("f", "quantizer.group_size=96", "FAILED", "96 does not divide 128")]
    report = sections(
        Collection("A sweep of bits and groups", chains, failures, published=["4.2", "4.13"])
    )
    (folder / "report.html").write_text(page(report), encoding="utf-8")
    driver = start(webdriver, folder)
    driver.get((folder / "report.html").as_uri())
    yield driver
    driver.quit()


def test_it_loads_without_errors_or_requests(browser):
    wait(browser, "return document.querySelectorAll('.js-plotly-plot').length === 6")
    assert [line for line in browser.get_log("browser") if line["level"] == "SEVERE"] == []
    urls = asked(browser)
    assert urls and all(url.startswith(("file:", "data:", "blob:")) for url in urls)
    assert sum(url.startswith("file:") for url in urls) == 1


def test_every_picture_has_marks(browser):
    marks = {
        "pareto-size": ".points path",
        "pareto-speed": ".points path",
        "heat": ".hm image",
        "tasks": ".bars path",
    }
    for name, mark in {**marks, "steps": ".points path", "losses": ".lines path"}.items():
        assert wait(
            browser, f"return document.querySelectorAll(`[data-plot='{name}'] {mark}`).length"
        ), name
    assert (
        browser.execute_script(
            "return document.querySelectorAll(`[data-plot='pareto-size'] .points path`).length"
        )
        == 8
    )


def test_a_drop_down_changes_picture_and_sentence(browser):
    axis = "return document.querySelector(`[data-plot='pareto-size'] .ytitle`).textContent"
    assert browser.execute_script(axis).startswith("perplexity")
    browser.execute_script(
        "const choice = document.querySelector(`select[data-for='pareto-size']`);"
        "choice.value = [...choice.options].find((one) => one.textContent.trim() === 'two').value;"
        "choice.dispatchEvent(new Event('change'))"
    )
    wait(browser, f"{axis}.startsWith('two')")
    assert "not drawn" in browser.execute_script(
        "return document.querySelector(`[data-sentence='pareto-size']`).textContent"
    )


def test_text_shows_over_a_point(browser):
    from selenium.webdriver import ActionChains
    from selenium.webdriver.common.by import By

    place = browser.find_element(By.CSS_SELECTOR, "[data-plot='pareto-speed'] .points path")
    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", place)
    ActionChains(browser).move_to_element(place).perform()
    text = wait(
        browser,
        "return document.querySelector(`[data-plot='pareto-speed'] .hoverlayer text`)?.textContent",
    )
    assert "base" in text and "perplexity" in text and "decode" in text


def test_a_click_on_a_heading_sorts(browser):
    click = "[...document.querySelectorAll('#models-table th button')].find((b) => b.textContent.startsWith('perplexity')).click()"
    column = (
        "const headings = [...document.querySelectorAll('#models-table th')];"
        "const at = headings.findIndex((heading) => heading.textContent.startsWith('perplexity'));"
        "return [...document.querySelectorAll('#models-table tbody tr')].map((row) => row.cells[at].textContent)"
    )
    for order in (1, -1):
        browser.execute_script(click)
        figures = [float(text) for text in browser.execute_script(column)]
        assert len(set(figures)) > 3 and figures == sorted(figures, reverse=order < 0)


def test_on_paper_it_is_light_and_pictures_fit(browser):
    browser.execute_script("dispatchEvent(new Event('beforeprint'))")
    wait(
        browser,
        "return document.querySelector(`[data-plot='heat'] .main-svg`).getAttribute('width') === '680'",
    )
    ink = "return getComputedStyle(document.documentElement).getPropertyValue('--ink').trim()"
    assert browser.execute_script(ink) == "#000"
    browser.execute_script("dispatchEvent(new Event('afterprint'))")
    wait(
        browser,
        "return document.querySelector(`[data-plot='heat'] .main-svg`).getAttribute('width') > 900",
    )


@pytest.mark.parametrize("width", [1280, 400])
def test_the_page_fits_the_window_and_wide_tables_scroll(browser, width):
    resize(browser, width)
    wait(browser, "return document.documentElement.scrollWidth <= innerWidth")
    if width == 400:
        assert browser.execute_script(
            "const box = document.querySelector('#models .scroll'); box.scrollLeft = 200; return box.scrollLeft"
        )
        plots = "return [...document.querySelectorAll('.plot')].every((plot) => plot.getBoundingClientRect().right <= innerWidth)"
        wait(browser, plots)

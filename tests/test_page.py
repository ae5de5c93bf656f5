"""The page of an episode, in a real browser: what is on it, and that it can be walked through."""

import shutil

import numpy as np
import pytest

from evaluation.page import Page
from evaluation.watch import Player
from tests.test_agent import make_model

playwright = pytest.importorskip("playwright.sync_api", reason="pip install -r requirements-browser.txt")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)


@pytest.fixture(scope="module")
def browser():
    """A headless Chromium: the system's, or playwright's own."""
    with playwright.sync_playwright() as play:
        try:
            chromium = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        except playwright.Error:
            pytest.skip("there is no Chromium: playwright install chromium")
        yield chromium
        chromium.close()


@pytest.mark.parametrize(("scheme", "width", "core"), [("light", 1280, "relative"), ("dark", 400, "gru")])
def test_an_episode_can_be_walked_through(browser, tmp_path, scheme, width, core):
    """The linked step, keys, a chosen past step and what looks back at it; nothing is wider than the window."""
    player = Player(*make_model({"type": "PocMemoryEnv"}, core))
    shown, moments = Page(player, 7, "model.nn"), list(player.play(7))
    for moment in moments:
        shown.add(moment)
    (tmp_path / "page.html").write_bytes(shown.html())
    page, complaints = browser.new_page(color_scheme=scheme, viewport={"width": width, "height": 800}), []
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("request", lambda asked: complaints.extend([asked.url] * (asked.url[:5] not in ("file:", "data:"))))
    page.goto(f"file://{tmp_path}/page.html#t=3")
    page.wait_for_selector("body[data-ready]")
    shares = [float(text.removesuffix(" %")) for text in page.locator(".share").all_inner_texts()]
    assert page.inner_text("#step") == "3"
    np.testing.assert_allclose(shares, 100 * np.array(shown.steps["probabilities"][3][0]), atol=0.51)
    if core == "relative":  # two blocks of two heads
        weights = page.evaluate("[0, 1, 2, 3].map(row => [0, 1, 2].map(past => weight(3, row, past)))")
        np.testing.assert_allclose(weights, np.concatenate(moments[3].past), atol=0.005)
    steps = {"ArrowRight": "4", "End": "end", "Home": "0", "Shift+ArrowRight": "end", "ArrowLeft": ""}
    for key, step in steps.items():
        page.keyboard.press(key)
        page.wait_for_function("([step]) => $('step').textContent === step || !step", arg=[step])
    page.locator("#thumbs button").first.click()
    assert page.inner_text("#pinTitle").startswith("Step ") and page.is_visible("#pinStrips") == (core == "relative")
    page.locator("#strips").hover(position={"x": 80, "y": 10})
    page.keyboard.press("Escape")
    page.wait_for_function("$('pinCard').hidden && location.hash === `#t=${t}`")
    page.keyboard.press(" ")
    page.wait_for_function("t === steps && timer === null")
    assert page.evaluate("document.documentElement.scrollWidth") == width and not complaints

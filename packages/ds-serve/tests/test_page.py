"""The page in a browser without a screen: what is shown, by keyboard, in both themes, offline.

Needs Chromium (Debian's package `chromium`, or any that `DS_CHROMIUM` names). Screenshots lie in
build/page afterwards.
"""

import os
import re
import shutil
from pathlib import Path

import pytest

from conftest import SMALL
from ds_attention import memory_report
from ds_serve import EngineOptions, create_app

NAMES = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = os.environ.get("DS_CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)
pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="no Chromium here; install it, or name one in DS_CHROMIUM"
)
SWITCHES = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
SHOTS = Path(__file__).parents[3] / "build" / "page"


@pytest.fixture(scope="module")
def browser():
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=SWITCHES)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def home(model, tokenizer, live):
    options = EngineOptions(4, 8, 16, 4, draft=True)
    return live(create_app(model, tokenizer, "tiny", options=options)).url.removesuffix("v1")


@pytest.fixture
def page(browser, home):
    """The page, open; at its end nothing was asked of others and nothing complained."""
    context = browser.new_context(viewport={"width": 1280, "height": 800})
    page = context.new_page()
    complaints, asked = [], []
    # What is no page's fault: Chromium says each answer above 399.
    page.on(
        "console",
        lambda message: (
            message.type == "error"
            and "Failed to load resource" not in message.text
            and complaints.append(message.text)
        ),
    )
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(home)
    page.get_by_text("tiny:").wait_for()
    yield page
    assert complaints == []
    assert all(url.startswith(home) for url in asked)
    context.close()


def ask(page, text, tokens=12, temperature="0"):
    page.get_by_text("Settings").click()
    page.get_by_label("Most tokens").fill(str(tokens))
    page.get_by_label("Temperature").fill(temperature)
    page.get_by_label("Message", exact=False).first.fill(text)
    page.keyboard.press("Enter")
    page.locator("#send:enabled").wait_for()
    page.locator("#tokens .token").nth(tokens - 1).wait_for()


def test_a_chat_and_what_the_model_did(page, tokenizer, greedy, model):
    ask(page, "The state of the union")
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": "The state of the union"}])
    expected = tokenizer.decode(greedy(prompt, 12))
    assert page.locator("#turns li.assistant span:not(.who):not(.thought)").inner_text() == (
        expected.replace("\u00a0", " ")
    )
    assert page.locator("#tokens .token").count() == 12
    detail = page.locator("#detail").inner_text()
    assert "Token 12:" in detail
    assert page.locator("#detail tr").count() == 5
    layers = model.config.num_hidden_layers - model.config.first_k_dense_replace
    said = page.locator("#experts-said").inner_text()
    assert len(re.findall(r"Layer \d+: \d+, \d+", said)) == layers
    cache = page.locator("#cache").inner_text()
    held = len(prompt) + 12
    assert f"{held} tokens:" in cache
    saving = memory_report(model.config.attention, length=held).saving
    assert f"{100 * saving:.1f}% less" in cache
    assert "drafts" in cache
    SHOTS.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=SHOTS / "light.png", full_page=True)


def test_tokens_are_walked_by_keyboard(page):
    ask(page, "my fellow citizens", tokens=6)
    page.locator("#tokens .token[tabindex='0']").focus()
    page.keyboard.press("Home")
    assert "Token 1:" in page.locator("#detail").inner_text()
    page.keyboard.press("ArrowRight")
    assert "Token 2:" in page.locator("#detail").inner_text()
    page.keyboard.press("End")
    assert "Token 6:" in page.locator("#detail").inner_text()
    assert page.locator("#tokens .token[aria-selected='true']").count() == 1
    label = page.locator("#tokens .token").first.get_attribute("aria-label")
    assert re.search(r", \d+\.\d%", label)


def test_escape_stops_an_answer(page):
    page.get_by_text("Settings").click()
    page.get_by_label("Most tokens").fill("100")
    page.locator("#prompt").fill("my fellow citizens")
    page.keyboard.press("Enter")
    page.locator("#tokens .token").first.wait_for()
    page.keyboard.press("Escape")
    page.locator("#send:enabled").wait_for()
    assert page.locator("#problem").inner_text() == ""


def test_what_the_server_refuses_is_said(page):
    page.get_by_text("Settings").click()
    page.get_by_label("Most tokens").fill("5000")
    page.locator("#prompt").fill("my fellow citizens")
    with page.expect_response("**/v1/chat/completions"):
        page.keyboard.press("Enter")
    page.get_by_role("alert").filter(has_text="exceeds the model's context").wait_for()


def test_nothing_is_hard_to_reach_in_either_theme(page):
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe is missing")
    ask(page, "The state of the union", tokens=8)
    for theme in ("light", "dark"):
        if page.evaluate("document.documentElement.dataset.theme ?? 'light'") != theme:
            page.get_by_role("button", name="Dark").click()
        results = axe.Axe().run(page)
        assert results.violations_count == 0, results.generate_report()
        page.screenshot(path=SHOTS / f"{theme}-theme.png", full_page=True)
    page.set_viewport_size({"width": 390, "height": 800})
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    page.screenshot(path=SHOTS / "narrow.png", full_page=True)


def test_a_base_model_continues_text(browser, model, base_tokenizer, live, greedy):
    url = live(create_app(model, base_tokenizer, "base", options=SMALL)).url.removesuffix("v1")
    page = browser.new_page()
    page.goto(url)
    page.get_by_text("Text to continue (a base model)").wait_for()
    page.get_by_text("Settings").click()
    page.get_by_label("Most tokens").fill("7")
    page.get_by_label("Temperature").fill("0")
    page.locator("#prompt").fill("The state")
    page.keyboard.press("Enter")
    page.locator("#tokens .token").nth(6).wait_for()
    ids = [base_tokenizer.bos_token_id, *base_tokenizer.encode("The state")]
    expected = base_tokenizer.decode(greedy(ids, 7))
    shown = page.locator("#turns li.continuation span:not(.who):not(.thought)").inner_text()
    assert shown.strip() == expected.strip()
    page.close()

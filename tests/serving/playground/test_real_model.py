"""A conversation with SmolLM2 in a real browser."""

import re

import httpx2 as httpx
import pytest

from paceline import LM
from paceline.serving import playground
from paceline.serving.api import create_app
from paceline.serving.service import Service
from paceline.serving.worker import Worker
from tests.real_models import real_file
from tests.serving.playground.conftest import Watched, served
from tests.serving.playground.steps import (
    SAME,
    act,
    compare,
    done,
    fill,
    panel,
    run,
    say,
    text_of,
    turns,
)

pytestmark = [pytest.mark.real, pytest.mark.timeout(1200)]
sync_api = pytest.importorskip("playwright.sync_api")


@pytest.fixture(scope="module")
def chatting():
    service = Service(Worker(LM(real_file("smollm2-135m"), threads=2)))
    service.start()
    with served(create_app(service, "smollm2-135m", routers=[playground.router])) as address:
        yield address
    service.stop()


def test_a_conversation_makes_sense(browser, chatting):
    watched = Watched(browser, chatting, viewport={"width": 1280, "height": 900})
    page = watched.page
    page.context.set_default_timeout(120_000)
    sync_api.expect(page.locator("#model")).to_have_text("smollm2-135m")
    compare(page)
    question = "What is the capital of France?"
    run(page, prompt=question, max_tokens=24, temperature=0)
    sync_api.expect(page.locator("#verdict")).to_have_text(SAME)
    first = text_of(page)
    assert "Paris" in first
    assert "<|im_" not in first
    with page.expect_request("**/v1/chat/completions") as caught:
        run(page, prompt="And of Italy?", max_tokens=24, temperature=0)
    assert [each["content"] for each in caught.value.post_data_json["messages"]] == [
        question,
        first,
        "And of Italy?",
    ]
    assert "Rome" in text_of(page)
    watched.close()


LOOKS = {
    "light": {"color_scheme": "light", "viewport": {"width": 1280, "height": 900}},
    "dark": {"color_scheme": "dark", "viewport": {"width": 1280, "height": 900}},
    "phone": {"color_scheme": "light", "viewport": {"width": 390, "height": 844}},
}


@pytest.mark.parametrize("look", LOOKS)
def test_a_daily_chat(browser, chatting, look, tmp_path):
    watched = Watched(browser, chatting, reduced_motion="reduce", **LOOKS[look])
    page = watched.page
    page.context.set_default_timeout(120_000)
    fill(page, system="You are a helpful assistant.", temperature=0, seed=1, max_tokens=120)
    page.keyboard.press("Escape")
    say(page, "Write a short Python function that adds two numbers. Use a code block.")
    sync_api.expect(page.locator(".turn.assistant .code code")).to_contain_text("def ")
    assert "```" not in turns(page)[1]
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    fill(page, temperature=1)
    page.keyboard.press("Escape")
    act(page, "Regenerate")
    done(page)
    sync_api.expect(page.locator(".turn.assistant .pages")).to_have_text("2 / 2")
    said = turns(page)
    page.screenshot(path=tmp_path / f"{look}.png")
    page.reload()
    sync_api.expect(page.locator("#model")).to_have_text("smollm2-135m")
    assert turns(page) == said
    act(page, "Previous version", 1)
    assert turns(page) != said
    watched.close()


def test_a_continued_answer_is_the_longer_one(browser, chatting):
    question = "Explain in two sentences why the sky is blue."
    messages = [{"role": "user", "content": question}]
    body = {"messages": messages, "temperature": 0, "max_tokens": 32}
    whole = httpx.post(f"{chatting}/v1/chat/completions", json=body, timeout=120).json()
    expected = whole["choices"][0]["message"]["content"]
    watched = Watched(browser, chatting, viewport={"width": 1280, "height": 900})
    page = watched.page
    fill(page, temperature=0, max_tokens=16)
    say(page, question)
    half = turns(page)[1]
    assert expected.startswith(half)
    assert len(half) < len(expected)
    act(page, "Continue", 1)
    done(page)
    assert turns(page)[1] == expected
    panel(page, "inspector")
    sync_api.expect(page.locator("#paced .summary")).to_have_text(re.compile(r"^16 tokens in "))
    watched.close()

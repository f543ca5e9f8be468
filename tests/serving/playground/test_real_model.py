"""A conversation with SmolLM2 in a real browser."""

import pytest

from paceline import LM
from paceline.serving import playground
from paceline.serving.api import create_app
from paceline.serving.service import Service
from paceline.serving.worker import Worker
from tests.real_models import real_file
from tests.serving.playground.conftest import Watched, served
from tests.serving.playground.steps import SAME, compare, run, text_of

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

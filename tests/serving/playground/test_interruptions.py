"""What stops an answer in the playground: the user, a reload, an error, a server that loads."""

import json
import re
import socket

import pytest

from paceline.serving import playground
from paceline.serving.api import create_app
from paceline.serving.loading_answers import answering as answering_503
from tests.serving.halting import halt
from tests.serving.playground.conftest import Watched, served
from tests.serving.playground.steps import (
    REFUSED,
    answering,
    chunk,
    done,
    expect,
    fill,
    streamed,
    turns,
)


def test_stop_keeps_what_was_written(page, service, monkeypatch):
    halt(monkeypatch, service.worker, tokens=9)
    fill(page, seed=1, temperature=0.8)
    page.locator("#prompt").fill("Tell me a story")
    page.locator("#prompt").press("Enter")
    expect(page.locator(".turn.assistant")).to_have_attribute("aria-busy", "true")
    expect(page.locator(".turn.assistant .body")).to_have_text(re.compile(r"\w{2,}"))
    expect(page.locator("#run")).to_be_hidden()
    page.get_by_role("button", name="Stop").click()
    done(page)
    said = turns(page)
    assert said[1]
    expect(page.locator(".turn.assistant")).to_have_attribute("aria-busy", "false")
    expect(page.locator(".turn.assistant .actions")).to_contain_text("Stopped.")
    page.reload()
    expect(page.locator(".turn.assistant .body")).to_have_text(said[1])


def test_what_came_before_a_reload_is_kept(page, service, monkeypatch):
    halt(monkeypatch, service.worker, tokens=9)
    fill(page, seed=1, temperature=0.8)
    page.locator("#prompt").fill("Tell me a story")
    page.locator("#prompt").press("Enter")
    expect(page.locator(".turn.assistant .body")).to_have_text(re.compile(r"\w{2,}"))
    for name in ("Edit", "Regenerate"):
        for button in page.get_by_role("button", name=name, exact=True).all():
            expect(button).to_be_disabled()
    page.reload()
    expect(page.locator(".turn.assistant .body")).to_have_text(re.compile(r"\w{2,}"))
    expect(page.locator(".turn.assistant")).to_have_attribute("aria-busy", "false")


def test_an_error_is_shown_where_it_happened_and_can_be_retried(browser, address):
    found = Watched(browser, address, viewport={"width": 1280, "height": 900})
    page = found.page
    page.locator("#prompt").fill("word " * 600)
    page.locator("#prompt").press("Enter")
    alert = page.locator(".turn.user [role=alert]")
    expect(alert).to_contain_text("the model sees 512")
    with answering(page, "Now it is well.") as bodies:
        alert.get_by_role("button", name="Retry").click()
        done(page)
        assert turns(page)[1] == "Now it is well."
    expect(page.locator(".turn [role=alert]")).to_have_count(0)
    assert len(bodies[0]["messages"]) == 1
    found.close(REFUSED)


@pytest.mark.parametrize("named", [True, False])
def test_an_answer_that_breaks_off_keeps_its_text(page, named):
    body = streamed(chunk({"content": "Half an"})).removesuffix("data: [DONE]\n\n")
    if named:
        body += f"data: {json.dumps({'error': {'message': 'it broke'}})}\n\n"

    def answer(route):
        route.fulfill(body=body, content_type="text/event-stream")

    page.route("**/v1/chat/completions", answer)
    page.locator("#prompt").fill("Hello")
    page.locator("#prompt").press("Enter")
    reason = "it broke" if named else "The server broke the answer off."
    expect(page.locator(".turn.assistant [role=alert]")).to_contain_text(reason)
    assert turns(page) == ["Hello", "Half an"]
    page.unroute("**/v1/chat/completions")
    with answering(page, "All of it."):
        page.get_by_role("button", name="Retry").click()
        expect(page.locator(".turn.assistant .body")).to_have_text("All of it.")
    expect(page.locator(".turn.assistant .pages")).to_have_text("2 / 2")


LOADING = {"error": {"message": "the model is loading; try again later", "type": "server_error"}}


def test_the_page_waits_while_the_server_loads(browser, address):
    found = Watched(browser, "about:blank")
    page, refused = found.page, {"v1/playground": 0, "v1/chat/completions": 0}
    found.asked.clear()
    found.url = address

    def load(route):
        path = route.request.url.removeprefix(f"{address}/")
        refused[path] += 1
        if refused[path] < 3:
            route.fulfill(status=503, json=LOADING, headers={"Retry-After": "1"})
        else:
            route.fallback()

    page.route("**/v1/**", load)
    page.goto(address)
    expect(page.get_by_role("alert")).to_contain_text("the model is loading")
    page.get_by_role("button", name="Retry").click()
    expect(page.get_by_role("alert")).to_be_hidden()
    expect(page.locator("#model")).to_have_text("tiny")
    fill(page, max_tokens=4)
    page.keyboard.press("Escape")
    page.locator("#prompt").fill("Hello")
    page.locator("#prompt").press("Enter")
    expect(page.locator(".waiting")).to_contain_text("the model is loading")
    done(page)
    assert turns(page)[1]
    assert refused["v1/chat/completions"] == 3
    found.close(REFUSED)


def test_a_browser_that_comes_early_gets_the_page_by_itself(browser, service):
    app = create_app(service, "tiny", routers=[playground.router])
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        found = Watched(browser, "about:blank")
        found.asked.clear()
        found.url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        with answering_503(listener):
            found.page.goto(found.url)
            expect(found.page.get_by_role("heading")).to_have_text("The model is loading")
            expect(found.page.get_by_role("link", name="Retry now")).to_be_visible()
        with served(app, listener):
            expect(found.page.locator("#model")).to_have_text("tiny")
            found.close(REFUSED)


def test_waiting_for_a_server_that_loads_can_be_stopped(browser, address):
    found = Watched(browser, address)
    page = found.page
    page.route(
        "**/v1/chat/completions",
        lambda route: route.fulfill(status=503, json=LOADING, headers={"Retry-After": "500"}),
    )
    page.locator("#prompt").fill("Hello")
    page.locator("#prompt").press("Enter")
    expect(page.locator(".waiting")).to_be_visible()
    page.get_by_role("button", name="Stop").click()
    expect(page.locator(".turn.user [role=alert]")).to_contain_text(
        "Stopped before the first word."
    )
    expect(page.locator("#run")).to_be_enabled()
    found.close(REFUSED)

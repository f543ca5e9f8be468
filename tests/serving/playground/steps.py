"""What a user does in the playground."""

import json
import re
from contextlib import contextmanager

import pytest

sync_api = pytest.importorskip("playwright.sync_api")
expect = sync_api.expect
expect.set_options(timeout=60_000)

SAME = re.compile(r"^The same text, \d+ tokens, at [\d.]+ times the speed\.$")
REFUSED = "Failed to load resource"  # the browser's own words for a status of 400 and more
IN_STAGE = ("prompt", "system")


def panel(page, name):
    """Open a panel."""
    if page.locator(f"#{name}").is_hidden():
        page.locator(f"#show-{name}").click()


def mode(page, name):
    """Change to `Chat` or `Completion`."""
    narrow = page.locator("#sidebar").is_hidden()
    panel(page, "sidebar")
    page.get_by_label(name, exact=True).check()
    if narrow:
        page.locator("#sidebar .close").click()


def fill(page, **settings):
    for name, value in settings.items():
        if name == "system" and page.locator("#system").is_hidden():
            page.locator("#system-summary").click()
        if name not in IN_STAGE:
            panel(page, "settings")
        page.locator(f"#{name}").fill(str(value))


def compare(page):
    panel(page, "inspector")
    page.locator("#compare").check()


def run(page, **settings):
    """Run or send, wait for the end, open the inspector; what is drawn is the same every time."""
    fill(page, **({"seed": 3} | settings))
    page.locator("#run").click()
    done(page)
    panel(page, "inspector")


def done(page):
    expect(page.locator("#status")).to_contain_text("Seed")
    expect(page.locator("#run")).to_be_enabled()


def text_of(page, run="paced"):
    return page.locator(f"#{run} .text").text_content()


def turns(page):
    """What the turns of the conversation say, as it is shown."""
    return page.locator("#talk > li .body").all_text_contents()


def act(page, name, turn=-1):
    """Press a button of a turn."""
    row = page.locator("#talk > li").nth(turn)
    row.hover()
    row.get_by_role("button", name=name, exact=True).click()


def say(page, text, **settings):
    """Send a message by Enter, and wait for the answer."""
    page.locator("#prompt").fill(text)
    page.locator("#prompt").press("Enter")
    done(page)


def stored(page):
    """The conversations that the browser keeps, by their title."""
    entries = page.evaluate("JSON.stringify({...localStorage})")
    found = {
        key: json.loads(value)
        for key, value in json.loads(entries).items()
        if key.startswith("paceline.conversation.")
    }
    return {each["title"]: each for each in found.values()}


def chunk(delta, finish=None):
    choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}
    return {"id": "chatcmpl-1", "object": "chat.completion.chunk", "choices": [choice]}


def streamed(*chunks):
    """A stream with these pieces, as the server sends it."""
    data = [json.dumps(each) for each in chunks] + ["[DONE]"]
    return "".join(f"data: {each}\n\n" for each in data)


@contextmanager
def answering(page, *answers):
    """Let each next chat be answered by a text, or by a list of deltas; yield the bodies sent."""
    left, bodies = list(answers), []

    def answer(route):
        bodies.append(route.request.post_data_json)
        made = left.pop(0)
        deltas = [{"content": made}] if isinstance(made, str) else made
        finish = "tool_calls" if any("tool_calls" in each for each in deltas) else "stop"
        pieces = [chunk(each) for each in deltas] + [chunk({}, finish)]
        route.fulfill(body=streamed(*pieces), content_type="text/event-stream")

    page.route("**/v1/chat/completions", answer)
    yield bodies
    page.unroute("**/v1/chat/completions")
    assert not left

"""The playground's completions and inspector, used in a real browser by Playwright."""

import json
import re
import time

import httpx2 as httpx
import pytest

from paceline.serving import playground
from paceline.serving.api import create_app
from paceline.serving.api.middleware import Rules
from paceline.serving.api_keys import ApiKeys
from tests.serving.halting import halt
from tests.serving.playground.conftest import Watched, served
from tests.serving.playground.steps import (
    REFUSED,
    SAME,
    compare,
    done,
    expect,
    fill,
    mode,
    panel,
    run,
    text_of,
    turns,
)


def answered(address, **body):
    body = {"prompt": "Once upon a time", "max_tokens": 40, "seed": 3, "temperature": 0.8} | body
    return httpx.post(f"{address}/v1/completions", json=body).json()


def test_tokens_are_coloured_by_who_guessed_them(completions, address):
    page = completions
    run(page, max_tokens=40, seed=3, temperature=0.8, budget=8)
    speculation = {"budget": 8}
    found = answered(address, speculation=speculation)
    assert text_of(page) == found["choices"][0]["text"]
    guessed = page.locator("#paced .token:not(.own)")
    assert guessed.count() > 5
    colours = {each.evaluate("e => getComputedStyle(e).backgroundColor") for each in guessed.all()}
    assert "rgba(0, 0, 0, 0)" not in colours
    rows = [row.inner_text().split("\t") for row in page.locator("#legend tbody tr").all()]
    right = {row[0]: int(row[2]) for row in rows}
    assert sum(right.values()) == 40
    assert right["the model"] == page.locator("#paced .token.own").count()
    for name, tried, hit, share in rows[:-1]:
        assert share == f"{100 * int(hit) / int(tried.replace(',', '')):.0f} %", name
    expect(page.locator("#paced .summary")).to_contain_text("40 tokens in")
    expect(page.locator("#chart polyline")).to_have_count(1)


def test_the_inspector_shows_what_the_machine_can_do(page, address):
    expect(page.locator("#machine")).to_be_hidden()
    panel(page, "inspector")
    expect(page.locator("#machine")).to_be_visible()
    found = httpx.get(f"{address}/v1/machine", timeout=60).json()["formats"]
    dots = page.locator("#roofline circle")
    expect(dots).to_have_count(len(found))
    assert dots.locator("title").first.text_content().startswith("running: ")
    rows = [row.inner_text().split("\t") for row in page.locator("#machine-table tbody tr").all()]
    assert [row[0] for row in rows] == [row["format"] for row in found if row["speed"] is not None]
    assert float(rows[0][4]) == pytest.approx(found[0]["passes"]["8"], rel=0.2)
    expect(page.locator("#machine-chosen")).to_contain_text("paceline plan")


def test_the_replay_without_speculation_is_the_same(completions):
    page = completions
    compare(page)
    run(page, max_tokens=40, temperature=0.8, budget=8)
    expect(page.locator("#verdict")).to_have_text(SAME)
    expect(page.locator("#verdict")).to_have_class(re.compile("good"))
    assert text_of(page, "plain") == text_of(page)
    expect(page.locator("#plain .summary")).to_have_text("40 tokens in 40 passes, 1.00 a pass.")
    expect(page.locator("#chart polyline")).to_have_count(2)
    assert page.locator(".wrong").count() == 0


def test_the_last_run_can_be_replayed_later(completions):
    page = completions
    # A seed of its own: a text that the drafter has learnt may come in one piece, without a speed.
    run(page, max_tokens=20, temperature=0.8, seed=82)
    expect(page.locator("#plain")).to_be_hidden()
    compare(page)
    expect(page.locator("#verdict")).to_have_text(SAME)


def test_a_difference_is_marked_where_it_begins(completions):
    page = completions

    def forge(route):
        answer = route.fetch()
        lines = answer.text().split("\n\n")
        if json.loads(route.request.post_data).get("speculation") == {"budget": 0}:
            piece = json.loads(lines[4].removeprefix("data: "))
            piece["paceline"] |= {"tokens": [1], "texts": ["<b>no</b>"]}
            lines[4] = f"data: {json.dumps(piece)}"
        route.fulfill(response=answer, body="\n\n".join(lines))

    page.route("**/v1/completions", forge)
    compare(page)
    run(page, max_tokens=12, temperature=0.8)
    said = "The texts differ from token 5 on: this is a bug; please report it."
    expect(page.locator("#verdict")).to_have_text(said)
    wrong = page.locator("#plain .wrong")
    expect(wrong).to_have_count(8)
    assert wrong.first.text_content() == "<b>no</b>"


def test_passes_that_came_as_one_are_shown_as_such(completions, address):
    page = completions

    def forge(route):
        answer = route.fetch()
        lines = answer.text().split("\n\n")
        pieces = [json.loads(line.removeprefix("data: ")) for line in lines[2:6]]
        last = pieces[-1]["paceline"]
        for each in [piece["paceline"] for piece in pieces[-2::-1]]:
            for name in ("tokens", "texts", "origins"):
                last[name] = each[name] + last[name]
            last["passes"] += each["passes"]
        lines[2:6] = [f"data: {json.dumps(pieces[-1])}"]
        route.fulfill(response=answer, body="\n\n".join(lines))

    page.route("**/v1/completions", forge)
    run(page, max_tokens=40, seed=3, temperature=0.8, budget=3)  # many passes, whatever is known
    assert text_of(page) == answered(address)["choices"][0]["text"]
    reported = page.locator("#paced .summary")
    expect(reported).to_contain_text("Too fast for this page: 4 without their trees.")
    page.locator("#paced .token[data-pass='2']").first.click()
    expect(page.locator("#pass-summary")).to_contain_text("4 passes that came as one")
    tips = page.locator("#paced .token[data-pass='2']:not(.own)").all()
    assert all("probability" in tip.get_attribute("data-tip") for tip in tips[-1:])


def test_the_tree_of_a_chosen_pass(completions):
    page = completions
    run(page, max_tokens=60, temperature=0, budget=8)
    slider = page.locator("#pass")
    passes = int(slider.get_attribute("max"))
    assert passes == int(
        re.search(r"in (\d+) passes", page.locator("#paced .summary").inner_text())[1]
    )
    slider.focus()
    page.keyboard.press("Home")
    text = ""
    for number in range(passes):
        expect(page.locator("#pass-number")).to_have_text(f"{number + 1} of {passes}")
        chosen = page.locator("#paced .chosen").all_text_contents()
        taken = page.locator("#tree .taken:not(.edge) > text:not(.probability)").all_text_contents()
        assert len(taken) - 1 == len(chosen)  # the root belongs to the pass before
        text += "".join(chosen)
        guesses = int(page.locator("#pass-summary").inner_text().split()[0].replace("Nothing", "0"))
        assert page.locator("#tree .node").count() in (guesses + 1, guesses + 2)
        page.keyboard.press("ArrowRight")
    assert text == text_of(page)
    page.locator("#paced .token").first.click()
    expect(page.locator("#pass-number")).to_have_text(f"1 of {passes}")
    page.locator("#paced .text").focus()
    page.keyboard.press("ArrowRight")
    expect(page.locator("#pass-number")).to_have_text(f"2 of {passes}")


def test_a_schema_is_followed_and_a_broken_one_is_told(watched):
    page = watched.page
    mode(page, "Completion")
    fill(page, schema='{"type": ')
    expect(page.locator("#schema-hint")).to_contain_text("This is no JSON")
    page.locator("#show-settings").click()
    page.get_by_role("button", name="Run").click()
    expect(page.locator("#settings")).to_be_visible()
    assert page.evaluate("document.activeElement.id") == "schema"
    fill(page, schema="[1]")
    expect(page.locator("#schema-hint")).to_have_text("A schema is a JSON object: {…}")
    assert not any("completions" in url for url in watched.asked)
    schema = {"type": "object", "properties": {"age": {"type": "integer", "maximum": 9}}}
    schema |= {"required": ["age"], "additionalProperties": False}
    run(page, schema=json.dumps(schema), temperature=0.7, max_tokens=60, seed=4)
    assert json.loads(text_of(page))["age"] <= 9
    expect(page.locator("#paced .summary")).to_contain_text("The JSON is whole.")


def test_what_a_model_says_is_never_markup(completions):
    page = completions
    evil = "<script>window.hurt=1</script><img src=x onerror='window.hurt=1'>"
    compare(page)
    run(page, schema=json.dumps({"const": evil}), budget=8, max_tokens=200)
    assert json.loads(text_of(page)) == evil
    assert json.loads(text_of(page, "plain")) == evil
    assert page.locator("main script, main img, aside script, aside img").count() == 0
    mode(page, "Chat")
    run(page, prompt=evil)
    run(page, prompt=evil)
    assert turns(page) == [evil, json.dumps(evil), evil, json.dumps(evil)]
    page.locator("#colours").click()
    assert page.locator("#talk .token").count() > 2
    assert turns(page) == [evil, json.dumps(evil), evil, json.dumps(evil)]
    assert page.locator("main script, main img, aside script, aside img").count() == 0
    assert page.evaluate("window.hurt") is None


def test_what_the_server_refuses_is_told(browser, address):
    found = Watched(browser, address)
    mode(found.page, "Completion")
    fill(found.page, prompt="word " * 600)
    found.page.get_by_role("button", name="Run").click()
    expect(found.page.get_by_role("alert")).to_contain_text("the model sees 512")
    expect(found.page.locator("#run")).to_be_enabled()
    run(found.page, prompt="Once", max_tokens=4)
    expect(found.page.get_by_role("alert")).to_be_hidden()
    found.close(REFUSED)


def test_a_conversation(page):
    expect(page.get_by_role("textbox", name="Message")).to_be_visible()
    run(page, prompt="Tell me of the sea.", system="Be brief.", max_tokens=12, temperature=0.8)
    first = text_of(page)
    assert page.locator("#prompt").input_value() == ""
    with page.expect_request("**/v1/chat/completions") as caught:
        fill(page, prompt="And then?")
        page.locator("#prompt").press("Control+Enter")
    assert caught.value.post_data_json["messages"] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Tell me of the sea."},
        {"role": "assistant", "content": first},
        {"role": "user", "content": "And then?"},
    ]
    done(page)
    assert turns(page)[:3] == ["Tell me of the sea.", first.strip(), "And then?"]
    page.get_by_role("button", name="New conversation").click()
    expect(page.locator("#talk li")).to_have_count(0)


@pytest.mark.parametrize("way", ["Stop", "Escape"])
def test_a_run_can_be_stopped(completions, service, monkeypatch, way):
    page = completions
    halt(monkeypatch, service.worker, tokens=9)
    fill(page, max_tokens=400, seed=1, temperature=0.8)
    page.locator("#seed").press("Control+Enter")
    expect(page.locator("#paced .token").nth(4)).to_be_attached()
    assert not service.worker.idle
    if way == "Stop":
        page.get_by_role("button", name="Stop").click()
    else:
        page.keyboard.press("Escape")
    expect(page.locator("#status")).to_contain_text("stopped")
    end = time.monotonic() + 20
    while not service.worker.idle and time.monotonic() < end:
        time.sleep(0.01)
    assert service.worker.idle
    assert not service.failures
    expect(page.locator("#run")).to_be_enabled()


def test_a_key_is_asked_for_where_one_is_needed(browser, service):
    secret = "a-key-that-nobody-guesses"
    rules = Rules(keys=ApiKeys([f"me:{secret}"]))
    app = create_app(service, "tiny", rules=rules, routers=[playground.router])
    with served(app) as address:
        found = Watched(browser, address)
        key = found.page.get_by_label("API key")
        expect(key).to_be_focused()
        expect(found.page.get_by_role("alert")).to_contain_text("the API key is unknown")
        key.fill("not this")
        key.press("Tab")
        expect(key).to_be_focused()
        key.fill(secret)
        key.press("Tab")
        expect(found.page.locator("#model")).to_have_text("tiny")
        mode(found.page, "Completion")
        run(found.page, max_tokens=4)
        assert text_of(found.page)
        kept = "JSON.stringify([{...localStorage}, {...sessionStorage}, document.cookie])"
        assert secret not in found.page.evaluate(kept)
        found.close(REFUSED)

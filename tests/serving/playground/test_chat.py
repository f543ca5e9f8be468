"""Conversations in the playground: send, stop, versions, branches, files, tools, errors."""

import json
import re

import pytest

from tests.serving.halting import halt
from tests.serving.playground.conftest import Watched
from tests.serving.playground.steps import (
    act,
    answering,
    done,
    expect,
    fill,
    mode,
    panel,
    say,
    stored,
    turns,
)


def test_a_chat_model_opens_in_chat_with_the_model_in_the_head_line(page, lm):
    expect(page.get_by_label("Chat", exact=True)).to_be_checked()
    expect(page.locator("#model")).to_have_text("tiny")
    head = page.locator("#facts")
    expect(head).to_contain_text(lm.engine.format)
    expect(head).to_have_text(re.compile(r"\d MB of memory · 512 tokens of context$"))
    expect(page.get_by_role("textbox", name="Message")).to_be_focused()
    for panel_name in ("inspector", "settings"):
        expect(page.locator(f"#{panel_name}")).to_be_hidden()


def test_a_model_without_a_template_opens_in_completion(browser, address):
    def forge(route):
        answer = route.fetch()
        route.fulfill(response=answer, json=answer.json() | {"chat": False})

    found = Watched(browser, "about:blank")
    found.asked.clear()
    found.page.route("**/v1/playground", forge)
    found.page.goto(address)
    expect(found.page.get_by_label("Completion", exact=True)).to_be_checked()
    expect(found.page.get_by_label("Chat", exact=True)).to_be_disabled()
    expect(found.page.locator("#prompt")).to_have_value("Once upon a time")
    found.url = address
    found.close()


def test_enter_sends_and_shift_enter_makes_a_line(page):
    with answering(page, "Yes.") as bodies:
        field = page.locator("#prompt")
        field.fill("one")
        field.press("Shift+Enter")
        field.press_sequentially("two")
        assert not bodies
        field.press("Enter")
        expect(page.locator("#run")).to_be_enabled()
        expect(page.locator(".turn.assistant .body")).to_have_text("Yes.")
        field.press("Enter")  # nothing to send
    assert bodies[0]["messages"] == [{"role": "user", "content": "one\ntwo"}]
    assert field.input_value() == ""
    expect(field).to_be_focused()


def test_an_input_method_uses_enter_for_itself(page):
    page.locator("#prompt").fill("kan")
    page.evaluate(
        "document.getElementById('prompt').dispatchEvent(new KeyboardEvent('keydown',"
        "{key: 'Enter', isComposing: true, bubbles: true, cancelable: true}))"
    )
    assert page.locator("#prompt").input_value() == "kan"
    expect(page.locator("#talk li")).to_have_count(0)


def test_the_composer_stays_at_the_bottom_while_turns_scroll(page):
    long = "\n\n".join(f"Paragraph {number}." for number in range(60))
    with answering(page, long, long):
        say(page, "More")
        box = page.locator("#form").bounding_box()
        assert box["y"] + box["height"] > 800
        assert page.evaluate("document.documentElement.scrollHeight <= innerHeight")
        say(page, "More")
        assert page.locator("#form").bounding_box() == box
    scroller = page.locator("#scroller")
    at_end = "e => e.scrollHeight - e.scrollTop - e.clientHeight < 5"
    assert scroller.evaluate(at_end)
    scroller.evaluate("e => { e.scrollTop = 0 }")
    page.get_by_role("button", name="Latest").click()
    assert scroller.evaluate(at_end)
    expect(page.get_by_role("button", name="Latest")).to_be_hidden()


def test_regenerated_answers_are_versions_that_one_turns_over(page):
    with answering(page, "first", "second", "third", "later") as bodies:
        say(page, "Hello")
        act(page, "Regenerate")
        done(page)
        act(page, "Regenerate")
        done(page)
        assert turns(page) == ["Hello", "third"]
        pages = page.locator(".turn.assistant .pages")
        expect(pages).to_have_text("3 / 3")
        act(page, "Previous version")
        expect(pages).to_have_text("2 / 3")
        assert turns(page) == ["Hello", "second"]
        expect(page.get_by_role("button", name="Previous version")).to_be_focused()
        page.keyboard.press("Enter")
        assert turns(page) == ["Hello", "first"]
        say(page, "Go on")
        assert turns(page) == ["Hello", "first", "Go on", "later"]
    assert len({body["seed"] for body in bodies}) == 4
    assert [each["content"] for each in bodies[-1]["messages"]] == ["Hello", "first", "Go on"]
    act(page, "Next version", 1)
    assert turns(page) == ["Hello", "second"]
    page.reload()
    expect(page.locator(".turn.assistant .body")).to_have_text("second")
    act(page, "Previous version", 1)
    assert turns(page) == ["Hello", "first", "Go on", "later"]


def test_a_fixed_seed_still_gives_other_versions(page):
    fill(page, seed=5)
    with answering(page, "a", "b") as bodies:
        say(page, "Hello")
        act(page, "Regenerate")
        done(page)
    assert [body["seed"] for body in bodies] == [5, 6]


def test_editing_ones_turn_makes_a_branch(page):
    with answering(page, "one", "two", "three") as bodies:
        say(page, "First")
        say(page, "Second")
        act(page, "Edit", 0)
        field = page.get_by_label("Edit: You")
        expect(field).to_be_focused()
        field.press("Escape")
        assert turns(page) == ["First", "one", "Second", "two"]
        act(page, "Edit", 0)
        field.fill("Other")
        field.press("Enter")
        done(page)
        assert turns(page) == ["Other", "three"]
    assert bodies[-1]["messages"] == [{"role": "user", "content": "Other"}]
    act(page, "Previous version", 0)
    assert turns(page) == ["First", "one", "Second", "two"]


def test_an_answer_can_be_edited_and_continued(page, address):
    fill(page, max_tokens=6, temperature=0, system="Be brief.")
    say(page, "A story")
    act(page, "Edit", 1)
    page.get_by_label("Edit: Model").fill("Once there was a")
    page.get_by_role("button", name="Save").click()
    with page.expect_request("**/v1/chat/completions") as caught:
        act(page, "Continue", 1)
    body = caught.value.post_data_json
    assert body["continue_final_message"] is True
    assert body["messages"] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "A story"},
        {"role": "assistant", "content": "Once there was a"},
    ]
    done(page)
    said = turns(page)[1]
    assert said.startswith("Once there was a")
    assert len(said) > len("Once there was a") + 3
    assert "Cut at the limit" in page.locator(".turn.assistant .actions").inner_text()
    page.locator("#colours").click()
    assert turns(page)[1] == said
    assert page.locator("#talk .token").count() >= 5
    coloured = "".join(page.locator("#talk .token").all_text_contents())
    assert said == f"Once there was a{coloured}"


def test_a_branch_is_a_conversation_of_its_own(page):
    with answering(page, "one", "two", "three"):
        say(page, "First")
        say(page, "Second")
        act(page, "Branch from here", 1)
        assert turns(page) == ["First", "one"]
        say(page, "Elsewhere")
        assert turns(page) == ["First", "one", "Elsewhere", "three"]
    assert set(stored(page)) == {"First", "First (branch)"}
    page.get_by_role("button", name="First", exact=True).click()
    assert turns(page) == ["First", "one", "Second", "two"]


def test_a_model_that_has_nothing_to_add_is_heard(page):
    with answering(page, "All.", ""):
        say(page, "Hello")
        act(page, "Continue")
        expect(page.locator("#notices")).to_contain_text("it had nothing to add")
    assert turns(page) == ["Hello", "All."]


def test_text_files_are_attached(page):
    files = [
        {"name": "notes.md", "mimeType": "text/markdown", "buffer": "Grüße\n```\nx\n```".encode()},
        {"name": "photo.png", "mimeType": "image/png", "buffer": b"\x89PNG\xff\x00"},
        {"name": "zero.txt", "mimeType": "text/plain", "buffer": b"a\0b"},
        {"name": "big.txt", "mimeType": "text/plain", "buffer": b"a" * 300_000},
        {"name": "<b>.csv", "mimeType": "text/csv", "buffer": b"1,2\r\n"},
    ]
    page.locator("#files").set_input_files(files)
    for refused in ("photo.png is no text", "zero.txt is binary", "big.txt has 300000 bytes"):
        expect(page.locator("#notices")).to_contain_text(refused)
    assert page.locator("#attachments li").all_text_contents() == ["notes.md", "<b>.csv"]
    page.get_by_role("button", name="Remove <b>.csv").click()
    with answering(page, "Read.") as bodies:
        say(page, "Read this")
    [message] = bodies[0]["messages"]
    assert message["content"] == "Read this\n\nFile notes.md:\n````\nGrüße\n```\nx\n```\n````"
    expect(page.locator("#attachments")).to_be_hidden()
    assert page.locator(".turn.user details.file summary").inner_text() == "notes.md"
    page.reload()
    expect(page.locator(".turn.user details.file pre")).to_have_text("Grüße\n```\nx\n```")


WEATHER = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}


def test_tool_calls_are_shown_and_answered(page):
    call = {"name": "weather", "arguments": '{"city": "<i>Rome</i>"}'}
    deltas = [
        {"content": "Let me see."},
        {"tool_calls": [{"index": 0, "id": "call_1", "type": "function", "function": call}]},
    ]
    fill(page, tools=json.dumps([WEATHER]))
    expect(page.locator("#tools-hint")).to_have_text("1 that the model may call.")
    with answering(page, deltas, "It is sunny.") as bodies:
        say(page, "Weather?")
        expect(page.locator(".call-name")).to_have_text("Calls weather")
        assert json.loads(page.locator(".call pre").inner_text()) == {"city": "<i>Rome</i>"}
        page.get_by_label("Result of weather").fill('{"sky": "clear"}')
        page.get_by_role("button", name="Send results").click()
        expect(page.locator(".turn.assistant").last).to_contain_text("It is sunny.")
    assert bodies[0]["tools"] == [WEATHER]
    assert bodies[1]["messages"][1:] == [
        {
            "role": "assistant",
            "content": "Let me see.",
            "tool_calls": [{"id": "call_1", "type": "function", "function": call}],
        },
        {"role": "tool", "content": '{"sky": "clear"}', "tool_call_id": "call_1"},
    ]
    page.reload()
    expect(page.locator(".turn.tool")).to_contain_text("Result of weather")
    expect(page.get_by_role("button", name="Send results")).to_have_count(0)


def test_tools_that_are_none_are_told(page):
    fill(page, tools='{"name": "x"}')
    expect(page.locator("#tools-hint")).to_contain_text("Tools are a JSON list")
    page.locator("#prompt").fill("Hello")
    page.locator("#prompt").press("Enter")
    expect(page.locator("#tools")).to_be_focused()
    expect(page.locator("#talk li")).to_have_count(0)


@pytest.mark.parametrize("apart", [True, False])
def test_reasoning_is_folded(page, apart):
    deltas = [{"reasoning_content": "Hm, *so*."}, {"content": "Four."}]
    whole = [{"content": "<think>\nHm, *so*.\n</think>\n\nFour."}]
    with answering(page, deltas if apart else whole):
        say(page, "2 + 2?")
    assert turns(page)[1] == "Four."
    thought = page.locator(".reasoning .markdown")
    expect(thought).to_be_hidden()
    page.locator(".reasoning summary").click()
    expect(thought).to_have_text("Hm, so.")


def test_a_reasoning_that_was_cut_is_continued(page):
    with answering(page, [{"reasoning_content": "Two and"}], " two.</think>Four.") as bodies:
        say(page, "2 + 2?")
        act(page, "Continue", 1)
        expect(page.locator(".turn.assistant .body")).to_have_text("Four.")
    assert bodies[1]["messages"][-1]["content"] == "<think>\nTwo and"
    page.locator(".reasoning summary").click()
    expect(page.locator(".reasoning .markdown")).to_have_text("Two and two.")


def test_colours_are_switched_and_lead_to_the_tree(page):
    fill(page, max_tokens=40, seed=3, temperature=0.8, budget=8)
    say(page, "Once upon a time")
    said = turns(page)[1]
    expect(page.locator("#talk .token")).to_have_count(0)
    page.locator("#colours").click()
    expect(page.locator("#colours")).to_have_attribute("aria-pressed", "true")
    assert page.locator("#talk .token:not(.own)").count() > 3
    assert turns(page)[1] == said
    act(page, "Inspect")
    expect(page.locator("#inspector")).to_be_visible()
    passes = int(page.locator("#pass").get_attribute("max"))
    token = page.locator("#talk .token").last
    token.click()
    number = int(token.get_attribute("data-pass")) + 1
    expect(page.locator("#pass-number")).to_have_text(f"{number} of {passes}")
    assert page.locator("#talk .token.chosen").count() >= 1
    page.reload()
    expect(page.locator("#colours")).to_have_attribute("aria-pressed", "true")
    expect(page.locator("#inspector")).to_be_visible()
    mode(page, "Completion")
    page.locator("#colours").click()
    mode(page, "Chat")
    expect(page.locator("#colours")).to_have_attribute("aria-pressed", "true")


def test_an_answer_goes_on_while_another_conversation_is_read(page, service, monkeypatch):
    with answering(page, "one"):
        say(page, "First")
    page.get_by_role("button", name="New conversation").click()
    halt(monkeypatch, service.worker, tokens=9)
    fill(page, seed=1, temperature=0.8, max_tokens=30)
    page.locator("#prompt").fill("Second")
    page.locator("#prompt").press("Enter")
    expect(page.locator(".turn.assistant .body")).to_have_text(re.compile(r"\w{2,}"))
    page.get_by_role("button", name="First", exact=True).click()
    assert turns(page) == ["First", "one"]
    page.get_by_role("button", name="Stop").click()
    done(page)
    assert turns(page) == ["First", "one"]
    page.get_by_role("button", name="Second", exact=True).click()
    assert turns(page)[1]


def test_how_much_of_the_context_is_used_is_shown(page):
    fill(page, max_tokens=5)
    say(page, "Hello")
    expect(page.locator("#usage")).to_have_text(re.compile(r"^\d+ of 512 tokens of context used$"))


def test_turns_are_announced_when_they_are_complete(page):
    talk = page.get_by_role("log", name="Conversation")
    with answering(page, "Hello."):
        say(page, "Hi")
    expect(talk.get_by_role("listitem").last).to_have_attribute("aria-busy", "false")
    assert page.locator("#status").get_attribute("aria-live") == "polite"
    panel(page, "settings")
    nameless = """[...document.querySelectorAll("button, input, textarea, select")]
        .filter(e => !e.labels?.length && !e.ariaLabel && !e.textContent.trim())
        .map(e => e.outerHTML)"""
    assert page.evaluate(nameless) == []

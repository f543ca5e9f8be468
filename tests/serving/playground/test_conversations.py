"""Conversations that the browser keeps: list, search, rename, delete, export, import, damage."""

import json

import pytest

from tests.serving.playground.steps import act, answering, done, expect, mode, say, stored, turns

KEY = "paceline.conversation."


def two(page):
    """Two conversations, of which the second is open."""
    with answering(page, "one", "two", "three"):
        say(page, "First")
        act(page, "Regenerate")
        done(page)
        page.get_by_role("button", name="New conversation").click()
        page.locator("#system-summary").click()
        page.locator("#system").fill("Be brief.")
        say(page, "Second: *bold*?")


def titles(page):
    return page.locator("#conversations .open").all_text_contents()


def option(page, title, name):
    row = page.locator("#conversations li", has_text=title)
    row.hover()
    row.get_by_role("button", name=f"Options of {title}").click()
    page.get_by_role("menuitem", name=name).click()


def exported(page, press):
    with page.expect_download() as caught:
        press()
    return caught.value.suggested_filename, caught.value.path().read_text(encoding="utf-8")


def bring(page, text, name="file.json"):
    file = {"name": name, "mimeType": "application/json", "buffer": text.encode()}
    page.locator("#import-file").set_input_files(file)


def test_conversations_are_kept_and_listed(page):
    two(page)
    assert titles(page) == ["Second: *bold*?", "First"]
    page.reload()
    assert turns(page) == ["Second: *bold*?", "three"]
    expect(page.locator("#system")).to_have_value("Be brief.")
    expect(page.locator("#system-summary")).to_have_text("System prompt: Be brief.")
    page.get_by_role("button", name="First", exact=True).click()
    assert turns(page) == ["First", "two"]
    expect(page.locator("#system")).to_have_value("")
    expect(page.locator("[aria-current]")).to_have_text("First")
    page.get_by_label("Search conversations").fill("THREE")
    assert titles(page) == ["Second: *bold*?"]
    page.get_by_label("Search conversations").fill("nowhere")
    expect(page.locator("#no-conversations")).to_have_text("None holds these words.")


def test_a_conversation_is_renamed_and_deleted(page):
    two(page)
    option(page, "First", "Rename")
    page.get_by_role("textbox", name="Title").fill("<b>Other</b>")
    page.keyboard.press("Enter")
    assert sorted(titles(page)) == ["<b>Other</b>", "Second: *bold*?"]
    option(page, "Second", "Delete")
    assert titles(page) == ["<b>Other</b>"]
    expect(page.locator("#talk li")).to_have_count(0)
    page.get_by_role("button", name="Undo").click()
    assert len(titles(page)) == 2
    option(page, "Second", "Delete")
    page.reload()
    assert titles(page) == ["<b>Other</b>"]


def test_what_is_not_sent_stays_with_its_conversation(page):
    two(page)
    page.locator("#prompt").fill("a draft")
    page.get_by_role("button", name="First", exact=True).click()
    expect(page.locator("#prompt")).to_have_value("")
    page.get_by_role("button", name="Second: *bold*?", exact=True).click()
    expect(page.locator("#prompt")).to_have_value("a draft")


def test_a_menu_is_used_by_keyboard(page):
    with answering(page, "one"):
        say(page, "First")
    button = page.get_by_role("button", name="Options of First")
    button.focus()
    page.keyboard.press("Enter")
    expect(button).to_have_attribute("aria-expanded", "true")
    expect(page.get_by_role("menuitem", name="Rename")).to_be_focused()
    page.keyboard.press("ArrowUp")
    expect(page.get_by_role("menuitem", name="Delete")).to_be_focused()
    page.keyboard.press("Escape")
    expect(page.get_by_role("menu")).to_have_count(0)
    expect(button).to_be_focused()


def test_what_is_exported_is_imported(page):
    two(page)
    before = stored(page)
    name, text = exported(page, page.get_by_role("button", name="Export all").click)
    assert name.startswith("paceline-conversations-")
    assert json.loads(text)["version"] == 1
    name, one = exported(page, lambda: option(page, "First", "Export as JSON"))
    assert name == "first.json"
    bring(page, one)  # the same again changes nothing
    expect(page.locator("#notices")).to_contain_text("1 conversation imported.")
    assert stored(page) == before
    assert len(titles(page)) == 2
    page.evaluate("localStorage.clear()")
    page.reload()
    assert titles(page) == []
    bring(page, text)
    expect(page.locator("#conversations li")).to_have_count(2)
    assert stored(page) == before
    page.get_by_role("button", name="First", exact=True).click()
    expect(page.locator(".turn.assistant .pages")).to_have_text("2 / 2")
    changed = json.loads(one)
    changed["conversations"][0]["title"] = "Changed"
    bring(page, json.dumps(changed))  # of the same name, with something else in it
    expect(page.locator("#conversations li")).to_have_count(3)
    assert stored(page)["First"] == before["First"]


def test_a_conversation_is_exported_as_markdown(page):
    two(page)
    name, text = exported(page, lambda: option(page, "Second", "Export as Markdown"))
    assert name == "second-bold.md"
    parts = ["# Second: *bold*?", "## System", "Be brief.", "## You", "Second: *bold*?"]
    assert text == "\n\n".join([*parts, "## Model", "three"]) + "\n"


def turn(**changed):
    return {"id": "a", "parent": None, "role": "user", "content": "Hi"} | changed


def conversation(**changed):
    fields = {"version": 1, "id": "c1", "title": "T", "created": 1, "updated": 2, "system": ""}
    return fields | {"turns": [turn()], "chosen": {"": "a"}} | changed


def whole(*conversations, **changed):
    fields = {"format": "paceline-conversations", "version": 1}
    return json.dumps(fields | {"conversations": list(conversations)} | changed)


REFUSED = {
    "no JSON": ("{", "file.json is no JSON"),
    "something else": ("[1]", "file.json holds no conversations"),
    "null": ("null", "file.json holds no conversations"),
    "later version": (whole(version=2), "is of version 2, and this page reads version 1"),
    "no object": (whole(7), "conversation 1: a conversation is an object"),
    "no title": (whole(conversation(title=None)), "expected a text as title, found null"),
    "second": (whole(conversation(), conversation(id="")), "conversation 2: expected an id"),
    "date": (whole(conversation(created="now")), 'expected milliseconds as created, found "now"'),
    "turns": (whole(conversation(turns={})), "expected at most 10000 turns"),
    "role": (whole(conversation(turns=[turn(role="root")])), 'turn 1 has the role "root"'),
    "content": (whole(conversation(turns=[turn(content=[])])), "turn 1 needs a text as content"),
    "same id": (whole(conversation(turns=[turn(), turn()])), "turn 2 needs an id of its own"),
    "circle": (whole(conversation(turns=[turn(parent="a")])), 'turn 1 follows "a"'),
    "chosen": (whole(conversation(chosen={"": "b"})), 'the chosen turn "b" is not among'),
    "proto": (whole(conversation(chosen=json.loads('{"__proto__": "a"}'))), "is not among"),
    "calls": (whole(conversation(turns=[turn(calls=[{"id": 1}])])), "expected the texts id, name"),
    "files": (whole(conversation(turns=[turn(attachments="x")])), "attachments: expected a list"),
}


def test_a_file_that_is_none_is_refused_in_a_sentence(page):
    expect(page.locator("#model")).to_have_text("tiny")
    for text, reason in REFUSED.values():
        bring(page, text)
        expect(page.locator("#notices .notice").last).to_contain_text(reason)
        page.get_by_role("button", name="Dismiss").last.click()
    assert stored(page) == {}
    assert titles(page) == []


def test_what_is_imported_is_text(page):
    evil = "<img src=x onerror='window.hurt=1'>[x](javascript:window.hurt=1)"
    said = turn(content=evil, attachments=[{"name": evil, "text": evil}])
    answer = {"id": "b", "parent": "a", "role": "assistant", "content": evil, "reasoning": evil}
    answer["calls"] = [{"id": "c", "name": evil, "text": evil}]
    chosen = {"": "a", "a": "b"}
    bring(page, whole(conversation(title=evil, system=evil, turns=[said, answer], chosen=chosen)))
    expect(page.locator("#talk li")).to_have_count(2)
    assert titles(page) == [evil]
    assert page.locator("#stage img, #stage script, #sidebar img, #talk a").count() == 0
    assert page.evaluate("window.hurt") is None


@pytest.mark.parametrize("damage", ["{", '{"version": 9}', "null"])
def test_damaged_conversations_are_told_and_left(page, damage):
    two(page)
    key = KEY + "broken"
    page.evaluate("([key, text]) => localStorage.setItem(key, text)", [key, damage])
    page.reload()
    expect(page.locator("#unreadable")).to_contain_text("1 conversation in this browser cannot")
    assert len(titles(page)) == 2
    assert page.evaluate("key => localStorage.getItem(key)", key) == damage
    page.locator("#unreadable").get_by_role("button", name="Delete").click()
    expect(page.locator("#unreadable")).to_be_hidden()
    assert page.evaluate("key => localStorage.getItem(key)", key) is None
    assert len(titles(page)) == 2


@pytest.mark.parametrize("error", ["QuotaExceededError", "SecurityError"])
def test_a_browser_that_keeps_nothing_is_told_of_once(page, error):
    page.evaluate(
        "error => { Storage.prototype.setItem = () => { throw new DOMException('', error) } }",
        error,
    )
    with answering(page, "one", "two"):
        say(page, "First")
        say(page, "Second")
    assert turns(page) == ["First", "one", "Second", "two"]
    expect(page.locator("#notices .notice")).to_have_count(1)
    reason = "storage is full" if error.startswith("Quota") else "stores nothing"
    expect(page.locator("#notices")).to_contain_text(reason)
    assert titles(page) == ["First"]


def test_another_window_sees_what_is_said(watched):
    page = watched.page
    other = watched.context.new_page()
    other.goto(watched.url)
    expect(other.locator("#model")).to_have_text("tiny")
    page.bring_to_front()
    two(page)
    expect(other.locator("#conversations .open")).to_have_count(2)
    other.get_by_role("button", name="First", exact=True).click()
    page.get_by_role("button", name="First", exact=True).click()
    act(page, "Previous version")
    expect(other.locator(".turn.assistant .body")).to_have_text("one")


def test_settings_are_kept_but_no_key(page):
    page.locator("#show-settings").click()
    page.locator("#temperature").fill("0.5")
    page.locator("#stops").fill("END")
    page.locator("#stops").blur()
    page.reload()
    expect(page.locator("#temperature")).to_have_value("0.5")
    expect(page.locator("#stops")).to_have_value("END")
    mode(page, "Completion")
    expect(page.locator("#max_tokens")).to_have_value("200")

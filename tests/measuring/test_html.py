"""The page of a bench: what it says must be the document's, whatever names and texts are in it."""

import json
import re
from copy import deepcopy
from html.parser import HTMLParser

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from paceline.core import Cost
from paceline.measuring import bench as module
from paceline.measuring.bandwidth import Bandwidth
from paceline.measuring.baseline import TurnOptions
from paceline.measuring.bench import bench
from paceline.measuring.prompts import Dialogue
from paceline.measuring.report.document import bench_document, conditions
from paceline.measuring.report.html import page
from paceline.measuring.report.plots import chosen, eager
from tests.measuring.toy_lm import Knowing, ToyLM

DIALOGUES = [Dialogue(("Once upon",), "text", 1), Dialogue(("One", "Two"), "qa", 3)]
VOID = {"meta"}


def document(drafters, budgets=(2, 8, "auto")):
    lm = ToyLM()
    methods = {name: Knowing(lm.engine) for name in drafters}
    asking = TurnOptions(12, ignore_eos=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "measure_bandwidth", lambda threads: Bandwidth(1e9, 1 << 28, 2))
        patch.setattr(module, "measure_cost", lambda engine: Cost((1, 8, 64), (1e-3, 1e-3, 9e-3)))
        states = ["carried", "reset"]
        found = bench_document(bench(lm, methods, DIALOGUES, asking, budgets, 1, states))
    asked = {
        **{"suite": None, "file": "some/prompts.jsonl", "turns": 3, "repeat": 1, "state": "both"},
        **{"max_new_tokens": 12, "temperature": 0.0},
    }
    found |= {**conditions(lm, "toy/"), "settings": asked, "left_out": []}
    return found


FOUND = document(["one", "other"])  # whose guesses have the origin `oracle`


class Reader(HTMLParser):
    """Takes a page apart; every element that is opened must be closed in order."""

    def __init__(self, text):
        super().__init__()
        self.open, self.data, self.tokens, self.tags = [], [], [], []
        self.inside = False
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.tags.append((tag, attrs))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "data":
            self.data.append(float(attrs["value"]))
        self.inside = "token" in attrs.get("class", "").split()
        if self.inside:
            self.tokens.append([attrs, ""])

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag
        self.inside = False

    def handle_data(self, text):
        if self.inside:
            self.tokens[-1][1] += text


def numbers(content):
    """Every number of a document."""
    if isinstance(content, dict):
        return {x for value in content.values() for x in numbers(value)}
    if isinstance(content, list):
        return {x for value in content for x in numbers(value)}
    return {content} if isinstance(content, int | float) else set()


def test_every_number_of_the_page_is_the_documents():
    shown = Reader(page(FOUND)).data
    assert len(shown) > 100
    assert set(shown) <= numbers(FOUND)
    for arm in FOUND["arms"]:
        assert {arm["total"]["ratio"]["value"], arm["tokens_per_pass"]} <= set(shown)


def test_every_token_is_a_span_in_the_colour_of_its_origin():
    tokens = Reader(page(FOUND)).tokens
    traces = [FOUND["trace"]["arms"][arm["name"]] for arm in eager(FOUND)]
    expected = [token for trace in traces for token in trace]
    assert len(tokens) == len(expected) == 4 * 12
    for (attrs, text), token in zip(tokens, expected, strict=True):
        guessed = token["origin"] is not None
        assert text == token["text"]
        assert attrs["class"] == ("token c2" if guessed else "token own")
        assert ("score 0.50 · depth" if guessed else "the model's own") in attrs["data-tip"]
        assert f"pass {token['number']} of " in attrs["data-tip"]
    assert any(token["origin"] for token in expected)


def test_equality_is_said_and_so_is_its_absence():
    assert "All 39 outputs are identical to plain decoding" in page(FOUND)
    wrong = deepcopy(FOUND)
    wrong["arms"][2]["different"] = 2
    assert "2 of 39 outputs differ from plain decoding" in page(wrong)
    assert "are identical" not in page(wrong)


def test_nothing_is_fetched_and_nothing_runs():
    text = page(FOUND)
    tags = Reader(text).tags
    assert not {tag for tag, _ in tags} & {"script", "link", "img", "iframe", "object", "image"}
    names = {name for _, attrs in tags for name in attrs}
    assert not {name for name in names if name.startswith("on")} | (names & {"src", "href"})
    assert not re.search(r"url\(|@import|https?:", text)


def test_each_plot_is_there():
    text = page(FOUND)
    for title in ("Speed by task", "Tokens per pass", "T(n) and", "Where a pass", "Reliability: "):
        assert f"<h2>{title}" in text.replace("&#x27;", "'")
    assert text.count("<svg") == 4 + len(eager(FOUND))
    # Speed: a dot for each of the shown arms at all prompts and at each of the two categories.
    first = text[text.index("<svg") : text.index("</svg>")]
    assert first.count("<circle") == 3 * len(chosen(FOUND)) == 12


def test_an_arm_is_shown_for_each_drafter_and_state():
    assert [arm["name"] for arm in chosen(FOUND)] == [
        *("one@auto carried", "one@auto reset", "other@auto carried", "other@auto reset")
    ]
    without = {**FOUND, "arms": [arm for arm in FOUND["arms"] if arm["budget"] != "auto"]}
    best = max(without["arms"][1:3], key=lambda arm: arm["total"]["ratio"]["value"])
    assert chosen(without)[0] == best


def test_plain_decoding_alone_makes_a_page_without_plots():
    found = document([])
    text = page(found)
    assert "<svg" not in text
    assert set(Reader(text).data) <= numbers(found)


@settings(max_examples=15)
@given(st.text(max_size=20), st.text(max_size=20))
@example("<script>alert(1)</script>", '"><b')
@example("\r\n\t]]>", "\x00\x1b\ud800&")
def test_names_and_texts_cannot_break_the_page(name, text):
    found = deepcopy(FOUND)
    found["model"]["path"] = found["settings"]["file"] = name
    found["trace"]["prompt"] = name
    for arm in found["arms"]:
        old, arm["name"], arm["drafter"] = arm["name"], arm["name"] + name, arm["drafter"] + name
        arm["categories"] = {name + key: row for key, row in arm["categories"].items()}
        trace = found["trace"]["arms"].pop(old)
        found["trace"]["arms"][arm["name"]] = [{**token, "text": text} for token in trace]
    made = page(found)
    assert [tag for tag, _ in Reader(made).tags] == [tag for tag, _ in Reader(page(FOUND)).tags]
    made.encode()


def test_the_page_is_made_from_the_document_as_it_is_saved():
    assert page(json.loads(json.dumps(FOUND))) == page(FOUND)

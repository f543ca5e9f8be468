"""What a trace tells of a pass lines up with the text that is shown."""

import json
from dataclasses import replace

import httpx2 as httpx
from hypothesis import given, settings
from hypothesis import strategies as st

from paceline.core import TokenTree
from paceline.serving.api.formatting import traced as trace
from paceline.serving.messages import JobEvent
from paceline.serving.service import merged


def traced(address, **body):
    body = {"prompt": "Once upon a time", "max_tokens": 40, "trace": True} | body
    found = httpx.post(f"{address}/v1/completions", json=body).json()
    [choice] = found["choices"]
    return choice["text"], found["paceline"]["trace"]


def check(text, passes):
    assert "".join(piece for each in passes for piece in each["texts"]) == text
    for each in passes:
        assert len(each["texts"]) == len(each["tokens"]) == len(each["origins"])
        tree = each["tree"]
        sizes = {len(tree[name]) for name in ("tokens", "parents", "scores", "origins")}
        assert len(sizes) == 1
        assert tree["origins"][0] is None
        guessed = [tree["origins"][node] for node in tree["path"][1:]]
        assert [*guessed, None][: len(each["origins"])] == each["origins"]
    moments = [each["at"] for each in passes]
    assert moments == sorted(moments)
    assert len(set(moments)) == len(moments)


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**32), stops=st.lists(st.sampled_from("eaot, ."), max_size=2))
def test_texts_of_tokens_are_the_answer(address, seed, stops):
    stops = [f"{stop}{other}" for stop, other in zip(stops, "hn", strict=False)]
    speculation = {"drafter": "blend", "budget": 8}
    body = {"seed": seed, "temperature": 0.9, "stop": stops, "speculation": speculation}
    check(*traced(address, **body))


def test_characters_of_several_tokens_belong_to_the_last(address):
    said = "é漢字🙂\u200d\n"
    body = {"guided_json": {"const": said}, "max_tokens": 200, "speculation": {"budget": 8}}
    text, passes = traced(address, **body)
    assert json.loads(text) == said
    check(text, passes)
    assert any(piece == "" for each in passes for piece in each["texts"])


def test_passes_that_a_slow_reader_gets_as_one_lose_no_text(lm):
    trees = [TokenTree.chain([5, 6]), TokenTree.root(7)]
    one = JobEvent("a", "xy", [6, 7], ["b", None], tree=trees[0], path=[0, 1], texts=["x", "y"])
    one = replace(one, sources=("b",), at=1.0, passes=1)
    two = replace(one, text="z", tokens=[8], origins=[None], tree=trees[1], path=[0], texts=["z"])
    over = JobEvent("a", finish="stop")
    found = trace(merged(merged(one, replace(two, at=2.0)), over), lm)
    assert found["texts"] == ["x", "y", "z"]
    assert found["tokens"] == [6, 7, 8]
    assert found["origins"] == ["b", None, None]
    assert (found["at"], found["passes"]) == (2.0, 2)
    assert found["tree"]["path"] == [0]
    assert trace(merged(one, over), lm)["tree"]["origins"] == [None, "b"]

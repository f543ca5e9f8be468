"""Who meets on a replica, and who has to go elsewhere."""

from collections import Counter
from math import ceil

from hypothesis import given
from hypothesis import strategies as st

from paceline.serving.cluster.affinity import beginning, ranked

NAMES = st.sets(st.text("abcdef", min_size=1, max_size=4), min_size=1, max_size=8)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda each: st.lists(each, max_size=3) | st.dictionaries(st.text(max_size=3), each),
    max_leaves=8,
)


def said(role, content):
    return {"role": role, "content": content}


def test_a_conversation_keeps_its_beginning():
    turns = [said("system", "Be brief."), said("user", "Hello"), said("assistant", "Hi")]
    first = beginning({"messages": turns[:2]})
    assert "Be brief." in first
    assert "Hello" in first
    assert beginning({"messages": [*turns, said("user", "Why?")]}) == first
    assert beginning({"messages": [turns[0], said("user", "Bye")]}) != first


def test_prompts_that_begin_alike_meet():
    shared = "A long text. " * 60
    assert beginning({"prompt": shared + "One?"}) == beginning({"prompt": [shared + "Two?"]}) != ""
    tokens = list(range(300))
    assert beginning({"prompt": tokens}) == beginning({"prompt": [[*tokens, 7]]}) != ""
    assert beginning({"input": "x"}) == "x"


@given(JSON, st.sampled_from(["prompt", "messages", "input"]))
def test_nothing_that_comes_is_too_strange(value, name):
    for body in (value, {name: value}, {name: [value]}):
        key = beginning(body)
        assert isinstance(key, str)
        assert sorted(ranked(key, {"a": 0, "b": 3})) == ["a", "b"]


@given(st.text(min_size=1), NAMES, st.text("xyz", min_size=5))
def test_a_replica_that_comes_or_goes_moves_no_others_requests(key, names, other):
    loads = dict.fromkeys(names, 0)
    order = ranked(key, loads)
    assert [name for name in ranked(key, loads | {other: 0}) if name != other] == order


@given(st.lists(st.text(min_size=1, max_size=2), max_size=60), NAMES)
def test_no_replica_has_much_more_than_its_share(keys, names):
    loads = dict.fromkeys(names, 0)
    for key in keys:
        loads[ranked(key, loads)[0]] += 1
        assert max(loads.values()) <= ceil(1.25 * sum(loads.values()) / len(names))


def test_beginnings_are_spread():
    loads = dict.fromkeys("abcd", 0)
    seen = Counter(ranked(f"text {number}", loads)[0] for number in range(2000))
    assert min(seen.values()) > 400
    assert ranked("", {"a": 2, "b": 1, "c": 3}) == ["b", "a", "c"]

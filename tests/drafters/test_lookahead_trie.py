"""`lookahead_trie` against its plain Python meaning, and what it keeps."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paceline.drafters.base import Target
from paceline.errors import MethodError
from paceline.registry import drafters
from tests.drafters import reference
from tests.drafters.steps import asked
from tests.drafters.test_recycle import assert_same


def build(vocab=1000, **changes):
    spec = ",".join(f"{name}={value}" for name, value in changes.items())
    return drafters.parse(f"lookahead_trie:{spec}").build(Target(vocab))


def tell(drafter, text, budget=1):
    """A whole text as one prompt; the tree after it."""
    drafter.begin(asked(text))
    return drafter.propose(np.array(text, np.int32), budget)


@settings(deadline=None, max_examples=60)
@given(
    texts=st.lists(st.lists(st.integers(0, 4), min_size=1, max_size=60), min_size=1, max_size=3),
    prompt=st.integers(1, 40),
    branch=st.integers(2, 5),
    k=st.integers(1, 4),
    here=st.sampled_from([0.0, 1.0, 4.0]),
)
def test_agrees_with_the_reference(texts, prompt, branch, k, here):
    drafter = build(5, branch=branch, k=k, here=here, rate=0.1, capacity=256)
    slow = reference.Trie(branch, k, 256, here, 0.1)
    for text in texts:
        first = min(prompt, len(text))
        drafter.begin(asked(text[:first]))
        slow.begin()
        for length in range(first, len(text) + 1, 4):
            tree = drafter.propose(np.array(text[:length], np.int32), 8)
            for at in range(len(slow.text), length):
                slow.read(text[at], at >= first)
            assert_same(tree, slow.propose(tuple(text[:length]), 8))
    state = drafter.state()
    assert state["reliability"] == pytest.approx(list(slow.reliability.values()), abs=1e-4)
    assert sorted(state["counts"].tolist()) == sorted(slow.counts.values())


def test_the_reference_sees_evictions():
    """So that the property above is one of full tries, too."""
    slow = reference.Trie(5, 4, 256, 1.0, 0.1)
    for token in np.random.default_rng(0).integers(0, 5, 150).tolist():
        slow.read(token, False)
    assert len(slow.counts) < 256
    assert max(slow.counts.values()) < 150 / 5


def test_branches_of_other_requests_are_repeated():
    drafter = build()
    tell(drafter, [1, 2, 3, 4, 5, 6, 7, 8, 9])
    assert tell(drafter, [50, 2, 3], 4).tokens.tolist() == [3, 4, 5, 6, 7]


def test_frequent_continuations_come_first_and_this_text_counts_more():
    drafter = build(here=10.0)
    for last in (60, 60, 60, 70):
        tell(drafter, [1, last, 2])
    tree = tell(drafter, [9, 1], 6)
    assert tree.tokens[tree.parents == 0][:2].tolist() == [60, 70]
    assert tell(drafter, [1, 70, 8, 1], 1).tokens.tolist() == [1, 70]


def test_what_is_frequent_outlives_what_is_rare():
    random = np.random.default_rng(0)
    drafter = build(capacity=1024)
    for _ in range(50):
        tell(drafter, [1, 2, 3, 4, 1, 2, 3, 4])
        tell(drafter, random.integers(10, 1000, 100).tolist())
    assert tell(drafter, [1, 2], 2).tokens.tolist() == [2, 3, 4]


@settings(deadline=None, max_examples=5)
@given(seed=st.integers(0, 2**32 - 1), capacity=st.sampled_from([256, 1000, 4096]))
def test_memory_is_bounded(seed, capacity):
    random = np.random.default_rng(seed)
    drafter = build(capacity=capacity)
    for _ in range(60):
        tell(drafter, random.integers(0, 1000, 200).tolist())
        state = drafter.state()
        assert len(state["tokens"]) < capacity
    assert sum(array.nbytes for array in state.values()) <= 12 * capacity + 4 * 7 * 4


def spoilt(drafter, name, place, value):
    state = drafter.state()
    state[name][place] = value
    return state


@pytest.mark.parametrize(
    ("name", "place", "value"),
    [
        ("tokens", 0, -1),
        ("tokens", 0, 1000),
        ("parents", 1, 5),
        ("parents", 1, -1),
        ("counts", 0, float("nan")),
        ("counts", 0, 0.0),
        ("reliability", 0, 1.5),
    ],
)
def test_impossible_branches_are_refused(name, place, value):
    drafter = build()
    tell(drafter, [1, 2, 3])
    with pytest.raises(MethodError, match="impossible"):
        drafter.load(spoilt(drafter, name, place, value))


def test_tries_that_are_too_large_or_too_deep_are_refused():
    drafter = build()
    tell(drafter, np.random.default_rng(0).integers(0, 1000, 300).tolist())
    with pytest.raises(MethodError, match="capacity"):
        build(capacity=256).load(drafter.state())
    small = build()
    tell(small, [1, 2, 3, 4, 5])
    state = small.state()
    state["parents"] = np.arange(len(state["tokens"]), dtype=np.int32)
    with pytest.raises(MethodError, match="impossible"):
        small.load(state)

"""`lookup` against its plain Python meaning."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paceline.drafters.base import Target
from paceline.registry import drafters
from tests.drafters import reference
from tests.drafters.steps import asked
from tests.drafters.test_recycle import assert_same


def tree_after(text, budget, spec="lookup"):
    drafter = drafters.parse(spec).build(Target(1000))
    drafter.begin(asked(text))
    return drafter.propose(np.array(text, np.int32), budget)


@settings(deadline=None, max_examples=60)
@given(
    text=st.lists(st.integers(0, 4), min_size=1, max_size=40),
    prompt=st.integers(1, 40),
    longest=st.integers(1, 5),
    k=st.integers(1, 4),
    keep=st.sampled_from([0.0, 0.5, 0.9]),
)
def test_agrees_with_the_reference(text, prompt, longest, k, keep):
    prompt = min(prompt, len(text))
    drafter = drafters.parse(f"lookup:longest={longest},k={k},keep={keep},rate=0.1").build(
        Target(5)
    )
    drafter.begin(asked(text[:prompt]))
    for length in range(prompt, len(text) + 1, 3):  # the index grows as the text does
        tree = drafter.propose(np.array(text[:length], np.int32), 8)
        slow = reference.Lookup(longest, k, keep, 0.1)
        slow.learn(tuple(text[:length]), prompt)
        assert_same(tree, slow.propose(tuple(text[:length]), 8))
        assert drafter.state()["reliability"] == pytest.approx(slow.reliability, abs=1e-4)


def test_copies_a_long_match():
    text = [1, 2, 3, 4, 5, 6, 7, 8, 9, 1, 2]
    assert tree_after(text, 5).tokens.tolist() == [2, 3, 4, 5, 6, 7]


def test_the_longest_match_speaks_first():
    text = [1, 2, 50, 7, 2, 60, 8, 2, 60, 1, 2]
    tree = tree_after(text, 2, "lookup:longest=2")
    assert tree.tokens[1] == 50
    wide = tree_after(text, 16, "lookup:longest=2")
    assert {50, 60} <= set(wide.tokens[wide.parents == 0].tolist())


def test_recent_and_frequent_continuations_are_branches():
    text = [1, 70, 1, 70, 1, 70, 1, 80, 1, 90, 1]
    tree = tree_after(text, 6, "lookup:longest=1,k=4")
    first = tree.tokens[tree.parents == 0].tolist()
    assert first[0] == 90
    assert {70, 80} <= set(first)


def test_the_most_recent_is_first_even_at_its_first_return():
    for old, new in ((70, 80), (80, 70)):
        assert tree_after([1, old, 1, new, 1], 1).tokens[1] == new


def test_nothing_to_copy_is_plain_decoding():
    assert len(tree_after([1, 2, 3], 16)) == 1


def test_a_new_request_does_not_see_the_old_text():
    drafter = drafters.parse("lookup").build(Target(1000))
    for text, nodes in (([1, 2, 3, 1], 3), ([1], 1), ([2, 3, 4, 2], 3)):
        drafter.begin(asked(text))
        tree = drafter.propose(np.array(text, np.int32), 2)
        assert len(tree) == nodes
        assert not set(tree.tokens.tolist()) - set(text)


def test_long_texts_stay_in_bounds():
    random = np.random.default_rng(0)
    text = random.integers(0, 1000, 20000)
    assert len(tree_after(text, 16, "lookup:capacity=64")) <= 17

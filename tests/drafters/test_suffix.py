"""`suffix` against its plain Python meaning."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paceline.drafters.base import Target
from paceline.registry import drafters
from tests.drafters import reference
from tests.drafters.steps import asked
from tests.drafters.test_recycle import assert_same

TEXTS = st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=30), min_size=1, max_size=4)


def build(spec="suffix", vocab=1000):
    return drafters.parse(spec).build(Target(vocab))


def tree_after(texts, budget, spec="suffix"):
    drafter = build(spec)
    for text in texts:
        drafter.begin(asked(text))
        tree = drafter.propose(np.array(text, np.int32), budget)
    return tree


@settings(deadline=None, max_examples=80)
@given(texts=TEXTS, prompt=st.integers(1, 30), k=st.integers(1, 4))
def test_agrees_with_the_reference(texts, prompt, k):
    drafter, slow = build(f"suffix:k={k},rate=0.1", 4), reference.Suffix(k, 0.1)
    for text in texts:
        text = tuple(text)
        drafter.begin(asked(text[:prompt]))
        tree = drafter.propose(np.array(text, np.int32), 8)
        slow.read(text, min(prompt, len(text)))
        assert_same(tree, slow.propose(text, 8))
        assert drafter.state()["reliability"] == pytest.approx(slow.reliability, abs=1e-4)


def test_an_earlier_text_is_continued():
    text = [5, 6, 7, 8, 9, 10]
    assert tree_after([text, [1, 5, 6, 7]], 3).tokens.tolist() == [7, 8, 9, 10]


def test_the_longest_match_speaks_first():
    early = [[1, 2, 3, 50, 0], *([[2, 3, 60, 0]] * 5)]
    assert tree_after([*early, [1, 2, 3]], 1).tokens[1] == 50
    assert tree_after([*early, [4, 2, 3]], 1).tokens[1] == 60


def test_branches_follow_their_own_matches():
    tree = tree_after([[1, 2, 3, 4], [1, 2, 5, 6], [1, 2]], 4)
    paths = {(int(tree.tokens[tree.parents[i]]), int(tree.tokens[i])) for i in range(1, len(tree))}
    assert paths == {(2, 3), (3, 4), (2, 5), (5, 6)}


def test_what_is_too_old_is_forgotten():
    spec = "suffix:capacity=40"
    old, filler = [5, 6, 7, 8], list(range(100, 120))
    assert len(tree_after([old, filler, [5, 6, 7]], 2, spec)) == 2  # one generation back
    assert len(tree_after([old, filler, filler, [5, 6, 7]], 2, spec)) == 1


@settings(deadline=None, max_examples=30)
@given(texts=TEXTS, capacity=st.integers(2, 40))
def test_saved_in_between_it_goes_on_alike(texts, capacity):
    one, two = (build(f"suffix:capacity={capacity}", 4) for _ in range(2))
    for text in texts:
        two.load({name: array.copy() for name, array in one.state().items()})
        trees = []
        for drafter in (one, two):
            drafter.begin(asked(text[:1]))
            for length in range(1, len(text) + 1):
                trees.append(drafter.propose(np.array(text[:length], np.int32), 6))
        half = len(trees) // 2
        for a, b in zip(trees[:half], trees[half:], strict=True):
            assert_same(a, list(zip(b.tokens.tolist(), b.parents.tolist(), b.scores, strict=True)))


def test_memory_is_bounded():
    random, drafter = np.random.default_rng(0), build("suffix:capacity=1000")
    sizes = []
    for _ in range(300):
        text = random.integers(0, 1000, 40).tolist()
        drafter.begin(asked(text))
        drafter.propose(np.array(text, np.int32), 4)
        sizes.append(drafter._automata.bytes)
        assert len(drafter.state()["read"]) < 1100
    assert max(sizes[150:]) <= max(sizes[:150]) * 1.5

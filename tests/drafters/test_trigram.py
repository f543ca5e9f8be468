"""`trigram` against its plain Python meaning."""

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from paceline.core import TokenTree
from paceline.drafters.base import Target
from paceline.registry import drafters
from tests.drafters import reference
from tests.drafters.steps import asked, random_step
from tests.drafters.test_recycle import teach


def build(vocab, **changes):
    spec = ",".join(f"{name}={value}" for name, value in changes.items())
    return drafters.parse(f"trigram:{spec}").build(Target(vocab))


@settings(deadline=None, max_examples=40)
@given(
    seed=st.integers(0, 2**32 - 1),
    vocab=st.integers(2, 12),
    k=st.integers(1, 6),
    explore=st.sampled_from([0.0, 0.5, 3.0]),
    depth=st.integers(1, 6),
)
def test_agrees_with_the_reference(seed, vocab, k, explore, depth):
    random = np.random.default_rng(seed)
    drafter = build(vocab, k=k, explore=explore, depth=depth, rate=0.1)
    slow = reference.Trigram(k, explore, depth, 0.6, 0.1)
    context = random.integers(0, vocab, 4).tolist()
    drafter.begin(asked(context))
    for chain in (TokenTree.chain(context[:-1]), *[None] * 6):
        if chain is None:
            tree = drafter.propose(np.array(context, np.int32), 10)
            try:
                expected = slow.propose(tuple(context), 10)
            except reference.Unclear:
                assume(False)
            assert tree.tokens.tolist() == [token for token, _, _ in expected]
            assert tree.parents.tolist() == [parent for _, parent, _ in expected]
            assert tree.scores == pytest.approx([s for _, _, s in expected], abs=1e-5)
            step = random_step(random, tree, context, vocab, drafter.top_k)
            context += step.drawn.tolist()
        else:
            step = random_step(random, chain, context[:1], vocab, drafter.top_k)
        drafter.observe(step)
        slow.observe(step, learn=chain is None)


def test_two_tokens_say_what_comes_third():
    drafter = build(50)
    teach(drafter, [1, 2], [(10, 0.9)], 10)
    teach(drafter, [5, 2], [(20, 0.9)], 20)
    for context, best in (([9, 1, 2], 10), ([9, 5, 2], 20)):
        assert drafter.propose(np.array(context, np.int32), 1).tokens[1] == best
    assert len(drafter.propose(np.array([2], np.int32), 4)) == 1
    assert len(drafter.propose(np.array([7, 2], np.int32), 4)) == 1


def test_exploring_makes_trees_wider():
    def children_of_the_root(explore):
        drafter = build(50, explore=explore)
        for _ in range(3):
            teach(drafter, [1, 2], [(2, 0.4), (1, 0.3), (3, 0.2), (4, 0.05)], 2)
            teach(drafter, [2, 2], [(2, 0.6), (1, 0.3)], 2)
            teach(drafter, [2, 1], [(2, 0.6), (1, 0.3)], 2)
        tree = drafter.propose(np.array([1, 2], np.int32), 8)
        return int((tree.parents == 0).sum())

    assert children_of_the_root(0) < children_of_the_root(10)


def test_scores_become_chances_of_what_is_drawn():
    random = np.random.default_rng(0)
    drafter = build(50, rate=0.01)
    for _ in range(3000):
        teach(drafter, [1, 2], [(10, 0.8), (11, 0.2)], 10 if random.random() < 0.4 else 11)
    tree = drafter.propose(np.array([1, 2], np.int32), 2)
    assert tree.scores[tree.tokens == 10][0] == pytest.approx(0.4, abs=0.1)
    assert tree.scores[tree.tokens == 11][0] == pytest.approx(0.6, abs=0.1)


def test_memory_is_bounded():
    random = np.random.default_rng(0)
    drafter = build(1000, capacity=64, k=4)
    for _ in range(200):
        context = random.integers(0, 1000, 6).tolist()
        tree = TokenTree.chain(random.integers(0, 1000, 8))
        drafter.observe(random_step(random, tree, context, 1000, 4))
    state = drafter.state()
    assert len(state["keys"]) <= 64
    assert sum(array.nbytes for array in state.values()) <= 64 * 60 + 200

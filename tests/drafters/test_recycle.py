"""`recycle:tree=best` against its plain Python meaning, its bounds and its cost."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paceline.core import Request, Step, TokenTree
from paceline.drafters.base import Target, prompt_steps
from paceline.registry import drafters
from tests.drafters import reference
from tests.drafters.steps import asked, random_step


def build(vocab, **changes):
    spec = ",".join(f"{name}={value}" for name, value in changes.items())
    return drafters.parse(f"recycle:{spec}").build(Target(vocab))


@settings(deadline=None, max_examples=40)
@given(
    seed=st.integers(0, 2**32 - 1),
    vocab=st.integers(2, 40),
    orders=st.integers(1, 5),
    skips=st.integers(0, 3),
    k=st.integers(1, 12),
    keep=st.sampled_from([0.0, 0.6, 1.0]),
    rate=st.sampled_from([0.0, 0.02, 0.3]),
)
def test_agrees_with_the_reference(seed, vocab, orders, skips, k, keep, rate):
    random = np.random.default_rng(seed)
    drafter = build(vocab, orders=orders, skips=skips, k=k, keep=keep, rate=rate, capacity=1 << 14)
    slow = reference.Mixer(orders, skips, k, keep, rate)
    context = random.integers(0, vocab, 4).tolist()
    drafter.begin(asked(context))
    # Not at any point of the prompt are the weights taught.
    chain = TokenTree.chain(context[:-1])
    for tree in [chain, *[None] * 6]:
        if tree is None:
            tree = drafter.propose(np.array(context, np.int32), 10)
            assert_same(tree, slow.propose(tuple(context), 10))
            step = random_step(random, tree, context, vocab, drafter.top_k)
            context += step.drawn.tolist()
        else:
            step = random_step(random, tree, context[:1], vocab, drafter.top_k)
        drafter.observe(step)
        slow.observe(step, learn=tree is not chain)


def assert_same(tree, nodes):
    """The same tree, but for the order of paths whose probabilities rounding cannot tell apart."""
    assert len(tree) == len(nodes)
    mine = by_path(tree.tokens.tolist(), tree.parents.tolist(), tree.scores.tolist())
    theirs = by_path(*zip(*nodes, strict=True))
    least = min(product for _, product in theirs.values())
    for path in mine.keys() | theirs.keys():
        if path in mine and path in theirs:
            assert mine[path][0] == pytest.approx(theirs[path][0], rel=1e-3, abs=1e-5)
        else:
            product = (mine.get(path) or theirs[path])[1]
            assert product == pytest.approx(least, rel=1e-2)


def by_path(tokens, parents, scores):
    paths = [()]
    found = {(): (1.0, 1.0)}
    for token, parent, score in zip(tokens[1:], parents[1:], scores[1:], strict=True):
        paths.append((*paths[parent], token))
        found[paths[-1]] = (score, score * found[paths[parent]][1])
    return found


def teach(drafter, context, distribution, drawn):
    tokens, probs = zip(*distribution, strict=True)
    drafter.observe(
        Step(
            np.array(context, np.int32),
            TokenTree.root(context[-1]),
            np.array([tokens], np.int32),
            np.array([probs], np.float32),
            np.array([0], np.int32),
            np.array([drawn], np.int32),
        )
    )


def test_longer_contexts_overrule_shorter_ones():
    drafter = build(50, orders=3)
    for _ in range(5):
        teach(drafter, [1, 2, 3], [(10, 0.9), (11, 0.05)], 10)
        teach(drafter, [4, 5, 3], [(20, 0.9), (21, 0.05)], 20)
    for context, best in (([9, 1, 2, 3], 10), ([9, 4, 5, 3], 20)):
        tree = drafter.propose(np.array(context, np.int32), 1)
        assert tree.tokens[1] == best


def test_scores_become_chances_of_what_is_drawn():
    """Whatever the model's distribution says: here the first is drawn half as often as it says."""
    random = np.random.default_rng(0)
    drafter = build(50, rate=0.05)
    for _ in range(3000):
        teach(drafter, [1, 2, 3], [(10, 0.8), (11, 0.2)], 10 if random.random() < 0.4 else 11)
    tree = drafter.propose(np.array([1, 2, 3], np.int32), 2)
    assert tree.scores[tree.tokens == 11][0] == pytest.approx(0.6, abs=0.15)


def test_prompts_do_not_teach_the_weights():
    drafter = build(50)
    drafter.begin(asked(range(10)))
    before = drafter.state()
    teach(drafter, [0, 1, 2], [(3, 0.9)], 3)
    after = drafter.state()
    assert np.array_equal(before["weights"], after["weights"])
    assert len(after["keys"]) > 0


def test_logits_that_are_not_numbers_are_not_learnt():
    drafter = build(50)
    teach(drafter, [1, 2], [(3, float("nan"))], 3)
    assert len(drafter.state()["keys"]) == 0


@settings(deadline=None, max_examples=10)
@given(seed=st.integers(0, 2**32 - 1), capacity=st.sampled_from([8, 64, 500]))
def test_memory_is_bounded(seed, capacity):
    random = np.random.default_rng(seed)
    drafter = build(1000, capacity=capacity, k=4)
    for _ in range(200):
        context = random.integers(0, 1000, 6).tolist()
        tree = TokenTree.chain(random.integers(0, 1000, 8))
        drafter.observe(random_step(random, tree, context, 1000, 4))
    state = drafter.state()
    rows = max(8, 1 << (capacity - 1).bit_length())
    assert len(state["keys"]) <= rows
    assert sum(array.nbytes for array in state.values()) <= rows * 60 + (1 << 16)
    assert len(drafter.propose(np.array([1, 2], np.int32), 16)) <= 17


def test_contexts_in_use_outlive_the_others():
    random = np.random.default_rng(0)
    drafter = build(5000, capacity=512, k=2, orders=2)
    for _ in range(300):
        teach(drafter, [1, 2], [(3, 0.9)], 3)
        teach(drafter, random.integers(10, 5000, 2).tolist(), [(7, 0.5)], 7)
    tree = drafter.propose(np.array([1, 2], np.int32), 1)
    assert tree.tokens.tolist() == [2, 3]


@pytest.mark.parametrize("name", ["recycle", "trigram", "token_recycling", "blend"])
def test_the_prompt_teaches_without_a_pass(name):
    """After a text that repeats, the next token is proposed as it came before."""
    drafter = drafters.parse(name).build(Target(50))
    assert not drafter.learns_from_prompt
    prompt = (*range(10, 30), 7, *range(10, 20))
    context = np.array(prompt, np.int32)
    drafter.begin(Request(prompt, 8))
    drafter.read_prompt()
    assert 20 in drafter.propose(context, 8).tokens[1:].tolist()
    drafter.read_prompt()  # no harm


def test_a_long_prompt_is_read_in_parts_that_join():
    prompt = np.random.default_rng(0).integers(0, 9, 9000).tolist()
    steps = list(prompt_steps(prompt))
    assert [len(step.tree) for step in steps] == [4096, 4096, 807]
    assert [token for step in steps for token in step.tree.tokens.tolist()] == prompt[:-1]
    assert [token for step in steps for token in step.drawn.tolist()] == prompt[1:]
    for step in steps:
        assert step.context[-1] == step.tree.tokens[0]
        np.testing.assert_array_equal(step.top_tokens[:, 0], step.drawn)
        assert (step.top_probs == 0.5).all()
    assert not list(prompt_steps(prompt[:1]))

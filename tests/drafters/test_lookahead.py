"""`lookahead`: fixed-point iteration in the chain, n-grams in the pool, bounds."""

import numpy as np
import pytest

from paceline.core import Request, Step, TokenTree
from paceline.decoding.governor import Fixed
from paceline.decoding.loop import Generation
from paceline.drafters.base import Target
from paceline.errors import MethodError
from paceline.registry import drafters
from tests.drafters.steps import asked, random_step
from tests.toy import ToyEngine


def build(vocab=1000, **changes):
    spec = ",".join(f"{name}={value}" for name, value in changes.items())
    return drafters.parse(f"lookahead:{spec}").build(Target(vocab))


def run_pass(drafter, tree, context, top):
    """A greedy pass by a model that finds `top` [N] likeliest; what it drew."""
    top = np.asarray(top, np.int32)[:, None]
    path, drawn = [0], [int(top[0, 0])]
    while (child := tree.child(path[-1], drawn[-1])) is not None:
        path.append(child)
        drawn.append(int(top[child, 0]))
    arrays = (np.array(part, np.int32) for part in (path, drawn))
    probs = np.ones(top.shape, np.float32)
    drafter.observe(Step(np.array(context, np.int32), tree, top, probs, *arrays))
    return drawn


def counting(drafter, tree, context):
    """After t comes t + 1."""
    return run_pass(drafter, tree, context, tree.tokens + 1)


def test_the_next_chain_is_what_the_model_said_after_this_one():
    drafter = build(window=5)
    context = [7, 8]
    drafter.begin(asked(context))
    tree = drafter.propose(np.array(context, np.int32), 5)
    assert len(set(tree.tokens[1:].tolist()) - {7, 8}) == 0  # at first, tokens of the context
    assert tree.parents.tolist() == [-1, 0, 1, 2, 3, 4]
    context += run_pass(drafter, tree, context, [50, 51, 52, 53, 54, 55])
    assert context[-1] == 50
    assert drafter.propose(np.array(context, np.int32), 5).tokens[:6].tolist() == [
        50, 51, 52, 53, 54, 55,
    ]  # fmt: skip


def test_a_fixed_point_is_accepted_whole():
    """A model that looks at positions only: the first pass mends all guesses."""
    drafter = build(window=6)
    context = [5]
    drafter.begin(asked(context))
    gained = []
    for _ in range(6):
        tree = drafter.propose(np.array(context, np.int32), 12)
        drawn = run_pass(drafter, tree, context, 100 + len(context) + tree.depths())
        gained.append(len(drawn))
        context += drawn
    assert context[1:] == list(range(101, 100 + len(context)))
    assert gained[:2] == [1, 7]


def test_trajectories_become_n_grams():
    drafter = build(window=4, n=3)
    context = [5]
    drafter.begin(asked(context))
    for _ in range(6):
        tree = drafter.propose(np.array(context, np.int32), 8)
        context += counting(drafter, tree, context)
    grams = drafter.state()["grams"]
    assert len(grams) > 0
    assert (np.diff(grams, axis=1) == 1).all()


def test_n_grams_of_the_prompt_are_branches():
    drafter = build(n=4, share=0.0)
    text = [1, 2, 3, 4, 9, 1, 2, 7, 7, 1]
    drafter.begin(asked(text))
    tree = drafter.propose(np.array(text, np.int32), 6)
    paths = {tuple(tree.tokens[[a, b]]) for b, a in enumerate(tree.parents) if b}
    assert {(1, 2), (2, 3), (3, 4), (2, 7), (7, 7)} <= paths


def test_it_saves_passes_where_the_model_repeats_itself():
    request = Request(prompt=(1, 2, 3), max_new_tokens=40)

    def run(name, engine):
        drafter = drafters.parse(name).build(Target(11))
        return Generation(engine, drafter, request, Fixed(16)).run()

    engine = ToyEngine(order=1)
    output = run("lookahead", engine)
    assert output.tokens == run("plain", engine).tokens
    assert output.passes < 40


def test_memory_is_bounded():
    random = np.random.default_rng(0)
    drafter = build(capacity=50, verified=3)
    for _ in range(20):
        context = random.integers(0, 1000, 40).tolist()
        drafter.begin(asked(context))
        for _ in range(5):
            tree = drafter.propose(np.array(context, np.int32), 16)
            step = random_step(random, tree, context, 1000, 1)
            drafter.observe(step)
            context += step.drawn.tolist()
    grams = drafter.state()["grams"]
    assert len(grams) <= 50
    assert max(np.bincount(grams[:, 0])) <= 3
    assert len(drafter._pool._by_first) <= 50


def test_a_tree_of_which_only_a_part_was_run():
    drafter = build()
    context = [1, 2, 3, 1, 2, 3, 1]
    drafter.begin(asked(context))
    tree = drafter.propose(np.array(context, np.int32), 12).cut(1)
    assert len(tree) > 1
    counting(drafter, tree, context)
    counting(drafter, TokenTree.root(1), context)


@pytest.mark.parametrize("wrong", [1000, -1])
def test_impossible_tokens_are_refused(wrong):
    drafter = build(n=2)
    drafter.begin(asked([1, 2, 3]))
    state = drafter.state()
    state["grams"][0, 0] = wrong
    with pytest.raises(MethodError, match="impossible"):
        drafter.load(state)


def test_other_settings_are_refused():
    drafter = build(n=2)
    drafter.begin(asked([1, 2, 3]))
    with pytest.raises(MethodError, match="other settings"):
        build(n=3).load(drafter.state())

"""`blend`: one tree from many sources."""

import numpy as np
import pytest

from paceline.core import Step, TokenTree
from paceline.drafters import blend as module
from paceline.drafters.base import Drafter, DraftMethod, Target, single_origin_tree
from paceline.errors import MethodError
from paceline.registry import drafters
from tests.drafters.steps import asked, random_step

VOCAB = 50


class _Says(Drafter):
    """Guesses the same chain whatever the text; counts how often it is asked."""

    origins = ("says",)

    def __init__(self, tokens):
        self.tokens, self.asked = tokens, 0

    def propose(self, context, budget, min_path_prob=0.0):
        self.asked += 1
        chain = [int(context[-1]), *self.tokens[:budget]]
        n = len(chain)
        scores = np.array([1.0] + [0.9] * (n - 1), np.float32)
        return single_origin_tree(
            np.array(chain, np.int32), np.arange(-1, n - 1, dtype=np.int32), scores
        )


def with_members(monkeypatch, *members):
    class Method(DraftMethod):
        def __init__(self, member, name):
            self.member, self.name = member, name

        def build(self, target):
            return self.member

    methods = [Method(member, f"m{i}") for i, member in enumerate(members)]
    monkeypatch.setattr(module.Blend, "methods", lambda self: methods)
    return module.Blend().build(Target(VOCAB))


def step_over(tree, context, drawn_of):
    """A pass whose model surely says `drawn_of(last token)`."""
    top = np.array([[drawn_of(t)] for t in tree.tokens.tolist()], np.int32)
    path, drawn = [0], []
    while True:
        drawn.append(int(top[path[-1], 0]))
        child = tree.child(path[-1], drawn[-1])
        if child is None:
            break
        path.append(child)
    ones = np.ones(top.shape, np.float32)
    arrays = np.array(path, np.int32), np.array(drawn, np.int32)
    return Step(np.array(context, np.int32), tree, top, ones, *arrays)


def run(drafter, passes, drawn_of, budget=4):
    context = [1]
    drafter.begin(asked(context))
    trees = []
    for _ in range(passes):
        tree = drafter.propose(np.array(context, np.int32), budget)
        step = step_over(tree, context, drawn_of)
        drafter.observe(step)
        trees.append((tree, len(step.path)))
        context += step.drawn.tolist()
    return trees


def test_a_members_guess_is_a_node_of_its_origin(monkeypatch):
    drafter = with_members(monkeypatch, _Says([7, 8, 9]))
    drafter.begin(asked([1]))
    tree = drafter.propose(np.array([1], np.int32), 3)
    assert tree.tokens.tolist() == [1, 7, 8, 9]
    assert [drafter.origins[o] for o in tree.origin[1:]] == ["m0"] * 3


def test_one_guess_of_two_members_is_one_node_with_a_higher_chance(monkeypatch):
    alone = with_members(monkeypatch, _Says([7]))
    both = with_members(monkeypatch, _Says([7]), _Says([7]))
    probs = []
    for drafter in (alone, both):
        drafter.begin(asked([1]))
        tree = drafter.propose(np.array([1], np.int32), 8)
        assert tree.tokens.tolist() == [1, 7]
        probs.append(tree.scores[1])
    assert probs[1] > probs[0]


def test_a_source_continues_what_another_guessed(monkeypatch):
    drafter = with_members(monkeypatch, _Says([20]))
    text = [20, 21, 22, 23, 0, 5]
    drafter.begin(asked(text))
    tree = drafter.propose(np.array(text, np.int32), 3)
    assert tree.tokens.tolist() == [5, 20, 21, 22]
    assert [drafter.origins[o] for o in tree.origin[1:]] == ["m0", "suffix", "suffix"]


def test_trust_is_learnt(monkeypatch):
    liar, knows = _Says([7]), _Says([8])
    drafter = with_members(monkeypatch, liar, knows)
    trees = run(drafter, 60, lambda _: 8)
    tree = trees[-1][0]
    first = {int(t): float(s) for t, s in zip(tree.tokens, tree.scores, strict=True)}
    assert first[8] > 0.8
    assert first.get(7, 0.0) < 0.05


def test_a_member_that_brings_nothing_rests(monkeypatch):
    liar = _Says([7])
    drafter = with_members(monkeypatch, liar)
    seconds = iter(np.arange(0, 1e6, 0.01))  # every look at the clock takes 10 ms
    monkeypatch.setattr(module, "perf_counter", lambda: float(next(seconds)))
    run(drafter, 400, lambda t: (t + 1) % 7)
    assert 1 <= liar.asked < 20
    drafter._method = drafters.parse("blend:ask=always")
    run(drafter, 50, lambda t: (t + 1) % 7)
    assert liar.asked > 50


def test_a_member_that_pays_is_always_asked(monkeypatch):
    class Knows(_Says):
        def propose(self, context, budget, min_path_prob=0.0):
            self.tokens = [(int(context[-1]) * 31 + 1) % VOCAB]
            return super().propose(context, budget, min_path_prob)

    knows = Knows([])
    drafter = with_members(monkeypatch, knows)
    ticks = {"now": 0.0}

    def clock():
        ticks["now"] += 1e-6
        return ticks["now"]

    monkeypatch.setattr(module, "perf_counter", clock)
    real = drafter.observe

    def observe(step):
        ticks["now"] += 1.0  # the pass
        real(step)

    drafter.observe = observe
    run(drafter, 200, lambda t: (t * 31 + 1) % VOCAB)
    assert knows.asked == 200


def test_a_cut_tree_is_credited_all_the_same():
    drafter = drafters.parse("blend:members=trigram+lookahead_trie").build(Target(VOCAB))
    random = np.random.default_rng(0)
    context = random.integers(0, 5, 30).tolist()
    drafter.begin(asked(context))
    for _ in range(40):
        tree = drafter.propose(np.array(context, np.int32), 12)
        kept = np.zeros(len(tree), bool)
        kept[: max(1, len(tree) // 2)] = True
        step = random_step(random, tree.keep(kept), context, VOCAB, drafter.top_k)
        drafter.observe(step)
        context += step.drawn.tolist()


def test_members_are_checked():
    for wrong, text in (
        ("blend:members=recycle", "in itself"),
        ("blend:members=blend", "in itself"),
        ("blend:members=nobody", "nobody"),
        ("blend:members=" + "+".join(["lookahead_trie"] * 15), "14"),
        ("blend:members=lookahead_trie:capacity=x", "capacity"),
        ("blend:ask=nobody", "worth or always"),
    ):
        with pytest.raises(MethodError, match=text):
            drafters.parse(wrong)


def test_settings_of_members_are_passed_on():
    method = drafters.parse("blend:members=lookahead_trie:capacity=4096;k=3+predicted_output")
    found = method.methods()
    assert (found[0].capacity, type(found[1]).__name__) == (4096, "PredictedOutput")


def test_a_tree_of_one_node_after_the_plain_path():
    drafter = drafters.parse("blend").build(Target(VOCAB))
    drafter.begin(asked([1, 2]))
    context = [1, 2]
    drafter.propose(np.array(context, np.int32), 4)
    context += [3, 4, 5]  # passes that were not observed
    tree = drafter.propose(np.array(context, np.int32), 4)
    assert tree.tokens[0] == 5
    drafter.observe(step_over(TokenTree.root(5), context, lambda _: 6))

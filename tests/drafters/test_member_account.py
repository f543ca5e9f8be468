"""Accounts of the members of a blend: who is asked, and what it may cost."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from paceline.core import Step, Tokens, TokenTree
from paceline.drafters import blend as module
from paceline.drafters.base import ModelBacked, single_origin_tree
from paceline.drafters.member_account import MemberAccount, followed
from tests.drafters.steps import asked
from tests.drafters.test_blend import run, with_members

PASS = 1.0  # second


def live(account, passes, cost, gain):
    """Let `passes` go by, in which each proposal costs seconds and gains tokens; return asks."""
    asks, now = [], 0.0
    for at in range(passes):
        asks.append(not account.resting)
        if asks[-1]:
            account.record(cost, gain(at), PASS)
        now += PASS
        account.rest(PASS, now)
    return asks


@given(cost=st.floats(1e-4, 3.0), passes=st.integers(1, 2000))
def test_a_member_that_gains_nothing_costs_a_token_and_a_share_of_the_time(cost, passes):
    account = MemberAccount()
    asks = sum(live(account, passes, cost, lambda _: 0.0))
    spent = asks * cost
    assert spent <= PASS + 0.005 * passes * PASS + 2 * cost  # one ends a credit, one a trial


@given(cost=st.floats(1e-3, 0.9), passes=st.integers(1, 500))
def test_a_member_that_gains_more_than_it_costs_never_rests(cost, passes):
    assert all(live(MemberAccount(), passes, cost, lambda _: 1.1 * cost))


def test_a_member_that_harms_rests_and_one_that_turns_good_comes_back():
    account = MemberAccount()
    assert sum(live(account, 400, 0.01, lambda _: -0.5)) < 12
    later = live(account, 4000, 0.05, lambda _: 0.4)
    assert all(later[-1000:])


def test_a_moment_that_something_else_took_is_not_charged_in_full():
    account = MemberAccount()
    live(account, 20, 0.1, lambda _: 0.2)
    before = account.balance
    account.record(100.0, 0.0, PASS)
    assert before - account.balance <= max(8 * 0.11, PASS)
    assert not account.resting


def test_texts_that_share_passes_pay_for_them_once():
    one, both = MemberAccount(), MemberAccount()
    for account in (one, both):
        account.record(0.5, 0.0, PASS)
        account.record(0.9, 0.0, PASS)
        assert account.resting
    for at in range(1, 50):
        one.rest(PASS, at)
        both.rest(PASS, at)
        both.rest(PASS, at + 1e-9)
    assert abs(one.balance - both.balance) < 1e-6


def test_followed_counts_a_path():
    tree = TokenTree(
        np.array([5, 6, 7, 6], np.int32),
        np.array([-1, 0, 1, 2], np.int32),
        np.ones(4, np.float32),
        np.array([-1, 0, 0, 0], np.int16),
    )
    for drawn, count in (([6, 7, 6, 1], 3), ([6, 6], 1), ([7], 0), ([], 0), ([6, 7], 2)):
        assert followed(tree.tokens, tree.parents, drawn) == count


class _Head(ModelBacked):
    """Guesses one token that the rest of the blend knows, or does not; keeps what it is shown."""

    origins = ("head",)
    needs_hidden, top_k = True, 1

    def __init__(self, guess):
        self.guess, self.asked, self.seen = guess, 0, 0

    def propose(self, context: Tokens, budget: int, min_path_prob: float = 0.0) -> TokenTree:
        self.asked += 1
        chain = np.array([context[-1], self.guess(int(context[-1]))], np.int32)
        return single_origin_tree(chain, np.array([-1, 0], np.int32), np.array([1, 0.9], "f4"))

    def observe(self, step):
        self.seen += 1


def clock(monkeypatch, drafter, proposal, passed):
    """Let every look at the clock take `proposal` seconds, and every pass `passed`."""
    now = {"at": 0.0}

    def look():
        now["at"] += proposal
        return now["at"]

    monkeypatch.setattr(module, "perf_counter", look)
    real = drafter.observe

    def observe(step):
        now["at"] += passed
        real(step)

    drafter.observe = observe


def test_a_head_that_says_what_the_others_know_gains_nothing_and_rests(monkeypatch):
    head = _Head(lambda token: (token + 1) % 7)
    drafter = with_members(monkeypatch, head)
    clock(monkeypatch, drafter, 0.05, 1.0)
    run(drafter, 300, lambda t: (t + 1) % 7)  # `recycle` knows it after seven tokens
    assert head.asked < 60
    assert head.seen < head.asked + 20
    assert not drafter.needs_hidden or not drafter._worth[0].resting


def test_a_head_that_knows_more_is_always_asked(monkeypatch):
    text = np.random.default_rng(0).integers(0, 50, 400)  # which only the head can know
    head = _Head(lambda _: int(text[len(context)]))
    drafter = with_members(monkeypatch, head)
    clock(monkeypatch, drafter, 0.01, 1.0)
    context = [1]
    drafter.begin(asked(context))
    for _ in range(100):
        tree = drafter.propose(np.array(context, np.int32), 4)
        child = tree.child(0, int(text[len(context)]))
        path = np.array([0] if child is None else [0, child], np.int32)
        drawn = text[len(context) : len(context) + len(path)].astype(np.int32)
        top = np.tile(tree.tokens[:, None], 1)
        top[path, 0] = drawn
        ones = np.ones(top.shape, np.float32)
        drafter.observe(Step(np.array(context, np.int32), tree, top, ones, path, drawn))
        context += drawn.tolist()
    assert head.asked == 100
    assert drafter.needs_hidden

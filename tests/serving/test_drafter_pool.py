"""Drafters of concurrent requests, and what the governor records of them, by the test's clock."""

import pytest

from paceline.core import Cost, TokenTree
from paceline.decoding.walk import WalkResult
from paceline.drafters.base import Target
from paceline.drafters.plain import Plain
from paceline.errors import MemoryFullError, RequestError
from paceline.serving import drafter_pool
from paceline.serving.batch_entry import BatchEntry
from paceline.serving.drafter_pool import DrafterPool


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


class FakeRun:
    """Proposes a chain of three and accepts its first node; each of its parts takes a time."""

    def __init__(self, clock, seconds, error=None):
        self.clock, self.seconds, self.error = clock, seconds, error
        self.text, self.room, self.levels, self.drafter = [1], 9, 9, None

    def propose(self, nodes, spare=0, min_path_prob=0.0):
        self.clock.now += self.seconds
        if self.error:
            raise self.error
        return TokenTree.chain(range(min(nodes, 3) + 1), score=0.9)

    def verify(self, tree, logits):
        return WalkResult([0], [1], [])

    def learn(self, tree, logits, walked):
        self.clock.now += self.seconds

    def accept(self, tree, walked):
        return "a"


@pytest.fixture
def clock(monkeypatch):
    found = Clock()
    monkeypatch.setattr(drafter_pool, "perf_counter", found)
    return found


def recorded(found, monkeypatch):
    reported = []
    monkeypatch.setattr(found.governor, "record", lambda *given: reported.append(given))
    return reported


@pytest.fixture
def found():
    return DrafterPool(Plain(), Target(10), Cost((1, 2, 64), (1.0, 1.0, 1.5)))


def test_drafts_of_a_fixed_budget_are_no_debt_of_the_governor(found, clock, monkeypatch):
    reported = recorded(found, monkeypatch)
    entries = [
        BatchEntry("a", FakeRun(clock, 0.01)),
        BatchEntry("b", FakeRun(clock, 7.0), budget=3),
    ]
    found.draft(entries, 64, 5)
    assert [len(entry.tree) for entry in entries] == [4, 4]
    found.commit(entries, [None, None])
    found.record(entries, 1.2, 13)
    [(trees, paths, draft, forward, other_tokens)] = reported
    assert (len(trees), paths, forward, other_tokens) == (1, ([0],), 1.2, 9)
    assert draft == pytest.approx(0.02)


def test_one_that_fails_or_finds_no_room_is_no_burden(found, clock, monkeypatch):
    reported = recorded(found, monkeypatch)
    entries = [
        BatchEntry("good", FakeRun(clock, 0.01)),
        BatchEntry("fails", FakeRun(clock, 0.5, RequestError("no"))),
        BatchEntry("full", FakeRun(clock, 0.02, MemoryFullError("no"))),
    ]
    found.draft(entries, 64, 0)
    assert [str(entry.error or "") for entry in entries] == ["", "no", ""]
    assert len(entries[2].tree) == 1
    done = [entries[0], entries[2]]
    found.commit(done, [None, None])
    found.record(done, 1.0, 5)
    [(trees, _, draft, _, other_tokens)] = reported
    assert (len(trees), other_tokens) == (2, 0)
    assert draft == pytest.approx(0.06)


def test_while_the_governor_rests_nothing_is_charged(found, clock, monkeypatch):
    reported = recorded(found, monkeypatch)
    monkeypatch.setattr(found.governor, "nodes_wanted", lambda requests: 0)
    monkeypatch.setattr(found.governor, "nodes_for_forced", lambda: 0)
    entries = [BatchEntry("a", FakeRun(clock, 0.01))]
    found.draft(entries, 64, 0)
    found.commit(entries, [None])
    found.record(entries, 1.0, 1)
    [(_, _, draft, _, _)] = reported
    assert draft == 0.0

from math import ceil

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paceline.core import Request
from paceline.serving import rate_limits as module
from paceline.serving.messages import Job, JobEvent
from paceline.serving.rate_limits import Departures, RateLimits

steps = st.lists(st.tuples(st.floats(0, 30), st.sampled_from("ab")), max_size=60)


@settings(deadline=None)
@given(st.floats(0.5, 100), steps)
def test_no_client_gets_more_requests_than_its_rate(rate, steps):
    rates, now, given = RateLimits(requests=rate), 0.0, {"a": 0, "b": 0}
    for pause, client in steps:
        now += pause
        wait = rates.admit(client, now)
        given[client] += not wait
        assert wait < 60 / rate + 1e-6
        if wait:  # and who waits that long gets in
            now += wait + 1e-6
            assert rates.admit(client, now) == 0
            given[client] += 1
    assert all(count <= max(rate, 1) + rate * now / 60 + 1e-3 for count in given.values())


def test_tokens_are_paid_afterwards():
    rates = RateLimits(tokens=60)
    assert rates.admit("a", 0.0) == 0
    rates.charge("a", 100, 0.0)
    assert rates.admit("a", 1.0) == pytest.approx(40)
    assert rates.admit("b", 1.0) == 0
    assert rates.admit("a", 41.0) == 0


def test_no_limit_is_none():
    rates = RateLimits()
    rates.charge("a", 10**9, 0.0)
    assert rates.admit("a", 0.0) == 0
    assert not rates._buckets


def test_clients_are_forgotten_when_their_buckets_are_full(monkeypatch):
    monkeypatch.setattr(module, "_MAX_CLIENTS", 10)
    rates = RateLimits(requests=1)
    rates.admit("late", 59.0)
    for n in range(50):
        rates.admit(str(n), 0.0)
    assert len(rates._buckets) > 10
    rates.admit("last", 60.0)
    assert set(rates._buckets) == {("requests", "late"), ("requests", "last")}
    assert rates.admit("late", 60.0) > 0


class Ends:
    """Departures, and the clock that measures them."""

    def __init__(self):
        self.now = 100.0
        self.departures = Departures(lambda: self.now)
        self.wait = self.departures.wait

    def on_submit(self, *names):
        for name in names:
            self.departures.on_submit(Job(name, Request((1,), 1)))

    def on_event(self, name, seconds, finish="stop"):
        self.now += seconds
        self.departures.on_event(Job(name, Request((1,), 1)), JobEvent(name, finish=finish))


def test_the_wait_is_the_queue_at_the_pace_of_the_last_ends():
    ends = Ends()
    assert ends.wait(0) == ends.wait(1000) == 1  # nothing is known
    ends.on_submit("a", "b", "c")
    ends.now += 3.0
    assert ends.wait(1) == 6  # nobody has left in 3 s
    ends.on_event("a", 1.0)
    assert (ends.wait(0), ends.wait(4)) == (4, 20)
    ends.on_event("b", 2.0)
    assert (ends.wait(0), ends.wait(4)) == (3, 15)
    ends.now += 6.0
    assert ends.wait(1) == 8  # it has become slower: (4 + 2 + 6) / 3 each
    assert ends.wait(1000) == 60


def test_pauses_and_pieces_do_not_tell_the_pace():
    ends = Ends()
    ends.on_submit("a")
    ends.on_event("a", 2.0)
    ends.now += 3600.0
    assert ends.wait(1) == 4
    ends.on_submit("b")
    ends.on_event("b", 1.0, finish=None)
    ends.on_event("b", 1.0)
    assert ends.wait(1) == 4
    ends.on_event("b", 50.0)  # reported of twice, or never handed in
    assert ends.wait(1) == 4


def test_only_the_last_ends_count():
    ends = Ends()
    for seconds in [100.0] * 5 + [0.5] * 32:
        ends.on_submit("a")
        ends.on_event("a", seconds)
    assert ends.wait(9) == 5


@given(st.lists(st.integers(0, 500), max_size=32), st.integers(0, 10**6))
def test_the_wait_is_whole_seconds_up_to_a_minute(gaps, waiting):
    ends = Ends()
    ends.on_submit(*map(str, range(len(gaps))))
    for name, gap in enumerate(gaps):
        ends.on_event(str(name), gap)
    mean = sum(gaps) / max(len(gaps), 1)
    assert ends.wait(waiting) == max(1, min(ceil((waiting + 1) * mean), 60))


@pytest.mark.parametrize("rate", [1, 7, 60])
def test_a_client_that_waits_whole_seconds_gets_in(rate):
    rates, now = RateLimits(requests=rate), 0.0
    while not rates.admit("a", now):
        pass
    assert rates.admit("a", now + ceil(rates.admit("a", now))) == 0


def test_a_bucket_holds_one_minute_and_at_least_one_request():
    rates = RateLimits(requests=1)
    assert rates.admit("a", 0.0) == 0
    assert rates.admit("a", 600.0) == 0  # ten minutes of rest, and still one at once
    assert rates.admit("a", 600.0) == pytest.approx(60)
    slow = RateLimits(requests=0.5)
    assert slow.admit("a", 0.0) == 0
    assert slow.admit("a", 0.0) == pytest.approx(120)
    assert [RateLimits(requests=3).admit("a", 0.0) for _ in range(3)] == [0, 0, 0]
    many = RateLimits(requests=3)
    assert [many.admit("a", 0.0) for _ in range(4)] == [0, 0, 0, pytest.approx(20)]


def test_a_clock_that_goes_back_gives_nothing():
    rates = RateLimits(requests=60)
    for _ in range(60):
        assert rates.admit("a", 100.0) == 0
    assert rates.admit("a", 50.0) > 0
    assert rates.admit("a", 101.0) == 0
    assert rates.admit("a", 101.0) == pytest.approx(1)


def test_a_bucket_that_is_nearly_full_is_kept(monkeypatch):
    monkeypatch.setattr(module, "_MAX_CLIENTS", 2)
    rates = RateLimits(requests=60)
    for name in ("a", "b", "c"):
        assert rates.admit(name, 0.0) == 0
    rates.admit("d", 0.5)  # half a request is still missing from each
    assert {client for _, client in rates._buckets} == {"a", "b", "c", "d"}
    rates.admit("e", 1.0)
    assert {client for _, client in rates._buckets} == {"d", "e"}


def test_tokens_are_refused_at_zero_and_debts_block_requests_without_a_charge():
    rates = RateLimits(requests=60, tokens=60)
    rates.charge("a", 60, 0.0)
    assert rates.admit("a", 0.0) == pytest.approx(1)  # until the first token is there
    assert rates._buckets["requests", "a"].level == 60
    assert rates.admit("a", 1.0) == 0
    assert rates._buckets["requests", "a"].level == 59


def test_the_mean_is_of_thirty_two_ends():
    ends = Ends()
    for seconds in [100.0] + [1.0] * 31:
        ends.on_submit("a")
        ends.on_event("a", seconds)
    assert ends.wait(0) == ceil((100 + 31) / 32)
    assert module._KEPT == 32
    assert ends.wait(10**6) == module._MAX_WAIT == 60

import pytest
from hypothesis import given
from hypothesis import strategies as st

from paceline.serving import rates as module
from paceline.serving.rates import Rates

steps = st.lists(st.tuples(st.floats(0, 30), st.sampled_from("ab")), max_size=60)


@given(st.floats(0.5, 100), steps)
def test_no_client_gets_more_requests_than_its_rate(rate, steps):
    rates, now, given = Rates(requests=rate), 0.0, {"a": 0, "b": 0}
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
    rates = Rates(tokens=60)
    assert rates.admit("a", 0.0) == 0
    rates.charge("a", 100, 0.0)
    assert rates.admit("a", 1.0) == pytest.approx(40)
    assert rates.admit("b", 1.0) == 0
    assert rates.admit("a", 41.0) == 0


def test_no_limit_is_none():
    rates = Rates()
    rates.charge("a", 10**9, 0.0)
    assert rates.admit("a", 0.0) == 0
    assert not rates._buckets


def test_clients_are_forgotten_when_their_buckets_are_full(monkeypatch):
    monkeypatch.setattr(module, "_MOST", 10)
    rates = Rates(requests=1)
    rates.admit("late", 59.0)
    for n in range(50):
        rates.admit(str(n), 0.0)
    assert len(rates._buckets) > 10
    rates.admit("last", 60.0)
    assert set(rates._buckets) == {("requests", "late"), ("requests", "last")}
    assert rates.admit("late", 60.0) > 0

"""What a text adds to a pass of a batch: passes of all texts, less the time of the pass itself."""

from itertools import count

import pytest

from paceline import LM
from paceline.core import Cost
from paceline.planning import stream_overhead
from paceline.planning.stream_overhead import stream_seconds


@pytest.fixture
def lm():
    with LM(threads=1, drafter="plain", budget=0) as lm:
        yield lm


def test_it_is_what_passes_take_beyond_the_curve(lm, monkeypatch):
    ticks = count()
    monkeypatch.setattr(stream_overhead, "perf_counter", lambda: float(next(ticks)))
    requests = [lm.request("Once upon a time"), lm.request("A")]
    used = lm.engine.memory.used
    cost = Cost((1, 8), (0.2, 0.2))
    assert stream_seconds(lm, requests, cost) == pytest.approx((1 - 0.2) / 4)
    assert lm.engine.memory.used == used
    assert stream_seconds(lm, requests, Cost((1, 8), (5.0, 5.0))) == 0

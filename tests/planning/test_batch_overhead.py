"""What a text adds to a pass of a batch: passes of all texts, less the time of the pass itself."""

from itertools import count

import pytest

from paceline import LM
from paceline.core import Cost
from paceline.planning import batch_overhead as module
from paceline.planning.batch_overhead import batch_overhead


@pytest.fixture
def lm():
    with LM(threads=1, drafter="plain", budget=0) as lm:
        yield lm


def test_it_is_what_passes_take_beyond_the_curve(lm, monkeypatch):
    ticks = count()
    monkeypatch.setattr(module, "perf_counter", lambda: float(next(ticks)))
    requests = [lm.request("Once upon a time"), lm.request("A")]
    used = lm.engine.memory.used
    cost = Cost((1, 8), (0.2, 0.2))
    assert batch_overhead(lm, requests, cost) == pytest.approx((1 - 0.2) / 4)
    assert lm.engine.memory.used == used
    assert batch_overhead(lm, requests, Cost((1, 8), (5.0, 5.0))) == 0

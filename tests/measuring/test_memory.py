import re
from pathlib import Path

import numpy as np
import pytest

from paceline.machine import peak_bytes
from paceline.measuring.memory import measure_memory, state_bytes
from tests.toy import Oracle, ToyEngine


def test_the_peak_is_that_of_the_process_in_bytes():
    status = Path("/proc/self/status")
    if not status.exists():
        pytest.skip("this system tells a process's peak in no other way")
    peak = int(re.search(r"VmHWM:\s+(\d+) kB", status.read_text())[1]) * 1024
    assert peak_bytes() == pytest.approx(peak, rel=0.02)


def test_an_engine_that_tells_nothing_is_asked_for_nothing():
    engine = ToyEngine()
    found = measure_memory(engine, [1, 2, 3])
    assert (found.weight_bytes, found.cache_bytes, found.cache_positions) == (None, None, 3)
    assert engine.opened == 0


def test_a_drafters_state_is_the_sum_of_its_arrays(monkeypatch):
    drafter = Oracle(ToyEngine())
    assert state_bytes(drafter) == 0
    arrays = {"a": np.zeros(3, np.int32), "b": np.zeros((2, 2))}
    monkeypatch.setattr(Oracle, "state", lambda self: arrays)
    assert state_bytes(drafter) == 12 + 32

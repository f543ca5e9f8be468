"""Several engines under one limit of memory."""

import gc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paceline.core import TokenTree
from paceline.engines import open_engine
from paceline.engines.shared_limit import SharedLimit
from paceline.errors import MemoryFullError, MethodError
from paceline.models import load
from tests.conftest import shared

NAMES = ("bitstories-1M", "stories260K", "stories260K")


@pytest.fixture(scope="module", params=["native", "reference"])
def engines(request):
    if request.param == "reference":
        pytest.importorskip("torch").set_num_threads(1)
    threads = 1 if request.param == "native" else None
    return [
        open_engine(load(shared("models", name)), request.param, threads=threads) for name in NAMES
    ]


def sizes(engines):
    return [engine.memory.page_bytes for engine in engines]


def held(engines):
    return sum(engine.memory.reserved * engine.memory.page_bytes for engine in engines)


@settings(max_examples=10, deadline=None)
@given(st.data())
def test_all_together_never_hold_more(engines, data):
    first, *others = engines
    total = data.draw(st.integers(4, 30)) * max(sizes(engines))
    limit = SharedLimit(first, total)
    for engine in others:
        limit.add(engine)
    sequences = []
    try:
        for _ in range(data.draw(st.integers(1, 25))):
            engine = data.draw(st.sampled_from(engines))
            limit.promised = data.draw(st.integers(0, 2))
            own = [each for each in sequences if each[0] is engine]
            what = data.draw(st.sampled_from(["open", "extend", "extend", "cut", "release"]))
            if what == "open" or not own:
                sequences.append((engine, engine.open()))
                continue
            entry = data.draw(st.sampled_from(own))
            sequence = entry[1]
            if what == "extend":
                more = min(data.draw(st.integers(1, 200)), engine.config.context - sequence.length)
                before = sequence.length
                try:
                    engine.extend(sequence, np.full(more, 3, np.int32))
                except MemoryFullError:
                    assert sequence.length == before
                else:
                    assert sequence.length == before + more
            elif what == "cut":
                engine.truncate(sequence, data.draw(st.integers(0, sequence.length)))
            else:
                engine.release(sequence)
                sequences.remove(entry)
            assert held(engines) <= total
            assert sum(each.kv_limit for each in engines) <= total
            assert limit.used <= total
    finally:
        for engine, sequence in sequences:
            engine.release(sequence)
    full = first.open()  # what others gave back, the first can have
    pages = (total - sum(sizes(others))) // sizes(engines)[0]
    length = min(pages * 64, first.config.context)
    first.extend(full, np.full(length, 3, np.int32))
    assert held(engines) <= total
    first.release(full)


def test_others_leave_what_is_promised(engines):
    first, other, _ = engines
    size, small = sizes(engines)[:2]
    limit = SharedLimit(first, 6 * size)
    limit.add(other)
    limit.promised = 4
    sequence, mine = other.open(), first.open()
    with pytest.raises(MemoryFullError):
        other.extend(sequence, np.full(min(2 * size // small + 2, 8) * 64, 3, np.int32))
    first.extend(mine, np.full(4 * 64, 3, np.int32))
    for engine, each in ((other, sequence), (first, mine)):
        engine.release(each)


def test_what_comes_later_is_weighed_until_it_goes(engines):
    first = engines[0]
    size = sizes(engines)[0]
    limit = SharedLimit(first, 8 * size)
    later = open_engine(load(shared("models", NAMES[1])), "native", threads=1)
    with pytest.raises(MethodError, match="bytes of memory are needed for one more model"):
        limit.add(later, 8 * size)
    assert later not in limit
    limit.add(later, 3 * size)
    assert limit.total == 5 * size
    assert limit.least == later.memory.page_bytes
    sequence = first.open()
    with pytest.raises(MemoryFullError):
        first.forward([(sequence, TokenTree.chain(np.full(5 * 64, 3, np.int32)))])
    del later
    gc.collect()
    first.extend(sequence, np.full(5 * 64, 3, np.int32))
    first.release(sequence)

"""Positions that are committed by keys and values instead of tokens."""

from __future__ import annotations

import numpy as np
import pytest

from paceline.core import TokenTree
from paceline.engines import open_engine
from paceline.engines.wrapper import EngineWrapper
from paceline.errors import MemoryFullError, RequestError
from paceline.models import load
from paceline.models.rope import Rope
from tests.conftest import shared

TEXT = np.array([1, *range(40, 180)], np.int32)
CUT = 50
ROPES = {
    "plain": Rope(10000.0, 16),
    "adjacent": Rope(10000.0, 16, adjacent=True),
    "part": Rope(500.0, 6),
    "linear": Rope(10000.0, 16, "linear", (("factor", 4.0),)),
    "yarn": Rope(
        10000.0,
        16,
        "yarn",
        (
            ("beta_fast", 32.0),
            ("beta_slow", 1.0),
            ("factor", 4.0),
            ("original_max_position_embeddings", 64.0),
            ("truncate", 1.0),
        ),
    ),
}


@pytest.fixture(scope="module", params=["native fp32", "native fp16", "native int8", "reference"])
def engine(request):
    name, _, kv_format = request.param.partition(" ")
    if name == "reference":
        pytest.importorskip("torch").set_num_threads(1)
    model = load(shared("models", "stories260K"))
    return open_engine(model, name, kv_format=kv_format or "auto")


def rows(engine, sequence, first, last):
    pairs = [engine.keys_values(sequence, each) for each in range(len(engine.config.layers))]
    return [tuple(np.ascontiguousarray(a[:, first:last]) for a in pair) for pair in pairs]


def fill(engine, sequence):
    more = rows(engine, sequence, 0, CUT)
    for _ in range(engine.config.context // CUT + 1):
        engine.append_rows(sequence, more)


def last(engine, sequence):
    return engine.forward([(sequence, TokenTree.root(7))])[0].copy()


def test_rows_stand_for_the_tokens_they_come_from(engine) -> None:
    """Rounding once more changes nothing: what a cache gives it takes back as it was."""
    whole, parts = engine.start(TEXT), engine.start(TEXT[:CUT])
    for first in range(CUT, len(TEXT), 40):
        engine.append_rows(parts, rows(engine, whole, first, min(first + 40, len(TEXT))))
    assert parts.length == engine.row_count(parts) == len(TEXT)
    for index in range(len(engine.config.layers)):
        for one, other in zip(
            engine.keys_values(parts, index), engine.keys_values(whole, index), strict=True
        ):
            np.testing.assert_allclose(one, other, atol=1e-6)
    np.testing.assert_allclose(last(engine, parts), last(engine, whole), atol=1e-4)
    engine.truncate(parts, CUT + 1)
    engine.release(parts)
    engine.release(whole)
    assert engine.memory.used == 0


def test_a_fork_does_not_change(engine) -> None:
    sequence = engine.start(TEXT[:CUT])
    fork, before = engine.fork(sequence), last(engine, sequence)
    engine.append_rows(sequence, rows(engine, sequence, 0, CUT))
    assert (sequence.length, fork.length) == (2 * CUT, CUT)
    np.testing.assert_array_equal(last(engine, fork), before)
    EngineWrapper(engine).append_rows(fork, rows(engine, fork, 0, 3))
    assert fork.length == CUT + 3
    engine.release(sequence)
    engine.release(fork)


def test_what_does_not_fit_is_refused(engine) -> None:
    sequence = engine.start(TEXT[:CUT])
    good = rows(engine, sequence, 0, 4)
    key, value = good[0]
    for wrong in (
        good[1:],
        [(key[:, :3], value), *good[1:]],
        [(key[..., :-1], value), *good[1:]],
        [(key.astype("f8"), value), *good[1:]],
        [(key[:, ::-1], value), *good[1:]],
    ):
        with pytest.raises(RequestError, match=r"rows|keys and values"):
            engine.append_rows(sequence, wrong)
    with pytest.raises(RequestError, match="context"):
        fill(engine, sequence)
    engine.release(sequence)
    tracked = engine.open()
    engine.track_queries(tracked, 4)
    engine.extend(tracked, TEXT[:4])
    with pytest.raises(RequestError, match="track"):
        engine.append_rows(tracked, good)
    engine.release(tracked)
    cut = engine.start(TEXT[:CUT])
    engine.evict(cut, [np.arange(9)] * len(engine.config.layers))
    with pytest.raises(RequestError, match="evicted"):
        engine.append_rows(cut, good)
    engine.release(cut)


def test_without_room_nothing_changes(engine) -> None:
    sequence = engine.start(TEXT[:CUT])
    more = rows(engine, sequence, 0, CUT)
    engine.kv_limit = engine.memory.page_bytes
    with pytest.raises(MemoryFullError):
        engine.append_rows(sequence, more)
    assert sequence.length == CUT
    engine.kv_limit = None
    engine.append_rows(sequence, more)
    assert sequence.length == 2 * CUT
    engine.release(sequence)


@pytest.mark.parametrize("rope", ROPES.values(), ids=ROPES)
@pytest.mark.parametrize("by", [0, 1, 700, -33])
def test_keys_move_as_if_they_had_been_rotated_there(rope, by) -> None:
    rng = np.random.default_rng(0)
    plain = rng.normal(size=(2, 5, 20)).astype(np.float32)

    def rotated(start: int) -> np.ndarray:
        cosines, sines = rope.table(start, start + 5)
        half = rope.dim // 2
        result = plain.copy()
        one = slice(0, rope.dim, 2) if rope.adjacent else slice(0, half)
        other = slice(1, rope.dim, 2) if rope.adjacent else slice(half, rope.dim)
        result[..., one] = plain[..., one] * cosines - plain[..., other] * sines
        result[..., other] = plain[..., other] * cosines + plain[..., one] * sines
        return result

    np.testing.assert_allclose(rope.moved(rotated(40), by), rotated(40 + by), atol=3e-4)

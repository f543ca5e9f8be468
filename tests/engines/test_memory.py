"""Pages of keys and values: shared, copied before they are written, counted, limited, returned."""

from __future__ import annotations

import gc
from collections import Counter
from contextlib import suppress

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tiny
from paceline import _native
from paceline.core import TokenTree
from paceline.engines.base import Engine
from paceline.engines.ensemble import EnsembleEngine
from paceline.engines.native import KV_FORMATS, NativeEngine
from paceline.engines.pages import PAGE, Memory
from paceline.engines.reference import ReferenceEngine
from paceline.engines.view import View
from paceline.errors import MemoryFullError, MethodError, RequestError
from tests.engines.test_attention import CONFIG, WEIGHTS
from tests.engines.test_attention import native as open_native
from tests.engines.test_native import path_to, trees

EDGES = st.one_of(
    *(st.integers(edge - 2, edge + 2) for edge in (64, 128, 256)), st.integers(1, 300)
)


def reference() -> ReferenceEngine:
    return ReferenceEngine(CONFIG, WEIGHTS)


def native() -> NativeEngine:
    return open_native("fp32", threads=2)


ENGINES = pytest.mark.parametrize("create", [native, reference])


def held(engine: Engine, sequences) -> Counter[int]:
    return Counter(page for sequence in sequences for page in engine.pages(sequence))


@pytest.mark.parametrize("kv_format", KV_FORMATS)
@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_forks_never_see_each_other(kv_format: str, data) -> None:
    """Whoever forks, writes, cuts and leaves in whatever order: bits of fresh sequences."""
    isa, threads = data.draw(st.sampled_from(_native.isas())), data.draw(st.integers(1, 3))
    engine = open_native(kv_format, isa=isa, threads=threads)
    first = tiny.tokens(data.draw(EDGES))
    alive = [(engine.start(first), first)]
    for step in range(data.draw(st.integers(2, 8))):
        index = data.draw(st.integers(0, len(alive) - 1))
        sequence, text = alive[index]
        action = data.draw(st.sampled_from(("fork", "pending", "run", "all", "cut", "release")))
        if action == "fork":
            alive.append((engine.fork(sequence), text))
        elif action == "pending":  # forked between a pass and its commit
            tree = data.draw(trees(12))
            engine.forward([(sequence, tree)])
            alive.append((engine.fork(sequence), text))
            path = path_to(tree, len(tree) - 1)
            engine.commit(sequence, path)
            alive[index] = sequence, np.concatenate([text, tree.tokens[path]])
        elif action == "run":
            more = tiny.tokens(data.draw(st.integers(1, 70)), step)
            engine.extend(sequence, more)
            alive[index] = sequence, np.concatenate([text, more])
        elif action == "all":
            engine.forward([(each, data.draw(trees(5))) for each, _ in alive])
        elif action == "cut":
            length = data.draw(st.integers(0, len(text)))
            engine.rewind(sequence, text[:length])
            alive[index] = sequence, text[:length]
        elif len(alive) > 1:
            engine.release(alive.pop(index)[0])
        pages = held(engine, [sequence for sequence, _ in alive])
        memory = engine.memory
        assert memory.used == len(pages) <= memory.reserved
        assert memory.shared == sum(count > 1 for count in pages.values())
    roots = [(sequence, TokenTree.root(5)) for sequence, _ in alive]
    found = engine.forward(roots).copy()
    for row, (_, text) in zip(found, alive, strict=True):
        fresh = engine.start(text)
        np.testing.assert_array_equal(row, engine.forward([(fresh, TokenTree.root(5))])[0])
        engine.release(fresh)
    for sequence, _ in alive:
        engine.release(sequence)
    assert (engine.memory.used, engine.memory.shared) == (0, 0)


@ENGINES
def test_pages_are_as_many_as_the_positions_need(create) -> None:
    engine = create()
    sequence = engine.start(tiny.tokens(2 * PAGE + 1))
    assert engine.memory.used == len(engine.pages(sequence)) == 3
    engine.forward([(sequence, TokenTree.chain(tiny.tokens(PAGE)))])
    assert engine.memory.used == 4
    engine.commit(sequence, range(PAGE - 1))
    assert engine.memory.used == 3
    engine.truncate(sequence, PAGE)
    assert engine.memory.used == 1
    engine.release(sequence)
    assert (engine.memory.used, engine.memory.shared) == (0, 0)


def test_a_fork_takes_no_page_until_it_writes() -> None:
    engine = native()
    sequence = engine.start(tiny.tokens(3 * PAGE + 5))
    forks = [engine.fork(sequence) for _ in range(5)]
    assert (engine.memory.used, engine.memory.shared) == (4, 4)
    engine.extend(forks[0], tiny.tokens(1))
    assert (engine.memory.used, engine.memory.shared) == (5, 4)
    assert engine.pages(forks[0])[:3] == engine.pages(sequence)[:3]
    engine.release(sequence)
    del forks[1:]
    gc.collect()
    assert (engine.memory.used, engine.memory.shared) == (4, 0)


@ENGINES
def test_sequences_that_are_forgotten_give_their_pages_back(create) -> None:
    engine = create()
    for _ in range(3):
        engine.start(tiny.tokens(100))
    gc.collect()
    assert engine.memory.used == 0


@ENGINES
@settings(max_examples=10, deadline=None)
@given(data=st.data())
def test_a_pass_beyond_the_limit_changes_nothing(create, data) -> None:
    engine = create()
    limit = data.draw(st.integers(2, 6))
    engine.kv_limit = limit * engine.memory.page_bytes + 7
    assert engine.kv_limit == limit * engine.memory.page_bytes
    start = tiny.tokens(data.draw(st.integers(1, PAGE * 2 - 1)))
    batch = [engine.start(start)]
    for _ in range(data.draw(st.integers(0, 3))):
        try:
            batch.append(engine.fork(batch[0]))
        except MemoryFullError:
            assert create is reference
    tree = TokenTree.chain(tiny.tokens(data.draw(st.integers(1, 150))))
    view = View(positions=np.arange(3, dtype=np.int32)) if data.draw(st.booleans()) else None
    stands = False
    with suppress(MemoryFullError):
        engine.forward([(batch[0], TokenTree.chain([3, 4]))])
        stands = True
    before, pages = engine.memory, held(engine, batch)
    passes = [(sequence, tree) for sequence in batch]
    wanted = len(batch) * Memory.pages(len(start) + len(tree)) - sum(pages.values())
    if create is native and len(start) % PAGE:  # all but one copy the last page that they share
        last = Counter(engine.pages(sequence)[(len(start) - 1) // PAGE] for sequence in batch)
        wanted += sum(count - 1 for count in last.values())
    part = view if len(start) >= 3 else None
    if wanted > before.free:
        with pytest.raises(MemoryFullError, match=f"^{wanted} more pages"):
            engine.forward(passes, view=part)
        assert (engine.memory, held(engine, batch)) == (before, pages)
        if stands:
            engine.commit(batch[0], [0])  # the pass before it
    else:
        engine.forward(passes, view=part)
        assert engine.memory.used == before.used + wanted
    assert engine.memory.reserved <= limit


@ENGINES
def test_after_a_release_the_same_pass_runs(create) -> None:
    engine = create()
    engine.kv_limit = 3 * engine.memory.page_bytes
    kept, other = engine.start(tiny.tokens(100)), engine.start(tiny.tokens(60))
    more = TokenTree.chain(tiny.tokens(40))
    with pytest.raises(MemoryFullError, match=r"1 more pages .*, free are 0 of 3"):
        engine.forward([(kept, more)])
    engine.release(other)
    found = engine.forward([(kept, more)]).copy()
    engine.kv_limit = None
    fresh = engine.start(tiny.tokens(100))
    np.testing.assert_array_equal(found, engine.forward([(fresh, more)]))


@ENGINES
def test_limits_that_cannot_be_kept_are_refused(create) -> None:
    engine = create()
    with pytest.raises(MethodError, match="holds no page"):
        engine.kv_limit = engine.memory.page_bytes - 1
    sequence = engine.start(tiny.tokens(200))
    with pytest.raises(MethodError, match="more than 1; release sequences first"):
        engine.kv_limit = engine.memory.page_bytes
    assert engine.kv_limit is None
    engine.release(sequence)
    engine.kv_limit = engine.memory.page_bytes
    assert engine.memory.free == engine.memory.limit == 1
    with pytest.raises(MethodError, match="holds no page"):
        type(engine)(CONFIG, WEIGHTS, kv_limit=1)
    with pytest.raises(RequestError, match="released"):
        engine.fork(sequence)


def test_an_engine_that_does_not_count_says_so() -> None:
    engine = EnsembleEngine([reference(), reference()], [1, 1])
    with pytest.raises(MethodError, match="ensemble engine does not count"):
        engine.kv_limit = 1 << 30
    with pytest.raises(MethodError, match="ensemble engine does not count"):
        engine.pages(engine.open())


def test_memory_goes_back_to_the_system() -> None:
    engine = native()
    many = [engine.start(tiny.tokens(300)) for _ in range(20)]
    assert engine.memory.reserved >= 100
    for sequence in many:
        engine.release(sequence)
    assert engine.memory.reserved <= 100  # one block of pages is kept for the next sequence
    engine.kv_limit = 2 * engine.memory.page_bytes
    assert engine.memory.reserved == 0


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_sequences_that_share_pages_are_read_once_without_a_changed_bit(data) -> None:
    """Forks of forks at any place, trees of any size, windows, threads, in any order."""
    isa, threads = data.draw(st.sampled_from(_native.isas())), data.draw(st.integers(1, 3))
    engine = open_native(data.draw(st.sampled_from(KV_FORMATS)), isa=isa, threads=threads)
    long = tiny.tokens(640)
    family = [(engine.start(long[: data.draw(st.integers(200, 600))]), long)]
    batch = []
    for seed in range(data.draw(st.integers(2, 6))):
        parent, text = family[data.draw(st.integers(0, len(family) - 1))]
        child = engine.fork(parent)
        end = data.draw(st.integers(child.length * 2 // 3, child.length))
        engine.truncate(child, engine.cut_point(child, end))
        more = tiny.tokens(data.draw(st.integers(0, 60)), seed)
        text = np.concatenate([text[: child.length], more])
        engine.extend(child, more)
        family.append((child, text))
        batch.append((child, data.draw(trees(data.draw(st.sampled_from((3, 12, 120)))))))
    batch = data.draw(st.permutations(batch))
    view = View(layers=np.array([1, 2], np.int32)) if data.draw(st.booleans()) else None
    alone = [engine.forward([entry], view=view).copy() for entry in batch]
    np.testing.assert_array_equal(engine.forward(batch, view=view), np.concatenate(alone))
    fresh = [engine.start(text) for _, text in family[1:]]
    apart = {id(child): other for (child, _), other in zip(family[1:], fresh, strict=True)}
    copies = [(apart[id(child)], tree) for child, tree in batch]
    np.testing.assert_array_equal(engine.forward(copies, view=view), np.concatenate(alone))


def test_a_shared_prefix_is_counted_once_by_the_profile() -> None:
    engine = native()
    first = engine.start(tiny.tokens(600))
    batch = [(sequence, TokenTree.root(5)) for sequence in (first, *map(engine.fork, [first] * 7))]
    engine.profiling = True
    engine.forward(batch)
    together = engine.profile()["attention"].bytes
    engine.profiling = True
    for entry in batch:
        engine.forward([entry])
    alone = engine.profile()["attention"].bytes
    row = engine.position_bytes
    assert alone - together == pytest.approx(7 * 512 * row)

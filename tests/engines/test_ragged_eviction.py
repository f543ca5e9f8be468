"""Heads of a layer that keep different numbers of rows, and what is kept of each token."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tiny
from paceline import _native
from paceline.core import TokenTree
from paceline.engines.pages import PAGE
from paceline.engines.view import View
from paceline.errors import MemoryFullError, RequestError
from paceline.kvcache.base import pad_rows
from paceline.scoring import score_tokens
from tests.engines.test_attention import CONFIG, ROW_FORMATS
from tests.engines.test_attention import native as open_native
from tests.engines.test_eviction import ENGINES, LAYERS, recomputed, reference
from tests.engines.test_native import path_to, trees


def ragged_rows(engine, sequence, rng) -> list[np.ndarray]:
    """Indices of rows to keep: in every head another number."""
    kept = []
    for index in LAYERS:
        heads = []
        for positions in engine.rows(sequence, index):
            held = np.flatnonzero(positions >= 0)
            count = int(rng.integers(len(held) + 1))
            heads.append(np.sort(rng.choice(held, count, replace=False)).astype(np.int32))
        kept.append(pad_rows(heads))
    return kept


def evict(engine, sequence, kept) -> tuple[int, list[list[np.ndarray]]]:
    """Evict; return what `recomputed` needs to know."""
    before = [engine.rows(sequence, index) for index in LAYERS]
    engine.evict(sequence, kept)
    positions = []
    for index, (old, own) in enumerate(zip(before, kept, strict=True)):
        heads = [each[rows[rows >= 0]] for each, rows in zip(old, own, strict=True)]
        positions.append(heads)
        np.testing.assert_array_equal(engine.rows(sequence, index), pad_rows(heads))
    return sequence.length, positions


@pytest.mark.parametrize("kind", ["reference", "fp32", "int8"])
@settings(max_examples=10, deadline=None)
@given(data=st.data())
def test_rows_of_ragged_heads_are_as_if_masked(kind: str, data) -> None:
    """Logits and masses are those of one pass over the whole text with a mask."""
    isa, threads = data.draw(st.sampled_from(_native.isas())), data.draw(st.integers(1, 3))
    engine = reference() if kind == "reference" else open_native(kind, isa=isa, threads=threads)
    rng = np.random.default_rng(data.draw(st.integers(0, 1000)))
    sequence, text, events = engine.open(), np.empty(0, np.int32), []
    engine.track_attention(sequence)
    for step in range(data.draw(st.integers(1, 3))):
        more = tiny.tokens(data.draw(st.integers(1, 200)), step)
        engine.extend(sequence, more, chunk=data.draw(st.sampled_from((7, 64, 256))))
        text = np.concatenate([text, more])
        events.append(evict(engine, sequence, ragged_rows(engine, sequence, rng)))
        assert engine.row_count(sequence) == max(engine.rows(sequence, i).shape[1] for i in LAYERS)
    tree = data.draw(trees(12))
    logits = engine.forward([(sequence, tree)])[-1]
    path = path_to(tree, len(tree) - 1)
    engine.commit(sequence, path)
    text = np.concatenate([text, tree.tokens[path]])
    expected, masses = recomputed(text, events, "fp32" if kind == "reference" else kind)
    loose = 0.3 if kind == "int8" else 5e-4  # a value may be rounded the other way
    np.testing.assert_allclose(logits, expected[-1], atol=loose, rtol=0)
    for index in LAYERS:
        rows = engine.rows(sequence, index)
        mass = np.where(rows < 0, 0, np.take_along_axis(masses[index], np.maximum(rows, 0), 1))
        kept = engine.attention_mass(sequence, index)
        np.testing.assert_allclose(kept, mass, atol=10 * loose, rtol=loose)
        for each in engine.keys_values(sequence, index):
            assert (each[rows < 0] == 0).all()
            assert each[rows >= 0].any(-1).all()


@settings(max_examples=10, deadline=None)
@given(data=st.data())
def test_every_bit_is_that_of_one_token_at_a_time(data) -> None:
    kind, isa = data.draw(st.sampled_from(ROW_FORMATS)), data.draw(st.sampled_from(_native.isas()))
    engine = open_native(kind, isa=isa, threads=data.draw(st.integers(1, 3)))
    plain = open_native(kind, isa=isa, threads=1)
    rng = np.random.default_rng(data.draw(st.integers(0, 1000)))
    sequence, other = engine.open(), plain.open()
    for each, own in ((engine, sequence), (plain, other)):
        each.track_attention(own)
        each.track_queries(own, 20)
    friend = engine.start(tiny.tokens(data.draw(st.integers(1, 300)), 9))
    for step in range(data.draw(st.integers(1, 3))):
        more = tiny.tokens(data.draw(st.integers(1, 200)), step)
        engine.extend(sequence, more, chunk=data.draw(st.sampled_from((33, 64, 256))))
        plain.extend(other, more, chunk=19)
        kept = ragged_rows(engine, sequence, rng)
        engine.evict(sequence, kept)
        plain.evict(other, kept)
        tree = data.draw(trees(20))
        batch = [(friend, data.draw(trees(6))), (sequence, tree), (engine.fork(sequence), tree)]
        logits = engine.forward(batch)[len(batch[0][1]) :]
        own, forked = logits[: len(tree)].copy(), logits[len(tree) :].copy()
        np.testing.assert_array_equal(own, forked)
        path = path_to(tree, data.draw(st.integers(0, len(tree) - 1)))
        engine.commit(sequence, path)
        for node in path:
            [expected] = plain.forward([(other, TokenTree.root(tree.tokens[node]))])
            np.testing.assert_array_equal(own[node], expected)
            plain.commit(other, [0])
        for index in LAYERS:
            for name in ("rows", "attention_mass", "recent_queries", "keys_values"):
                ours = getattr(engine, name)(sequence, index)
                np.testing.assert_array_equal(ours, getattr(plain, name)(other, index))


@ENGINES
def test_memory_depends_on_the_largest_head_and_rows_of_none_cannot_be_kept(create) -> None:
    engine = create()
    sequence = engine.start(tiny.tokens(3 * PAGE))
    heads = [layer.kv_heads for layer in CONFIG.layers]
    kept = [
        pad_rows([np.arange(5, dtype=np.int32)] * (n - 1) + [np.arange(PAGE, dtype=np.int32)])
        for n in heads
    ]
    engine.evict(sequence, kept)
    assert engine.memory.used == 1
    wide = max(range(len(heads)), key=heads.__getitem__)
    assert (engine.rows(sequence, wide)[0] >= 0).sum() == 5
    with pytest.raises(RequestError, match="rows to keep"):
        engine.evict(sequence, [np.arange(PAGE)] * len(heads))  # the first head has 5 rows
    with pytest.raises(RequestError, match="rows to keep"):
        engine.evict(sequence, [np.array([PAGE - 1, -1])] * len(heads))
    engine.truncate(sequence, 3 * PAGE)
    engine.extend(sequence, tiny.tokens(3))
    assert (engine.rows(sequence, wide)[0] >= 0).sum() == 8


@ENGINES
def test_tracked_queries_count_as_memory(create) -> None:
    engine, window = create(), 40
    sequence = engine.open()
    engine.track_queries(sequence, window)
    assert engine.memory.used == 0
    engine.extend(sequence, tiny.tokens(10))
    assert engine.memory.used == 1 + engine.query_pages(10)
    engine.extend(sequence, tiny.tokens(90))
    used = engine.memory.used
    assert used == 2 + engine.query_pages(window)
    assert engine.query_pages(window) > 0
    fork = engine.fork(sequence)
    more = engine.memory.used - used
    assert more == engine.query_pages(window) + (2 if engine.name == "reference" else 0)
    engine.kv_limit = engine.memory.reserved * engine.memory.page_bytes
    forks = [fork]
    with pytest.raises(MemoryFullError):
        forks += [engine.fork(sequence) for _ in range(9)]
    forks.clear()
    engine.release(fork)
    engine.truncate(sequence, 0)
    assert engine.memory.used == 0
    engine.extend(sequence, tiny.tokens(20))
    engine.release(sequence)
    assert engine.memory.used == 0
    engine = create()
    engine.kv_limit = engine.memory.page_bytes
    sequence = engine.open()
    engine.track_queries(sequence, window)
    with pytest.raises(MemoryFullError):
        engine.extend(sequence, tiny.tokens(PAGE))


@ENGINES
def test_surprisal_is_that_of_a_score_whatever_the_passes(create) -> None:
    engine, text = create(), tiny.tokens(60)
    expected = -np.array([0.0, *score_tokens(engine, text.tolist()).logprobs[1:]])
    sequence, friend = engine.open(), engine.start(tiny.tokens(9, 5))
    engine.track_surprisal(sequence)
    engine.extend(sequence, text[:33], chunk=7)
    parents = np.array([-1, 0, 0, 2], np.int32)
    tokens = np.array([text[33], 3, text[34], text[35]], np.int32)
    zeros = np.zeros(4)
    tree = TokenTree(tokens, parents, zeros.astype(np.float32), zeros.astype(np.int16))
    logits = engine.forward([(friend, TokenTree.root(5)), (sequence, tree)], [True, False])
    assert logits.shape == (1, CONFIG.vocab_size)
    assert engine.hidden().shape[0] == 1
    np.testing.assert_array_equal(logits, engine.forward([(friend, TokenTree.root(5))]))
    engine.commit(sequence, [0, 2, 3])
    fork = engine.fork(sequence)
    for each in (sequence, fork):
        engine.extend(each, text[36:], chunk=64)
        np.testing.assert_allclose(engine.surprisal(each), expected, atol=1e-4)


@ENGINES
def test_what_surprisal_does_not_go_with_is_refused(create) -> None:
    engine = create()
    sequence = engine.start(tiny.tokens(5))
    with pytest.raises(RequestError, match="first position"):
        engine.track_surprisal(sequence)
    with pytest.raises(RequestError, match="does not track surprisal"):
        engine.surprisal(sequence)
    sequence = engine.open()
    engine.track_surprisal(sequence)
    engine.extend(sequence, tiny.tokens(5))
    engine.forward([(sequence, TokenTree.root(5))], view=View(tokens=np.arange(3, dtype=np.int32)))
    with pytest.raises(RequestError, match="without all logits"):
        engine.commit(sequence, [0])
    ones = np.ones((1, 1))
    with pytest.raises(RequestError, match="surprisal"):
        engine.forward_mixed(sequence, ones.astype(np.int32), ones.astype(np.float32))
    with pytest.raises(RequestError, match="logits of earlier ones"):
        engine.truncate(sequence, 3)
    engine.truncate(sequence, 0)
    engine.extend(sequence, tiny.tokens(5))
    assert len(engine.surprisal(sequence)) == 5
    engine.release(sequence)

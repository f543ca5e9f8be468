"""Rows that were evicted are seen no more, and nothing else changes: both engines, bit by bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tiny
from paceline import _native
from paceline.abilities import Ability
from paceline.core import TokenTree
from paceline.engines.pages import PAGE
from paceline.engines.reference import ReferenceEngine
from paceline.engines.view import View
from paceline.errors import MemoryFullError, RequestError
from paceline.models import blocks
from tests.engines.test_attention import CONFIG, ROUND, ROW_FORMATS, WEIGHTS
from tests.engines.test_attention import native as open_native
from tests.engines.test_native import path_to, trees
from tests.toy import ToyEngine

LAYERS = range(len(CONFIG.layers))
Event = tuple[int, list[np.ndarray]]  # length, and positions that each layer kept, [H_kv, K]


def reference() -> ReferenceEngine:
    return ReferenceEngine(CONFIG, WEIGHTS)


def native():
    return open_native("fp32", threads=2)


ENGINES = pytest.mark.parametrize("create", [native, reference])


def recomputed(
    text: np.ndarray, events: list[Event], kind: str = "fp32"
) -> tuple[np.ndarray, list[np.ndarray]]:
    """Logits [S, V] and masses [H_kv, S] of the whole text at once, evicted rows masked out."""

    def rounded(keys, values):
        return ROUND[kind](keys), ROUND[kind](values)

    outer = {name: torch.tensor(WEIGHTS[name]) for name in WEIGHTS if "." not in name}
    positions, masses = torch.arange(len(text)), []
    x = blocks.embed(torch.tensor(text.astype(np.int64)), positions, CONFIG, outer)
    for index, layer in enumerate(CONFIG.layers):
        group = layer.heads // layer.kv_heads
        seen = np.tile(np.tri(len(text), dtype=bool), (layer.kv_heads, 1, 1))
        if layer.window is not None:
            seen &= ~np.tri(len(text), k=-layer.window, dtype=bool)
        for length, kept in events:
            for head, own in enumerate(kept[index]):
                seen[head, length:, np.setdiff1d(np.arange(length), own)] = False
        mask = torch.tensor(np.where(seen.repeat(group, 0), 0, -np.inf).astype(np.float32))

        def tap(name, value, kv_heads=layer.kv_heads):
            if name == "attention":
                masses.append(value.view(kv_heads, -1, *value.shape[1:]).double().sum((1, 2)))

        weights = {
            name.split(".", 2)[2]: torch.tensor(WEIGHTS[name])
            for name in WEIGHTS
            if name.startswith(f"layers.{index}.")
        }
        rotation = blocks.rotation_of(layer, positions)
        x = blocks.block(x, CONFIG, layer, weights, mask, rotation, rounded, tap)
    logits = blocks.head(blocks.final_state(x, CONFIG, outer), CONFIG, outer)
    return logits.numpy(), [mass.numpy() for mass in masses]


def some_rows(engine, sequence, rng, share: float) -> list[np.ndarray]:
    """Indices of rows to keep of each layer: in every head others, layers of different sizes."""
    kept = []
    for index in LAYERS:
        heads, held = engine.rows(sequence, index).shape
        count = int(rng.binomial(held, share))
        kept.append(np.sort([rng.choice(held, count, replace=False) for _ in range(heads)], 1))
    return kept


def evicted(engine, sequence, kept) -> Event:
    """Evict; return what `recomputed` needs to know."""
    before = [engine.rows(sequence, index) for index in LAYERS]
    engine.evict(sequence, kept)
    positions = [
        np.take_along_axis(old, np.asarray(keep).reshape(len(old), -1), 1)
        for old, keep in zip(before, kept, strict=True)
    ]
    for index in LAYERS:
        np.testing.assert_array_equal(engine.rows(sequence, index), positions[index])
    return sequence.length, positions


@pytest.mark.parametrize("kind", ["reference", *ROW_FORMATS])
@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_evicted_rows_are_as_if_masked(kind: str, data) -> None:
    """Logits and masses are those of one pass over the whole text with a mask."""
    isa, threads = data.draw(st.sampled_from(_native.isas())), data.draw(st.integers(1, 3))
    engine = reference() if kind == "reference" else open_native(kind, isa=isa, threads=threads)
    rng = np.random.default_rng(data.draw(st.integers(0, 1000)))
    sequence, text, events = engine.open(), np.empty(0, np.int32), []
    engine.track_attention(sequence)
    for step in range(data.draw(st.integers(1, 4))):
        more = tiny.tokens(data.draw(st.integers(1, 150)), step)
        engine.extend(sequence, more, chunk=data.draw(st.sampled_from((1, 7, 64, 256))))
        tree = data.draw(trees(12))
        engine.forward([(sequence, tree)])
        path = path_to(tree, len(tree) - 1)
        engine.commit(sequence, path)
        text = np.concatenate([text, more, tree.tokens[path]])
        share = data.draw(st.sampled_from((0.0, 0.2, 0.9, 1.0)))
        events.append(evicted(engine, sequence, some_rows(engine, sequence, rng, share)))
    tree = data.draw(trees(12))
    logits = engine.forward([(sequence, tree)])[-1]
    path = path_to(tree, len(tree) - 1)
    engine.commit(sequence, path)
    text = np.concatenate([text, tree.tokens[path]])
    expected, masses = recomputed(text, events, "fp32" if kind == "reference" else kind)
    loose = {"int8": 0.3, "fp16": 2e-2}.get(kind, 5e-4)  # a value may be rounded the other way
    np.testing.assert_allclose(logits, expected[-1], atol=loose, rtol=0)
    for index in LAYERS:
        rows = engine.rows(sequence, index)
        mass = np.take_along_axis(masses[index], rows, 1)
        found = engine.attention_mass(sequence, index)
        np.testing.assert_allclose(found, mass, atol=10 * loose, rtol=loose)


@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_every_bit_is_that_of_one_token_at_a_time(data) -> None:
    """Trees, batches, chunks and threads change no bit of logits and masses after evictions."""
    isa, cached = (
        data.draw(st.sampled_from(_native.isas())),
        data.draw(st.sampled_from(ROW_FORMATS)),
    )
    engine = open_native(cached, isa=isa, threads=data.draw(st.integers(1, 3)))
    plain = open_native(cached, isa=isa, threads=1)
    rng = np.random.default_rng(data.draw(st.integers(0, 1000)))
    sequence, other = engine.open(), plain.open()
    engine.track_attention(sequence)
    plain.track_attention(other)
    friend = engine.start(tiny.tokens(data.draw(st.integers(1, 300)), 9))
    for step in range(data.draw(st.integers(1, 3))):
        more = tiny.tokens(data.draw(st.integers(1, 300)), step)
        engine.extend(sequence, more, chunk=data.draw(st.sampled_from((33, 64, 256))))
        plain.extend(other, more, chunk=data.draw(st.sampled_from((1, 19))))
        kept = some_rows(engine, sequence, rng, data.draw(st.sampled_from((0.3, 0.9))))
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
            np.testing.assert_array_equal(
                engine.attention_mass(sequence, index), plain.attention_mass(other, index)
            )


@ENGINES
def test_memory_falls_to_the_rows_that_are_kept(create) -> None:
    engine = create()
    sequence = engine.start(tiny.tokens(5 * PAGE + 3))
    assert engine.memory.used == 6
    engine.evict(sequence, [np.arange(0, 5 * PAGE, 5)] * 3)  # exactly one page
    assert (engine.memory.used, len(engine.pages(sequence))) == (1, 1)
    assert (engine.row_count(sequence), sequence.length) == (PAGE, 5 * PAGE + 3)
    engine.extend(sequence, tiny.tokens(2, 1))
    assert engine.memory.used == 2
    engine.evict(sequence, [np.arange(0), np.arange(PAGE + 1), np.arange(2)])
    assert engine.memory.used == 2, "the layer that keeps most decides"
    engine.evict(sequence, [np.arange(0)] * 3)
    assert (engine.memory.used, engine.row_count(sequence)) == (0, 0)
    engine.release(sequence)
    assert engine.memory.used == 0


@ENGINES
@pytest.mark.parametrize("first", [True, False])
def test_sequences_that_share_pages_do_not_change(create, first: bool) -> None:
    engine, text = create(), tiny.tokens(3 * PAGE + 10)
    sequence = engine.start(text)
    fork = engine.fork(sequence)
    rng = np.random.default_rng(0)
    one, two = (sequence, fork) if first else (fork, sequence)
    before = engine.forward([(two, TokenTree.root(5))]).copy()
    event = evicted(engine, one, some_rows(engine, one, rng, 0.5))
    np.testing.assert_array_equal(engine.forward([(two, TokenTree.root(5))]), before)
    third = engine.fork(one)  # of what was evicted: each goes its own way
    engine.extend(one, tiny.tokens(80, 1))
    engine.evict(one, some_rows(engine, one, rng, 0.3))
    logits = engine.forward([(third, TokenTree.root(5))])
    expected, _ = recomputed(np.append(text, 5).astype(np.int32), [event])
    np.testing.assert_allclose(logits[0], expected[-1], atol=2e-4, rtol=0)
    np.testing.assert_array_equal(engine.forward([(two, TokenTree.root(5))]), before)
    for each in (one, two, third):
        engine.release(each)
    assert (engine.memory.used, engine.memory.shared) == (0, 0)


@ENGINES
def test_truncating_goes_back_to_the_last_eviction_or_to_the_beginning(create) -> None:
    engine, text = create(), tiny.tokens(100)
    sequence = engine.start(text)
    event = evicted(engine, sequence, some_rows(engine, sequence, np.random.default_rng(1), 0.5))
    engine.extend(sequence, tiny.tokens(20, 1))
    engine.truncate(sequence, 110)
    assert sequence.length == 110
    engine.truncate(sequence, 100)
    for index in LAYERS:
        np.testing.assert_array_equal(engine.rows(sequence, index), event[1][index])
    expected, _ = recomputed(np.append(text, 5).astype(np.int32), [event])
    [logits] = engine.forward([(sequence, TokenTree.root(5))])
    np.testing.assert_allclose(logits, expected[-1], atol=2e-4, rtol=0)
    with pytest.raises(RequestError, match="evicted"):
        engine.truncate(sequence, 99)
    engine.truncate(sequence, 0)
    engine.extend(sequence, text)
    [logits] = engine.forward([(sequence, TokenTree.root(5))])
    fresh = engine.start(text)
    np.testing.assert_array_equal(logits, engine.forward([(fresh, TokenTree.root(5))])[0])


@ENGINES
def test_what_cannot_be_taken_back_is_refused(create) -> None:
    engine = create()
    sequence = engine.start(tiny.tokens(30))
    with pytest.raises(RequestError, match="first position"):
        engine.track_attention(sequence)
    with pytest.raises(RequestError, match="track"):
        engine.attention_mass(sequence, 0)
    sequence = engine.open()
    engine.track_attention(sequence)
    engine.extend(sequence, tiny.tokens(30))
    with pytest.raises(RequestError, match="attention"):
        engine.truncate(sequence, 29)
    engine.truncate(sequence, 0)
    assert engine.attention_mass(sequence, 1).shape == (1, 0)
    engine.extend(sequence, tiny.tokens(30))
    np.testing.assert_allclose(engine.attention_mass(sequence, 1).sum(), 30 * 4, rtol=1e-5)
    engine.evict(sequence, [np.arange(5)] * 3)
    view = View(positions=np.arange(3, dtype=np.int32))
    with pytest.raises(RequestError, match="evicted"):
        engine.forward([(sequence, TokenTree.root(5))], view=view)
    engine.forward([(sequence, TokenTree.root(5))])
    engine.evict(sequence, [np.arange(2)] * 3)
    with pytest.raises(RequestError):
        engine.commit(sequence, [0])  # the pass is forgotten


@ENGINES
@pytest.mark.parametrize(
    "kept",
    [
        [np.arange(3)] * 2,
        [np.array([0, 30])] * 3,
        [np.array([-2, 3])] * 3,
        [np.array([3, -1])] * 3,
        [np.array([3, 3])] * 3,
        [np.array([4, 3])] * 3,
        [np.array([0.5, 1.5])] * 3,
        [np.zeros((2, 2, 2), int)] * 3,
        [np.tile(np.arange(3), (2, 1))] * 3,  # layer 1 has one head
    ],
)
def test_rows_that_do_not_fit_are_refused(create, kept) -> None:
    engine = create()
    sequence = engine.start(tiny.tokens(30))
    with pytest.raises(RequestError, match="rows to keep"):
        engine.evict(sequence, kept)
    assert engine.row_count(sequence) == 30


def test_shared_pages_need_room_to_be_copied() -> None:
    engine = native()
    sequence = engine.start(tiny.tokens(4 * PAGE))
    fork = engine.fork(sequence)
    engine.kv_limit = 4 * engine.memory.page_bytes
    kept = [np.arange(0, 4 * PAGE, 2)] * 3
    with pytest.raises(MemoryFullError):
        engine.evict(sequence, kept)
    assert engine.row_count(sequence) == 4 * PAGE
    engine.evict(sequence, [np.arange(2 * PAGE)] * 3)  # a beginning stays shared
    assert (engine.memory.used, engine.memory.shared) == (4, 2)
    engine.release(fork)
    engine.evict(sequence, [np.arange(0, 2 * PAGE, 2)] * 3)
    assert engine.memory.used == 1


def test_engines_without_the_ability_say_so() -> None:
    engine = ToyEngine()
    sequence = engine.start(tiny.tokens(5) % 11)
    assert Ability.EVICT not in engine.abilities
    assert engine.row_count(sequence) == 5
    with pytest.raises(RequestError, match="cannot evict"):
        engine.evict(sequence, [])
    with pytest.raises(RequestError, match="does not sum"):
        engine.track_attention(sequence)
    with pytest.raises(RequestError, match="does not sum"):
        engine.attention_mass(sequence, 0)

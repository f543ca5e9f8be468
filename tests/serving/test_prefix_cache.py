"""The prefix cache against a list of texts, and its pages against those that are held."""

from __future__ import annotations

from dataclasses import asdict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tiny
from paceline.core import TokenTree
from paceline.engines.base import Engine
from paceline.engines.native import NativeEngine
from paceline.engines.pages import PAGE
from paceline.engines.reference import ReferenceEngine
from paceline.errors import MethodError, RequestError
from paceline.models.config import LayerConfig, ModelConfig
from paceline.models.rope import Rope
from paceline.serving.prefix_cache import PrefixCache
from toy import ToyEngine

CONFIG = ModelConfig(
    family="llama",
    vocab_size=tiny.VOCAB,
    hidden_size=16,
    context=1000,
    layers=(LayerConfig(2, 1, 8, 16, None, Rope(1e4, 8)),),
    norm="rms",
    norm_eps=1e-5,
    activation="silu",
    gated=True,
    attention_scale=0.5,
    tied=True,
)
SIZES = {
    "embed": (tiny.VOCAB, 16),
    "final_norm": (16,),
    "layers.0.attn_norm": (16,),
    "layers.0.mlp_norm": (16,),
    "layers.0.k": (8, 16),
    "layers.0.v": (8, 16),
} | {f"layers.0.{name}": (16, 16) for name in ("q", "o", "gate", "up", "down")}
WEIGHTS = {name: np.random.default_rng(0).normal(0, 1, n).astype("f4") for name, n in SIZES.items()}
ENGINES = pytest.mark.parametrize("create", [NativeEngine, ReferenceEngine])


def common(a: np.ndarray, b: np.ndarray) -> int:
    length = 0
    while length < min(len(a), len(b)) and a[length] == b[length]:
        length += 1
    return length


@st.composite
def texts(draw) -> np.ndarray:
    """Runs of two tokens, so that many begin alike, and part anywhere."""
    runs = draw(st.lists(st.integers(1, 90), max_size=4))
    first = draw(st.integers(3, 4))
    parts = [np.full(run, first + i % 2, np.int32) for i, run in enumerate(runs)]
    return np.concatenate([np.empty(0, np.int32), *parts])


def serve(cache: PrefixCache, text: np.ndarray, pin: bool = False) -> tuple[int, bool]:
    """What a server does: how much was found, and whether the text is kept."""
    engine = cache.engine
    sequence, length = cache.match(text)
    assert sequence.length == length
    engine.extend(sequence, text[length:])
    check(engine, sequence, text)
    kept = cache.insert(text, sequence, pin)
    check(engine, sequence, text)  # still the caller's
    engine.release(sequence)
    return length, kept


def check(engine: Engine, sequence, text: np.ndarray) -> None:
    found = engine.forward([(sequence, TokenTree.root(9))])[0].copy()
    fresh = engine.start(text)
    expected = engine.forward([(fresh, TokenTree.root(9))])[0]
    engine.release(fresh)
    np.testing.assert_allclose(found, expected, atol=0 if engine.invariant else 1e-4, rtol=0)


@ENGINES
@settings(max_examples=15, deadline=None)
@given(st.lists(texts(), max_size=7))
def test_the_longest_known_beginning_is_found(create, asked) -> None:
    engine = create(CONFIG, WEIGHTS)
    cache = PrefixCache(engine, 10_000)
    known: list[np.ndarray] = []
    saved = 0
    for text in asked:
        expected = max((common(text, other) for other in known), default=0)
        assert serve(cache, text) == (expected, True)
        known.append(text)
        saved += expected
    statistics = cache.statistics
    assert (statistics.lookups, statistics.saved) == (len(asked), saved)
    assert statistics.asked == sum(map(len, asked))
    assert engine.memory.used == cache.pages
    cache.clear()
    assert (engine.memory.used, cache.pages, len(cache)) == (0, 0, 0)


@ENGINES
@settings(max_examples=20, deadline=None)
@given(st.data())
def test_the_limit_and_pins_are_kept(create, data) -> None:
    engine = create(CONFIG, WEIGHTS)
    cache = PrefixCache(engine, data.draw(st.integers(0, 8)))
    known: list[np.ndarray] = []
    pinned: dict[bytes, np.ndarray] = {}
    for _ in range(data.draw(st.integers(1, 8))):
        text, pin = data.draw(texts()), data.draw(st.integers(0, 3)) == 0
        length, kept = serve(cache, text, pin)
        assert length <= max((common(text, other) for other in known), default=0)
        known.append(text)
        if pin and kept and len(text):
            pinned[text.tobytes()] = text
        if pinned and data.draw(st.booleans()):
            cache.unpin(pinned.pop(data.draw(st.sampled_from(sorted(pinned)))))
        if data.draw(st.integers(0, 4)) == 0:
            cache.shrink(data.draw(st.integers(0, 3)))
        for text in pinned.values():
            sequence, length = cache.match(text)
            assert length == len(text)
            engine.release(sequence)
        assert engine.memory.used == cache.pages <= cache.limit
    cache.clear()
    assert engine.memory.used == 0


def text_of(token: int, pages: int = 1) -> np.ndarray:
    return np.full(pages * PAGE, token, np.int32)


@ENGINES
def test_the_longest_unused_goes_first(create) -> None:
    cache = PrefixCache(create(CONFIG, WEIGHTS), 3)
    for token in (3, 4, 5):
        serve(cache, text_of(token))
    cache.engine.release(cache.match(text_of(3))[0])
    serve(cache, text_of(6))
    found = {token: cache.match(text_of(token))[1] for token in (3, 4, 5, 6)}
    assert found == {3: PAGE, 4: 0, 5: PAGE, 6: PAGE}
    assert cache.statistics.evicted == 1


@ENGINES
def test_what_does_not_fit_beside_pins_is_not_kept(create) -> None:
    cache = PrefixCache(create(CONFIG, WEIGHTS), 2)
    assert serve(cache, text_of(3), pin=True) == (0, True)
    assert serve(cache, text_of(4, pages=2)) == (0, False)
    assert serve(cache, text_of(4, pages=2), pin=True) == (0, False)
    assert serve(cache, text_of(5)) == (0, True)
    assert serve(cache, text_of(6)) == (0, True)
    assert serve(cache, text_of(3)) == (PAGE, True)
    assert cache.shrink(5) == 1
    with pytest.raises(RequestError, match="not pinned"):
        cache.unpin(text_of(5))
    cache.unpin(text_of(3))
    assert cache.shrink(5) == 1


def test_system_prompts_cost_their_pages_once() -> None:
    engine = NativeEngine(CONFIG, WEIGHTS)
    cache = PrefixCache(engine, 100)
    system = tiny.tokens(10 * PAGE)
    serve(cache, system, pin=True)
    for token in range(3, 23):
        serve(cache, np.append(system, [token] * 5).astype(np.int32))
    assert (cache.pages, cache.statistics.hits) == (10 + 20, 20)


def test_a_text_that_begins_like_another_is_pinned_alone() -> None:
    cache = PrefixCache(NativeEngine(CONFIG, WEIGHTS), 100)
    serve(cache, text_of(3, pages=3))
    serve(cache, text_of(3), pin=True)
    assert cache.shrink(100) == 2
    assert cache.match(text_of(3, pages=3))[1] == PAGE


@ENGINES
@pytest.mark.parametrize("pin", [False, True])
def test_a_beginning_of_a_pinned_text_never_breaks_the_limit(create, pin) -> None:
    """The reference engine copies what it forks: the beginning would cost a page of its own."""
    cache = PrefixCache(create(CONFIG, WEIGHTS), 1)
    assert serve(cache, np.array([3, 3], np.int32), pin=True) == (0, True)
    shares = create is NativeEngine
    assert serve(cache, np.array([3], np.int32), pin) == (1, True if not pin else shares)
    assert serve(cache, np.array([3, 4], np.int32)) == (1, False)
    assert cache.engine.memory.used == cache.pages == 1


def test_a_text_that_grows_is_one_node_and_what_is_too_large_costs_nobody() -> None:
    cache = PrefixCache(NativeEngine(CONFIG, WEIGHTS), 4)
    serve(cache, text_of(5))
    for length in range(1, 2 * PAGE, 7):
        assert serve(cache, text_of(3, pages=2)[:length])[1]
    assert (len(cache), cache.pages) == (2, 3)
    assert serve(cache, text_of(4, pages=5)) == (0, False)
    assert (len(cache), cache.statistics.evicted) == (2, 0)


def test_an_engine_without_room_keeps_what_it_had() -> None:
    engine = ReferenceEngine(CONFIG, WEIGHTS, kv_limit=2 * PAGE * 2 * 8 * 4)
    cache = PrefixCache(engine, 2)
    sequence = engine.start(text_of(3, pages=2))
    assert not cache.insert(text_of(3), sequence)
    engine.release(sequence)
    assert (engine.memory.used, cache.pages, len(cache)) == (0, 0, 0)


def test_bad_calls_are_refused() -> None:
    engine = NativeEngine(CONFIG, WEIGHTS)
    with pytest.raises(RequestError, match="-1 pages"):
        PrefixCache(engine, -1)
    with pytest.raises(RequestError, match="of 0 positions cannot hold 64"):
        PrefixCache(engine, 9).insert(text_of(3), engine.open())
    with pytest.raises(MethodError, match="does not count"):
        PrefixCache(ToyEngine(), 9)


def test_the_counts_begin_at_zero_and_have_no_other_names() -> None:
    statistics = PrefixCache(NativeEngine(CONFIG, WEIGHTS), 9).statistics
    assert asdict(statistics) == dict.fromkeys(["lookups", "hits", "asked", "saved", "evicted"], 0)
    with pytest.raises(AttributeError):
        statistics.hit = 1  # type: ignore[attr-defined]


def test_only_the_end_of_a_text_counts_as_evicted() -> None:
    cache = PrefixCache(NativeEngine(CONFIG, WEIGHTS), 100)
    for token in (4, 5):  # a fork after two pages, and one page behind each
        serve(cache, np.concatenate([text_of(3, pages=2), text_of(token)]))
    assert (len(cache), cache.pages, cache.statistics.evicted) == (3, 4, 0)
    assert cache.shrink(1) == 1
    assert (len(cache), cache.pages, cache.statistics.evicted) == (2, 3, 1)
    assert cache.match(np.concatenate([text_of(3, pages=2), text_of(5)]))[1] == 3 * PAGE
    cache.clear()
    assert (len(cache), cache.pages, cache.statistics.evicted) == (0, 0, 2)
    assert (cache.statistics.hits, cache.statistics.lookups) == (2, 3)


def test_pages_are_held_until_the_last_text_with_them_is_gone() -> None:
    cache = PrefixCache(NativeEngine(CONFIG, WEIGHTS), 100)
    serve(cache, text_of(3, pages=2), pin=True)
    serve(cache, np.concatenate([text_of(3, pages=2), text_of(4)]))
    [node] = [node for node in cache._nodes() if node.pinned]
    pages = set(cache.engine.pages(node.sequence))
    assert len(pages) == 2
    assert all(map(cache.holds, pages))
    assert not cache.holds(max(cache._held) + 1)
    assert (cache.idle(set()), cache.idle(pages), cache.pages) == (3, 1, 3)
    assert cache.shrink(9) == 1
    assert all(map(cache.holds, pages))
    cache.unpin(text_of(3, pages=2))
    assert cache.shrink(0) == 0
    assert (cache.shrink(1), cache.pages) == (2, 0), "a text is evicted whole"


def test_a_part_of_a_pinned_text_is_not_pinned() -> None:
    cache = PrefixCache(NativeEngine(CONFIG, WEIGHTS), 100)
    serve(cache, text_of(3, pages=2), pin=True)
    for wrong in (text_of(3), text_of(3, pages=3), text_of(4), text_of(3, pages=0)):
        with pytest.raises(RequestError, match=f"this text of {len(wrong)} tokens is not pinned"):
            cache.unpin(wrong)
    cache.unpin(text_of(3, pages=2))
    with pytest.raises(RequestError, match="not pinned"):
        cache.unpin(text_of(3, pages=2))

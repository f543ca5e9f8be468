"""Keys and values that are rounded in groups: drafters, prefixes and memory change no token."""

from __future__ import annotations

import numpy as np
import pytest

import tiny
from paceline import LM
from paceline.core import TokenTree
from paceline.engines.kv_formats import GROUPED_KV
from paceline.engines.pages import PAGE
from paceline.errors import RequestError
from paceline.serving.prefix_cache import PrefixCache
from tests.conftest import shared
from tests.engines.test_attention import native

PROMPT = "Once upon a time, there was a little girl named Lily. She loved to play in the park. Once"
DRAFTERS = ("hostile", "recycle", "lookup", "suffix", "blend", "lookahead", "layer_skip:skip=1+2")


def answers(engine: str, kv_format: str, drafter: str, **options) -> list[list[int]]:
    with LM(
        shared("models", "stories260K"),
        engine=engine,
        kv_format=kv_format,
        drafter=drafter,
        **options,
    ) as lm:
        prompts = [PROMPT, "Tom had a dog", PROMPT * 3]
        wanted = {"max_new_tokens": 70, "temperature": 0.9, "seed": 2}
        return [list(output.tokens) for output in lm.generate(prompts, **wanted)]


@pytest.mark.parametrize(("engine", "kv_format"), [("native", "int4"), ("native", "int3")])
def test_no_drafter_changes_an_answer(engine: str, kv_format: str) -> None:
    plain = answers(engine, kv_format, "plain")
    assert plain != answers(engine, "fp32", "plain"), "the format is used"
    for drafter in DRAFTERS:
        assert answers(engine, kv_format, drafter, budget=24) == plain, drafter


def test_the_reference_engine_speculates_in_groups_too() -> None:
    plain = answers("reference", "int4", "plain")
    assert answers("reference", "int4", "blend", budget=12) == plain


@pytest.mark.parametrize("kv_format", GROUPED_KV)
def test_groups_are_cut_at_their_ends_only(kv_format: str) -> None:
    engine, text = native(kv_format), tiny.tokens(150)
    sequence = engine.start(text)
    assert [engine.cut_point(sequence, n) for n in (0, 31, 33, 127, 128, 149, 150)] == [
        0, 0, 32, 96, 128, 149, 150,
    ]  # fmt: skip
    with pytest.raises(RequestError, match="before 128 were rounded in groups of 32"):
        engine.truncate(sequence, 100)
    for length in (140, 96, 64):
        engine.rewind(sequence, text[:length])
        fresh = engine.start(text[:length], chunk=1)
        rows = [engine.forward([(each, TokenTree.root(4))])[0].copy() for each in (sequence, fresh)]
        np.testing.assert_array_equal(*rows)


@pytest.mark.parametrize("kv_format", GROUPED_KV)
def test_a_sequence_takes_two_pages_more_at_most_when_it_rests(kv_format: str) -> None:
    engine = native(kv_format)
    for length in (1, 16, 17, 31, 32, 33, 64, 80, 200):
        sequence = engine.start(tiny.tokens(length))
        further = -(-(length % 32) // 16)
        assert len(engine.pages(sequence)) == -(-length // PAGE) + further == engine.memory.used
        engine.forward([(sequence, TokenTree.chain(tiny.tokens(40)))])
        assert engine.memory.used <= -(-(length + 40) // PAGE) + engine.open_pages
        engine.release(sequence)
        assert engine.memory.used == 0


def test_a_cached_prefix_ends_where_groups_do() -> None:
    engine, text = native("int4"), tiny.tokens(300)
    cache = PrefixCache(engine, 100)
    for end, length in ((230, 230), (300, 230)):
        sequence, known = cache.match(text[:end])
        assert known == (0 if end == 230 else length)
        engine.extend(sequence, text[known:end])
        assert cache.insert(text[:end], sequence)
        engine.release(sequence)
    other = np.concatenate([text[:115], tiny.tokens(60, 5)])
    sequence, known = cache.match(other)
    assert known == 96, "the last cut before token 115"
    engine.extend(sequence, other[known:])
    assert cache.insert(other, sequence)
    for known_text in (text, other):
        again, found = cache.match(np.concatenate([known_text, [1, 2, 3]]).astype(np.int32))
        assert found == len(known_text)
        fresh = engine.start(known_text)
        rows = [engine.forward([(each, TokenTree.root(4))])[0].copy() for each in (again, fresh)]
        np.testing.assert_array_equal(*rows)
        engine.release(again)
        engine.release(fresh)
    engine.release(sequence)
    cache.clear()
    assert engine.memory.used == 0

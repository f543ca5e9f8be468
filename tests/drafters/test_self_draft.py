"""Self-speculation; `tests/test_matrix.py` holds it to plain decoding on both engines."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tiny
from paceline import LM
from paceline.core import Request
from paceline.decoding.governor import Fixed
from paceline.decoding.loop import Generation
from paceline.drafters.base import Target
from paceline.drafters.layer_skip import agreement, known_skip, search_skip
from paceline.drafters.sparse_kv import chosen
from paceline.engines import open_engine
from paceline.errors import MethodError
from paceline.models import load
from paceline.registry import drafters
from tests.conftest import shared
from tests.toy import ToyEngine

CONTEXT = st.lists(st.integers(0, 5), min_size=1, max_size=90)


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    tiny.save("llama", folder)
    return open_engine(load(folder), "native", threads=1)


@settings(deadline=None)
@given(CONTEXT, st.integers(0, 9), st.integers(1, 30), st.integers(0, 48))
def test_the_ends_and_some_blocks_are_seen(context, sinks, recent, retrieved):
    length = len(context) - 1
    seen = chosen(np.array(context, np.int32), sinks, recent, retrieved)
    assert seen.dtype == np.int32
    assert (np.diff(seen) > 0).all()
    ends = {*range(min(sinks, length)), *range(max(length - recent, 0), length)}
    assert ends <= set(seen.tolist()) <= set(range(length))
    assert len(seen) <= len(ends) + retrieved // 16 * 16


def test_what_the_end_talks_of_is_retrieved():
    random = np.random.default_rng(0)
    context = random.integers(100, 200, 800).astype(np.int32)
    context[321:327] = context[-7:-1] = [1, 2, 3, 4, 5, 6]
    seen = set(chosen(context, 4, 32, 16).tolist())
    assert set(range(320, 336)) <= seen
    assert len(seen) == 4 + 32 + 16


def test_nothing_is_guessed_while_the_text_is_short(engine):
    method = drafters.parse("sparse_kv:sinks=1,recent=3,retrieved=0,least=2.0")
    drafter = method.build(Target(tiny.VOCAB, engine))
    sizes = {}
    for length in (8, 9):
        tokens = tiny.tokens(length)
        sequence = engine.start(tokens[:-1])
        drafter.attach(sequence)
        sizes[length] = len(drafter.propose(tokens, 4))
        engine.release(sequence)
    assert sizes == {8: 1, 9: 5}


def test_without_a_sequence_nothing_is_guessed(engine):
    drafter = drafters.parse("layer_skip:skip=1").build(Target(tiny.VOCAB, engine))
    assert len(drafter.propose(tiny.tokens(4), 4)) == 1


def test_all_layers_agree_with_themselves_and_a_subset_less(engine):
    plain = drafters.parse("plain").build(Target(tiny.VOCAB, engine))
    written = Generation(engine, plain, Request((1,), 20), Fixed(0)).run().tokens
    own = np.array([1, *written], np.int32)
    assert agreement(engine, own, {0, 1, 2}) == 1.0
    assert agreement(engine, own, {1}) < 1.0
    assert 0 < len(search_skip(engine)) < tiny.LAYERS


def test_the_search_is_kept_and_a_broken_file_is_searched_again(engine, tmp_path, monkeypatch):
    found = known_skip(engine, tmp_path)
    (path,) = tmp_path.iterdir()
    monkeypatch.setattr("paceline.drafters.layer_skip.search_skip", lambda engine: np.array([2]))
    assert known_skip(engine, tmp_path).tolist() == found.tolist()
    for text in ("", "[]", '{"skip": []}', '{"skip": [0, 1, 2]}', '{"skip": [9]}'):
        path.write_text(text)
        assert known_skip(engine, tmp_path).tolist() == [2], text
        assert json.loads(path.read_text()) == {"skip": [2]}


@pytest.mark.parametrize("skip", ["3", "0+1+2", "x", "1+", "-1", "0-1"])
def test_wrong_layers_are_refused(engine, skip):
    with pytest.raises(MethodError, match="layers 0 to 2"):
        drafters.parse(f"layer_skip:skip={skip}").build(Target(tiny.VOCAB, engine))


@pytest.mark.parametrize("spec", ["layer_skip", "sparse_kv"])
def test_an_engine_without_views_is_refused(spec):
    with pytest.raises(MethodError, match="none was given"):
        drafters.parse(spec).build(Target(11))
    with pytest.raises(MethodError, match="the engine toy do not go together"):
        drafters.parse(spec).build(Target(11, ToyEngine()))


@pytest.mark.parametrize(
    "spec",
    ["sparse_kv:sinks=-1", "sparse_kv:recent=0", "sparse_kv:least=0.5", "sparse_kv:retrieved=-1"],
)
def test_wrong_settings_are_refused_by_name(spec):
    with pytest.raises(MethodError, match=spec.split("=")[0]):
        drafters.parse(spec)


@pytest.mark.parametrize(
    "spec", ["layer_skip", "sparse_kv:sinks=4,recent=24,retrieved=16,least=1.0,threshold=0.2"]
)
def test_a_part_of_a_real_model_guesses_well(spec):
    lm = LM(shared("models", "bitstories-3M"), drafter=spec, budget=8, threads=1)
    output = lm.generate("Once upon a time, there was", max_new_tokens=90, temperature=0.0)
    assert output.tokens_per_pass > 1.6
    rejecting = lm.generate("Once", max_new_tokens=60, temperature=1.0, walk="rejection")
    assert rejecting.tokens_per_pass > 1.1

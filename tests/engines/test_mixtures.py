"""Mixtures: nodes that are weighted sums of embeddings, on both engines."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tiny
from paceline import _native
from paceline.core import TokenTree
from paceline.engines.ensemble import EnsembleEngine
from paceline.engines.native import FORMATS
from paceline.engines.reference import ReferenceEngine
from paceline.errors import RequestError
from tests.engines.test_native import TOLERANCE, VARIED, native, tiny_model

__all__ = ["tiny_model"]  # the fixture


def engines(model):
    return native(model), ReferenceEngine(model.config, model.weights)


@st.composite
def mixtures(draw):
    n, k = draw(st.integers(1, 12)), draw(st.integers(1, 5))
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    tokens = random.integers(0, tiny.VOCAB, (n, k)).astype(np.int32)
    return tokens, random.dirichlet(np.ones(k), n).astype(np.float32)


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_one_token_of_weight_one_is_a_plain_node(tiny_model, data) -> None:
    storage, isa = data.draw(st.sampled_from(FORMATS)), data.draw(st.sampled_from(_native.isas()))
    engine = native(tiny_model(data.draw(st.sampled_from(VARIED))), format=storage, isa=isa)
    tokens, weights = data.draw(mixtures())
    place = data.draw(st.integers(0, tokens.shape[1] - 1))
    weights[:] = np.arange(tokens.shape[1]) == place
    sequence = engine.start(tiny.tokens(data.draw(st.integers(1, 20))))
    plain = engine.forward([(sequence, TokenTree.chain(tokens[:, place].copy()))]).copy()
    mixed = engine.forward_mixed(sequence, tokens, weights)
    np.testing.assert_array_equal(mixed, plain)


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_mixtures_agree_and_can_be_committed(tiny_model, data) -> None:
    model = tiny_model(data.draw(st.sampled_from(VARIED)))
    tokens, weights = data.draw(mixtures())
    found = []
    for engine in engines(model):
        sequence = engine.start(tiny.tokens(7))
        logits = engine.forward_mixed(sequence, tokens, weights).copy()
        engine.commit(sequence, np.arange(len(tokens)))
        after = engine.forward([(sequence, TokenTree.chain([3, 4]))]).copy()
        found.append((logits, after))
        other = engine.start(tiny.tokens(7))  # one by one
        for row, token, weight in zip(logits, tokens, weights, strict=True):
            alone = engine.forward_mixed(other, token[None], weight[None])
            if engine.invariant:
                np.testing.assert_array_equal(alone[0], row)
            engine.commit(other, [0])
        if engine.invariant:
            again = engine.forward([(other, TokenTree.chain([3, 4]))])
            np.testing.assert_array_equal(again, after)
    for ours, theirs in zip(*found, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=TOLERANCE, rtol=0)


def test_the_weights_matter_and_nothing_mixed_is_nothing(tiny_model) -> None:
    for engine in engines(tiny_model("llama")):
        sequence = engine.start(tiny.tokens(3))
        tokens = np.array([[5, 6]], np.int32)
        rows = [
            engine.forward_mixed(sequence, tokens, np.array([weights], np.float32)).copy()
            for weights in ([1, 0], [0.5, 0.5], [0, 1])
        ]
        assert np.abs(rows[0] - rows[1]).max() > 1e-3 < np.abs(rows[1] - rows[2]).max()
        nothing = engine.forward_mixed(sequence, tokens, np.zeros((1, 2), np.float32))
        assert np.isfinite(nothing).all()


@pytest.mark.parametrize(
    ("tokens", "weights", "said"),
    [
        (np.array([[1, tiny.VOCAB]], np.int32), np.ones((1, 2), np.float32), "token 67 is outside"),
        (np.array([[-1, 1]], np.int32), np.ones((1, 2), np.float32), "token -1 is outside"),
        (np.array([[1, 2]], np.int32), np.ones((2, 1), np.float32), r"one shape \[N, K\]"),
        (np.array([1], np.int32), np.ones(1, np.float32), r"one shape \[N, K\]"),
        (np.array([[1]], np.int64), np.ones((1, 1), np.float32), "found int64"),
        (np.zeros((0, 2), np.int32), np.ones((0, 2), np.float32), r"one shape \[N, K\]"),
        (np.array([[1]], np.int32), np.full((1, 1), np.nan, np.float32), "not finite"),
        (np.ones((61, 1), np.int32), np.ones((61, 1), np.float32), "beyond the model's context"),
    ],
)
def test_bad_mixtures_are_refused(tokens, weights, said, tiny_model) -> None:
    for engine in engines(tiny_model("llama")):
        sequence = engine.start(tiny.tokens(4))
        with pytest.raises(RequestError, match=said):
            engine.forward_mixed(sequence, tokens, weights)


def test_an_ensemble_cannot_mix(tiny_model) -> None:
    member = native(tiny_model("llama"))
    engine = EnsembleEngine([member, member], [1, 1])
    assert "mixtures" not in engine.abilities
    with pytest.raises(RequestError, match="cannot mix"):
        engine.forward_mixed(engine.open(), np.ones((1, 1), np.int32), np.ones((1, 1), np.float32))

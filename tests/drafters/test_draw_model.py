"""What `blend` makes of the walk's noise and of a grammar's masks."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paceline import _native
from paceline.control.base import paths as paths_of
from paceline.core import Step, TokenTree
from paceline.drafters.base import Target, step_arrays
from paceline.errors import MethodError
from paceline.noise import gumbel, stream
from paceline.registry import drafters
from tests.drafters.steps import asked

VOCAB, K = 96, 16
START = (1.0, 1.0, 1.0, 0.5772)


def native(rate=0.0):
    return _native.SourceBlend(2, 1, K, 1 << 10, 0.6, rate, 1 << 10, 8, 0)


def taught(random, blend, context=(3, 5)):
    """The distribution behind a context, [K] tokens and their probabilities."""
    tokens = random.permutation(VOCAB)[:K].astype(np.int32)
    probs = np.sort(random.dirichlet(np.ones(K)))[::-1].astype(np.float32) * 0.9
    text = np.array(context, np.int32)
    tree, nodes = TokenTree.root(text[-1]), np.zeros(1, np.int32)
    step = Step(text, tree, tokens[None], probs[None], nodes, nodes)
    blend.observe(*step_arrays(step), False)
    return text


def grow_blend(blend, text, budget, noise=(), allowed=None):
    tokens, parents, scores, *_ = blend.propose(text, budget, 0.0, [], list(noise), allowed)
    return tokens, parents, scores


def bits(tokens):
    found = np.zeros((VOCAB + 31) // 32, np.uint32)
    for token in tokens:
        found[token // 32] |= np.uint32(1 << token % 32)
    return found


def first(blend, text, noise=(), allowed=None):
    """The root's successors and their probabilities: no other node has any."""
    tokens, parents, scores = grow_blend(blend, text, 200, noise, allowed or only_below_root)
    assert (parents[1:] == 0).all()
    return dict(zip(tokens[1:].tolist(), scores[1:].tolist(), strict=True))


def only_below_root(path):
    return bits([] if path else range(VOCAB))


@given(st.integers(0, 2**32), st.integers(0, 2**63), st.integers(0, 1000))
@settings(max_examples=30, deadline=None)
def test_the_noise_says_who_is_likely_to_win(random, seed, position):
    blend = native()
    text = taught(np.random.default_rng(random), blend)
    plain = first(blend, text)
    found = first(blend, text, [stream(seed, position)])
    assert found.keys() == plain.keys()
    tokens = np.array(list(plain))
    rest = max(1 - sum(plain.values()), 1e-6)
    scores = np.log([plain[t] for t in tokens]) + gumbel(seed, position, tokens)
    powers = np.exp([*scores, np.log(rest) + START[3]])
    expected = powers / powers.sum()
    assert np.allclose([found[t] for t in tokens], expected[:-1], rtol=1e-3, atol=1e-6)


def test_the_draws_of_a_known_distribution_are_foreseen():
    """A guess hits far more often than the likeliest token is drawn."""
    blend, hits, likeliest = native(), 0, 0
    text = taught(np.random.default_rng(0), blend)
    plain = first(blend, text)
    tokens = np.array(list(plain))
    logits = np.log(list(plain.values()))
    for seed in range(200):
        drawn = tokens[(logits + gumbel(seed, 9, tokens)).argmax()]
        guess, _, _ = grow_blend(blend, text, 1, [stream(seed, 9)])
        hits += guess[1] == drawn
        likeliest += tokens[logits.argmax()] == drawn
    assert hits == 200
    assert likeliest < 100


@given(st.integers(0, 2**32), st.sets(st.integers(0, VOCAB - 1), min_size=33))
@settings(max_examples=30, deadline=None)
def test_what_is_forbidden_leaves_its_chance_to_the_others(random, some):
    blend = native()
    text = taught(np.random.default_rng(random), blend)
    plain = first(blend, text)
    found = first(blend, text, allowed=lambda path: bits([] if path else some))
    assert found.keys() == plain.keys() & some
    lost = sum(probability for token, probability in plain.items() if token not in some)
    for token, probability in found.items():
        assert probability == pytest.approx(plain[token] / (1 - lost), rel=1e-3)


@given(st.integers(0, 2**32), st.sets(st.integers(0, VOCAB - 1), min_size=1, max_size=32))
@settings(max_examples=30, deadline=None)
def test_where_little_is_allowed_all_of_it_is_guessed(random, some):
    blend = native()
    text = taught(np.random.default_rng(random), blend)
    found = first(blend, text, allowed=lambda path: bits([] if path else some))
    assert found.keys() == some
    assert sum(found.values()) <= 1 + 1e-3
    assert len(some) > 1 or found[min(some)] == pytest.approx(1, abs=1e-3)


def test_it_is_asked_once_about_each_node_with_its_path():
    blend, paths = native(), []
    text = taught(np.random.default_rng(0), blend)

    def allowed(path):
        paths.append(tuple(path))
        return None if path else bits([7, 8])

    tokens, parents, scores = grow_blend(blend, text, 12, allowed=allowed)
    n = len(tokens)
    tree = TokenTree(tokens, parents, scores, np.zeros(n, np.int16))
    assert paths == paths_of(tree)[: len(paths)]
    assert len(paths) >= n - 1
    assert set(tokens[parents == 0].tolist()) <= {7, 8}


@pytest.mark.parametrize("believed", [True, False])
def test_how_far_to_believe_the_noise_is_learnt(believed):
    blend = native()
    random = np.random.default_rng(1)
    text = taught(random, blend)
    plain = first(blend, text)
    tokens, logits = np.array(list(plain)), np.log(list(plain.values()))
    assert blend.draw_weights == pytest.approx(START, abs=1e-3)
    for seed in range(300):
        tree = TokenTree.chain(grow_blend(blend, text, 1, [stream(seed, 2)])[0])
        noise = gumbel(seed if believed else seed + 1000, 2, tokens)
        drawn = tokens[(logits + noise).argmax()]
        path = [0, 1] if tree.tokens[1] == drawn else [0]
        draws = np.array([drawn, 1][: len(path)], np.int32)
        rows = np.zeros((2, 1), np.int32), np.full((2, 1), np.nan, np.float32)
        blend.observe(*step_arrays(Step(text, tree, *rows, np.array(path, np.int32), draws)), True)
    assert blend.draw_weights[1] > 1.2 if believed else blend.draw_weights[1] < 0.5
    blend.reset()
    assert blend.draw_weights == pytest.approx(START, abs=1e-3)


def test_both_of_two_learn_what_either_does():
    blend = native()
    blend.fork().draw_weights = [2.0, 1.0, 0.5, 0.0]
    assert list(blend.draw_weights) == [2.0, 1.0, 0.5, 0.0]


def test_what_was_learnt_is_carried_on():
    method = drafters.parse("blend:warm=false")
    one, other = method.build(Target(VOCAB)), method.build(Target(VOCAB))
    one._blend.draw_weights = [2.0, 1.5, 0.5, 0.25]
    other.load(one.state())
    assert list(other._blend.draw_weights) == [2.0, 1.5, 0.5, 0.25]
    for wrong in ([9.0] * 4, [np.nan] * 4, [1.0] * 3):
        with pytest.raises(MethodError, match="foresight"):
            other.load(one.state() | {"foresight": np.array(wrong, np.float32)})


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_only_a_sampled_request_has_noise(temperature):
    drafter = drafters.parse("blend:warm=false").build(Target(VOCAB))
    drafter.begin(asked([3, 5], temperature=temperature, seed=4))
    noise, allowed = drafter._foreseen(np.array([3, 5], np.int32), 3)
    assert noise == ([stream(4, 2), stream(4, 3), stream(4, 4)] if temperature else [])
    assert allowed is None

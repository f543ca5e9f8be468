import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paceline.control.temperature import Temperature
from paceline.control.top_k import TopK
from paceline.core import Request, TokenTree
from paceline.decoding.walk import draw, walk
from paceline.errors import ModelError, RequestError
from tests.test_core import tree, trees


def request(**options):
    return Request(prompt=(1,), max_new_tokens=10, **options)


def test_greedy_takes_the_lowest_of_equals():
    assert draw(np.array([0, 3, 3], np.float32), [1], request()) == (1, np.inf)
    assert draw(np.array([0, 3, 2.5], np.float32), [1], request(), want_margin=True) == (1, 0.5)


def test_sampling_follows_the_softmax():
    logits = np.log(np.array([0.5, 0.3, 0.15, 0.05], np.float32))
    drawn = [draw(logits, [0] * p, request(temperature=1.0, seed=p))[0] for p in range(1, 4001)]
    shares = np.bincount(drawn, minlength=4) / len(drawn)
    assert np.abs(shares - np.exp(logits)).max() < 4 * np.sqrt(0.25 / len(drawn))


def test_tokens_out_of_reach_change_nothing():
    logits = np.random.default_rng(0).normal(0, 30, 500).astype(np.float32)
    for position in range(1, 200):
        heated = request(temperature=1.0, seed=3)
        token, margin = draw(logits, [0] * position, heated, want_margin=True)
        from paceline.noise import gumbel

        scores = logits.astype(np.float64) + gumbel(3, position, np.arange(500))
        assert token == scores.argmax()
        assert margin >= 0


@settings(max_examples=200)
@given(trees(vocabulary=6), st.integers(0, 1000), st.sampled_from([0.0, 1.0]))
def test_the_walk_draws_what_plain_decoding_draws(guess, seed, temperature):
    """The model here looks at the path to a node only; the tree must not matter."""

    def logits_after(history):
        generator = np.random.default_rng(abs(hash(tuple(history))) % 2**32)
        return generator.normal(size=6).astype(np.float32)

    asked = request(temperature=temperature, seed=seed)
    start = [3, int(guess.tokens[0])]

    def path_to(node):
        return [*path_to(guess.parents[node]), int(guess.tokens[node])] if node > 0 else []

    rows = np.stack([logits_after(start + path_to(node)) for node in range(len(guess))])
    history = list(start)
    walked = walk(guess, rows, history, asked)

    plain = list(start)
    for _ in walked.drawn:
        plain.append(draw(logits_after(plain), plain, asked)[0])
    assert history == plain
    assert [int(guess.tokens[n]) for n in walked.path[1:]] == walked.drawn[:-1]
    assert guess.child(walked.path[-1], walked.drawn[-1]) is None


def test_controls_act_in_order_at_each_visited_node():
    chain = TokenTree.chain([0, 1, 2])
    rows = np.zeros((3, 4), np.float32)
    rows[0, 1], rows[1, 2], rows[2, 3] = 5, 5, 5
    asked = request(temperature=0.5, controls=(Temperature(0.5), TopK(1)))
    history = [9, 0]
    assert walk(chain, rows, history, asked).drawn == [1, 2, 3]
    assert history == [9, 0, 1, 2, 3]
    assert rows[0].tolist() == [0, 5, 0, 0]


def test_a_walk_takes_the_branch_it_draws():
    branching = tree([0, 1, 2, 3], [-1, 0, 0, 2])
    rows = np.zeros((4, 5), np.float32)
    rows[0, 2], rows[2, 3], rows[3, 4] = 1, 1, 1
    walked = walk(branching, rows, [0], request())
    assert walked.path == [0, 2, 3]
    assert walked.drawn == [2, 3, 4]


def test_hostile_logits_are_told_apart():
    with pytest.raises(RequestError, match="allow no token"):
        draw(np.full(3, -np.inf, np.float32), [1], request())
    with pytest.raises(ModelError, match="not finite"):
        draw(np.array([0, np.nan, 1], np.float32), [1], request(temperature=1.0))
    with pytest.raises(ModelError, match="not finite"):
        draw(np.array([0, np.inf, 1], np.float32), [1], request())

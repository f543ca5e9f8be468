import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from paceline.core import TokenTree
from paceline.measuring.calibration import BUCKETS, DEPTHS, Reliability
from tests.test_core import trees


def learnt(*passes):
    reliability = Reliability()
    reliability.learn(passes)
    return reliability


def test_only_children_of_accepted_nodes_are_tested():
    tree = TokenTree(
        np.array([0, 1, 2, 3, 4], np.int32),
        np.array([-1, 0, 0, 1, 2], np.int32),
        np.array([1, 0.75, 0.25, 0.5, 0.5], np.float32),
        np.array([-1, 0, 1, 0, 1], np.int16),
    )
    one, two = learnt((tree, [0, 1])).rows(("a", "b"))
    assert (one["origin"], one["guessed"], one["tested"]) == ("a", 2, 2)
    assert (one["predicted"], one["observed"]) == (0.625, 0.5)
    assert one["brier"] == pytest.approx((0.25**2 + 0.5**2) / 2)
    assert one["error"] == pytest.approx((0.25 + 0.5) / 2)
    assert one["depths"] == [
        {"depth": 1, "tested": 1, "predicted": 0.75, "observed": 1.0},
        {"depth": 2, "tested": 1, "predicted": 0.5, "observed": 0.0},
    ]
    assert [bucket["low"] for bucket in one["buckets"]] == [0.5, 0.7]
    assert (two["guessed"], two["tested"], two["observed"]) == (2, 1, 0.0)


def test_plain_passes_say_nothing():
    assert learnt((TokenTree.root(3), [0])).rows(()) == []


def test_origins_that_guessed_nothing_are_left_out():
    tree = TokenTree.chain([1, 2], score=0.5, origin=2)
    assert [row["origin"] for row in learnt((tree, [0])).rows("abc")] == ["c"]


def test_true_chances_have_next_to_no_error():
    generator = np.random.default_rng(0)
    passes = []
    for score in generator.random(4000):
        tree = TokenTree.chain([1, 2], score=float(score))
        passes.append((tree, [0, 1] if generator.random() < score else [0]))
    (row,) = learnt(*passes).rows(("only",))
    assert row["error"] < 0.03
    assert row["brier"] == pytest.approx(1 / 6, abs=0.02)  # mean of s (1 - s)
    assert len(row["buckets"]) == BUCKETS


@given(st.lists(st.tuples(trees(most=40), st.integers(0, 99)), min_size=1, max_size=5))
def test_buckets_and_depths_are_two_views_of_the_same_nodes(found):
    reliability, guessed, tested, accepted = Reliability(), 0, 0, 0
    for tree, seed in found:
        scores = np.random.default_rng(seed).random(len(tree)).astype(np.float32)
        path = [0]
        while children := np.flatnonzero(tree.parents == path[-1]).tolist():
            tested += len(children)
            if seed % 3 == len(path) % 3:
                break
            path.append(children[seed % len(children)])
        reliability.learn([(TokenTree(tree.tokens, tree.parents, scores, tree.origin), path)])
        guessed, accepted = guessed + len(tree) - 1, accepted + len(path) - 1
    rows = reliability.rows([str(number) for number in range(99)])
    assert sum(row["guessed"] for row in rows) == guessed
    assert sum(row["tested"] for row in rows) == tested
    for view in ("buckets", "depths"):
        parts = [part for row in rows for part in row[view]]
        assert sum(part["tested"] for part in parts) == tested
        hits = sum(part["observed"] * part["tested"] for part in parts)
        assert hits == pytest.approx(accepted)
    assert all(part["depth"] <= DEPTHS for row in rows for part in row["depths"])
    for row in rows:
        for bucket in row["buckets"]:
            assert bucket["low"] - 1e-6 <= bucket["predicted"] <= bucket["high"] + 1e-6

"""Basis-aware truncation against its linear programme, where that can be solved by hand."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paceline import LM
from paceline.control.base import bind
from paceline.control.basis_aware import BasisAware, directions, proven
from paceline.control.eta import Eta
from paceline.control.logits import entropy, softmax
from paceline.core import Request
from paceline.errors import MethodError, RequestError
from paceline.models.vocabulary import Vocabulary
from tests.conftest import shared


def edited(method, logits, head):
    size = len(logits)
    request = bind([method], Request((0,), 4), Vocabulary(size, head=lambda: head))
    return request.controls[0].apply(logits, [0])


@given(st.floats(1e-5, 0.3), st.floats(0.05, 0.9), st.floats(1e-4, 0.2))
@settings(max_examples=200)
def test_three_tokens_on_a_line_are_as_solved_by_hand(first, share, cutoff):
    """Without the first, two equations fix the other two: the middle one takes twice its share."""
    p = np.array([first, (1 - first) * share, (1 - first) * (1 - share)])
    k = cutoff / (1 - cutoff)
    needed = np.array([0.0, p[1] + 2 * p[0], p[2] - p[0]])
    feasible = needed[2] >= 0 and (needed <= p * (1 + k)).all()
    slack = min(needed[2], *(p * (1 + k) - needed)[1:])
    line = np.array([[-1.0], [0.0], [1.0]])
    if abs(slack) > 1e-3 * p[0]:
        assert proven(p, line, np.array([0]), cutoff)[0] == (not feasible)


@given(st.integers(0, 2**32 - 1), st.floats(1e-4, 0.05), st.integers(1, 6))
@settings(max_examples=60, deadline=None)
def test_what_is_proven_cannot_be_done_without(seed, cutoff, rank):
    """Take probability from a token along the directions' null space: then nothing is proven."""
    generator = np.random.default_rng(seed)
    size = 30
    basis = generator.normal(size=(size, rank))
    p = generator.dirichlet(np.full(size, 0.5)) + 1e-9
    p /= p.sum()
    token = int(p.argmin())
    rows = np.vstack([basis.T, np.ones(size)])
    # The change of least norm that empties the token and that the directions cannot see.
    blind = np.eye(size) - np.linalg.pinv(rows) @ rows
    change = -p[token] * blind[:, token] / blind[token, token]
    other = p + change
    possible = (other >= -1e-12).all() and (other <= p / (1 - cutoff) + 1e-12).all()
    if possible:
        assert not proven(p, basis, np.array([token]), cutoff)[0]


@given(st.integers(0, 2**32 - 1), st.sampled_from([1e-3, 0.01, 0.1]))
@settings(max_examples=60, deadline=None)
def test_it_keeps_at_least_what_eta_keeps(seed, epsilon):
    generator = np.random.default_rng(seed)
    logits = generator.normal(0, 3, 50).astype(np.float32)
    logits[generator.integers(50, size=10)] = -np.inf
    head = generator.normal(size=(50, 8)).astype(np.float32)
    found = np.isfinite(edited(BasisAware(epsilon, rank=4, tests=5), logits, head))
    eta = np.isfinite(Eta(epsilon).apply(logits, []))
    assert (found | ~eta).all()
    assert found.sum() <= eta.sum() + 5
    assert (np.isfinite(logits) | ~found).all()


def test_what_no_direction_tells_apart_is_dropped_and_an_extreme_one_kept():
    p = np.full(40, 0.0245)
    p[0] = 1.0 - p[1:].sum()
    assert 0 < p[0] < 0.05
    cutoff = 0.06
    line = np.zeros((40, 1))
    assert not proven(p, line, np.array([0]), cutoff)[0], "any two tokens are alike"
    line[0] = 1.0
    assert proven(p, line, np.array([0]), cutoff)[0], "only this one goes that way"


def test_directions_span_what_the_head_does():
    head = np.random.default_rng(0).normal(size=(60, 5)).astype(np.float32)
    found = directions(head, 9)
    assert found.shape == (60, 5)
    np.testing.assert_allclose(found.T @ found, np.eye(5), atol=1e-9)
    np.testing.assert_allclose(found @ (found.T @ head), head, atol=1e-5)
    _, singular, _ = np.linalg.svd(head, full_matrices=False)
    assert np.linalg.norm(directions(head, 1).T @ head) == pytest.approx(singular[0], rel=1e-6)


def test_real_text_keeps_tokens_that_eta_drops():
    lm = LM(shared("models", "stories260K"), drafter="recycle", budget=8, engine="native")
    options = {"temperature": 1.0, "max_new_tokens": 40}
    method = {"basis_aware": 0.02}
    plain = LM(shared("models", "stories260K"), drafter="plain", budget=0, engine="native")
    a = lm.generate("Once upon a time", controls=method, **options)
    assert a.tokens == plain.generate("Once upon a time", controls=method, **options).tokens
    [control] = lm.request("Once", controls=method, temperature=0).controls
    logits = np.random.default_rng(1).normal(0, 2, 512).astype(np.float32)
    kept = np.isfinite(control.apply(logits, []))
    p = softmax(logits)
    cutoff = min(0.02, 0.02**0.5 * np.exp(-entropy(p)))
    assert kept[p >= cutoff].all()


@pytest.mark.parametrize(
    "settings", ["epsilon=0", "epsilon=1", "epsilon=nan", "rank=0", "rank=65", "tests=0"]
)
def test_settings_out_of_range_are_refused(settings):
    from paceline.registry import controls

    with pytest.raises((RequestError, MethodError), match="basis_aware"):
        controls.parse(f"basis_aware:{settings}")


def test_a_model_without_a_head_is_refused():
    with pytest.raises(MethodError, match="no output head"):
        bind([BasisAware()], Request((0,), 4), Vocabulary(9))
    path = shared("models", "stories260K")
    lm = LM(f"{path}@0.5|{path}@0.5", drafter="plain", budget=0)
    with pytest.raises(MethodError, match="ensemble"):
        lm.request("Once", controls={"basis_aware": 0.02})

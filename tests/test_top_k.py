"""The k most likely tokens: as NumPy sorts them, and the same bits on every instruction set."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from paceline import _native

SIZES = (1, 2, 15, 16, 17, 63, 1000, 1024, 1040, 5000, 49152)


def ranked(logits: NDArray[np.float32], k: int) -> NDArray[np.int64]:
    """Sort by NumPy: of equal logits the lower token first."""
    return np.argsort(-logits, axis=1, kind="stable")[:, :k]


def softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    exact = np.exp(logits.astype(np.float64) - logits.max(1, keepdims=True))
    return exact / exact.sum(1, keepdims=True)


def check(logits: NDArray[np.float32], k: int) -> None:
    tokens, probs = _native.top_k(logits, k)
    order = ranked(logits, k)
    np.testing.assert_array_equal(tokens, order)
    expected = np.take_along_axis(softmax(logits), order, 1)
    exact = logits.shape[1] <= 4096 and abs(logits[np.isfinite(logits)]).max() < 200
    np.testing.assert_allclose(probs, expected, rtol=1e-5 if exact else 3e-4, atol=1e-30)


@given(
    size=st.sampled_from(SIZES),
    k=st.integers(1, 40),
    levels=st.sampled_from((1, 2, 5, 300, 1 << 20)),
    scale=st.sampled_from((0.001, 1.0, 12.0, 500.0)),
    centre=st.sampled_from((0.0, -1000.0, 300.0)),
    seed=st.integers(0, 1 << 30),
)
def test_ranks_as_numpy_does_with_ties(
    size: int, k: int, levels: int, scale: float, centre: float, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    drawn = np.round(rng.normal(0, 1, (2, size)) * levels) / levels * scale + centre
    check(drawn.astype(np.float32), min(k, size))


@pytest.mark.parametrize("size", SIZES)
def test_sorted_and_constant_rows(size: int) -> None:
    rising = np.linspace(-30, 30, size, dtype=np.float32)
    rows = np.stack([rising, rising[::-1], np.full(size, 2.5, np.float32)])
    check(rows, min(16, size))


@pytest.mark.parametrize("size", [17, 1000, 49152])
def test_forbidden_tokens_rank_last_and_have_no_probability(size: int) -> None:
    rng = np.random.default_rng(size)
    logits = np.full((3, size), -np.inf, np.float32)
    for row, allowed in enumerate((1, 5, 16)):
        logits[row, rng.choice(size, allowed, replace=False)] = rng.normal(-200, 3, allowed)
    check(logits, 16)


def test_rows_without_numbers_say_nothing() -> None:
    logits = np.random.default_rng(0).normal(0, 3, (4, 1000)).astype(np.float32)
    logits[0] = np.nan
    logits[1, 10:] = np.nan
    logits[2] = -np.inf
    logits[3, 500] = np.inf
    tokens, probs = _native.top_k(logits, 16)
    assert (probs == np.float32(0.001)).all()
    assert tokens.min() >= 0
    assert tokens.max() < 1000
    logits[3, 500] = np.nan  # a few such are passed over
    tokens, probs = _native.top_k(logits[3:], 16)
    assert 500 not in tokens
    assert probs[0, 0] > 0.002


@pytest.mark.parametrize("isa", _native.isas())
def test_every_instruction_set_gives_the_same_bits(
    isa: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(3)
    for size in SIZES:
        logits = rng.normal(0, 4, (3, size)).astype(np.float32)
        k = min(16, size)
        monkeypatch.setenv("PACELINE_ISA", "portable")
        expected = _native.top_k(logits, k)
        monkeypatch.setenv("PACELINE_ISA", isa)
        for ours, theirs in zip(_native.top_k(logits, k), expected, strict=True):
            np.testing.assert_array_equal(ours, theirs)

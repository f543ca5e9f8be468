import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from paceline.measuring.significance import (
    mcnemar_test,
    mean_estimate,
    ratio_estimate,
    share_estimate,
    sign_flip_test,
    t_test,
    wins,
)

NUMBERS = st.floats(-100, 100, allow_nan=False).map(lambda x: round(x, 3))


def t_tail(t, freedom):
    """Both tails of Student's t: with x = sqrt(f) tan(u), the density is cos(u) ** (f - 1)."""
    u = math.atan(abs(t) / math.sqrt(freedom))
    grid = np.linspace(0, u, 20_001)
    whole = math.sqrt(math.pi) * math.gamma(freedom / 2) / math.gamma((freedom + 1) / 2)
    return 1 - 2 * np.trapezoid(np.cos(grid) ** (freedom - 1), grid) / whole


@given(st.lists(NUMBERS, min_size=2, max_size=80))
def test_students_test_is_the_integral_of_its_density(values):
    n, mean = len(values), sum(values) / len(values)
    variance = sum((value - mean) ** 2 for value in values) / (n - 1)
    p = t_test(values)
    if not any(values):
        assert p == 1
    elif variance < 1e-12:
        assert p is None or p < 1e-3
    else:
        assert p == pytest.approx(t_tail(mean / math.sqrt(variance / n), n - 1), abs=1e-6)


def test_students_test_has_tabulated_values():
    # Two-sided 5 % points: 12.706 for 1 degree of freedom, 2.228 for 10, 1.984 for 100.
    for freedom, t in ((1, 12.7062), (10, 2.22814), (100, 1.98397)):
        n = freedom + 1
        spread = np.linspace(-1, 1, n)
        error = spread.std(ddof=1) / math.sqrt(n)
        assert t_test(spread + t * error) == pytest.approx(0.05, abs=2e-5)
    assert t_test([1.0]) is None
    assert t_test([2.0, 2.0]) is None
    assert t_test([0.0, 0.0]) == 1


@given(st.lists(st.integers(-5, 5).map(float), max_size=9))
def test_all_signs_are_tried_for_few_differences(values):
    observed = abs(sum(values))
    signs = itertools.product((-1, 1), repeat=len(values))
    sums = [abs(sum(s * v for s, v in zip(each, values, strict=True))) for each in signs]
    expected = sum(each >= observed - 1e-9 for each in sums) / len(sums)
    assert sign_flip_test(values) == pytest.approx(expected)


def test_random_signs_give_the_exact_p_value_but_for_noise():
    values = np.arange(1, 17) * np.where(np.arange(16) % 4 == 0, -1.0, 1.0)
    codes = np.arange(1 << 16)[:, None] >> np.arange(16) & 1
    exact = (np.abs((2 * codes - 1) @ np.abs(values)) >= abs(values.sum())).mean()
    found = sign_flip_test(values, seed=3)
    assert found == pytest.approx(exact, abs=4 * math.sqrt(exact * (1 - exact) / 9999))
    assert found == sign_flip_test(values, seed=3)
    assert sign_flip_test(np.ones(400)) == 1 / 10_000  # never 0
    assert sign_flip_test(np.zeros(400)) == 1


@given(st.integers(0, 60), st.integers(0, 60))
def test_mcnemars_test_is_binomial(won, lost):
    n = won + lost
    tail = sum(math.comb(n, k) for k in range(min(won, lost) + 1)) / 2**n
    assert mcnemar_test(won, lost) == pytest.approx(min(1, 2 * tail), rel=1e-9)


def test_mcnemars_test_of_many_items():
    assert mcnemar_test(30_000, 30_000) == pytest.approx(1)
    assert 0 <= mcnemar_test(20_000, 30_000) < 1e-300
    assert wins([1, 0, 1, 1], [0, 1, 1, 0]) == (2, 1)


@given(st.lists(st.tuples(NUMBERS, st.floats(0.5, 50)), min_size=2, max_size=30))
def test_estimates_are_their_formulas(pairs):
    n = len(pairs)
    mean = sum(a for a, _ in pairs) / n
    error = math.sqrt(sum((a - mean) ** 2 for a, _ in pairs) / (n - 1) / n)
    assert mean_estimate([a for a, _ in pairs]) == pytest.approx((mean, error), abs=1e-9)
    ratio = sum(a for a, _ in pairs) / sum(b for _, b in pairs)
    below = sum(b for _, b in pairs) / n
    residuals = sum((a - ratio * b) ** 2 for a, b in pairs)
    error = math.sqrt(residuals / (n - 1) / n) / below
    found = ratio_estimate([a for a, _ in pairs], [b for _, b in pairs])
    assert found == pytest.approx((ratio, error), abs=1e-9)


def test_shares_and_single_values():
    assert share_estimate([1, 0, 0, 1, 0]) == pytest.approx((0.4, math.sqrt(0.4 * 0.6 / 5)))
    assert share_estimate([1]) == (1, 0)
    assert mean_estimate([3.0]) == (3, None)

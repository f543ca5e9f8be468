import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from paceline.measuring.statistics import median_interval, total_ratio


def test_one_value_has_no_spread():
    assert median_interval([3.0]) == (3.0, 3.0, 3.0)


def test_the_interval_of_a_known_sample():
    # The median of a resample of 1..9 lies in [k, 10 - k] with the probability that a binomial
    # tells: 2..8 holds 98 %, 3..7 holds 87 %, so the 95 % bounds are 3 and 7 or just beyond.
    found = median_interval(list(range(1, 10)), resamples=20_000)
    assert found.median == 5
    assert found.low in (2.0, 3.0)
    assert found.high in (7.0, 8.0)


def test_the_interval_covers_the_true_median_about_as_often_as_it_says():
    draws = np.random.default_rng(1)
    intervals = [
        median_interval(draws.normal(2, 1, 40).tolist(), seed=i, resamples=400) for i in range(200)
    ]
    covered = sum(found.low <= 2 <= found.high for found in intervals)
    assert 180 <= covered <= 200


def test_the_seed_fixes_the_interval():
    values = [1.0, 4.0, 2.0, 8.0, 5.0]
    assert median_interval(values, seed=3) == median_interval(values, seed=3)


@given(st.lists(st.floats(0.01, 100), min_size=1, max_size=30))
def test_bounds_hold_the_median_and_stay_inside_the_sample(values):
    found = median_interval(values, resamples=200)
    assert min(values) <= found.low <= found.high <= max(values)
    assert found.median == pytest.approx(np.median(values))


def test_totals_weigh_long_prompts_more():
    assert total_ratio([9.0, 1.0], [3.0, 2.0]).value == 2.0
    assert total_ratio([6.0], [3.0]) == (2.0, 2.0, 2.0)


@given(st.lists(st.tuples(st.floats(0.01, 100), st.floats(0.01, 100)), min_size=1, max_size=30))
def test_a_ratio_of_totals_lies_between_those_of_its_pairs(pairs):
    upper, lower = zip(*pairs, strict=True)
    found = total_ratio(upper, lower, resamples=200)
    ratios = [a / b for a, b in pairs]
    assert min(ratios) * (1 - 1e-9) <= found.low <= found.high <= max(ratios) * (1 + 1e-9)
    assert found.value == pytest.approx(sum(upper) / sum(lower))


def test_the_interval_of_totals_covers_the_true_ratio_about_as_often_as_it_says():
    draws = np.random.default_rng(2)
    covered = 0
    for seed in range(200):
        lower = draws.uniform(1, 3, 40)
        found = total_ratio(lower * draws.normal(2, 0.5, 40), lower, seed, resamples=400)
        covered += found.low <= 2 <= found.high
    assert 178 <= covered <= 200

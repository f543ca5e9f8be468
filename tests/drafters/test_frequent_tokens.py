import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paceline.drafters.draft_model.frequent_tokens import FrequentTokens, generated_counts
from paceline.errors import MethodError
from paceline.models.trace import Trace

TOKENS = st.lists(st.integers(0, 19), min_size=1, max_size=200)


def ints(values):
    return np.array(values, np.int32)


@settings(deadline=None)
@given(TOKENS, TOKENS, st.integers(1, 19))
def test_the_most_frequent_are_chosen(prompt, output, size):
    frequent = FrequentTokens(size, 20)
    frequent.begin(ints(prompt))
    counts = np.bincount(prompt, minlength=20)
    check(frequent.tokens, counts, size)
    text = prompt + output
    chosen = frequent.follow(ints(text))
    seen = text if len(output) >= 64 else prompt
    check(chosen, np.bincount(seen, minlength=20), size)


def check(chosen, counts, size):
    assert chosen.dtype == np.int32
    assert len(chosen) == size
    assert (np.diff(chosen) > 0).all()
    left_out = np.setdiff1d(np.arange(20), chosen)
    assert counts[chosen].min() >= counts[left_out].max()
    edge = counts[left_out].max()  # of equally frequent ones the lower
    ties = chosen[counts[chosen] == edge]
    assert not len(ties) or ties.max() < left_out[counts[left_out] == edge].min()


def test_a_trace_counts_tokens_and_chances():
    trace = Trace(ints([7]), ints([0]), ints([[7, 9, 3]]), np.array([[0.1, 0.8, 0.05]], np.float32))
    frequent = FrequentTokens(3, 20, generated_counts(trace, 20))
    assert frequent.tokens.tolist() == [3, 7, 9]
    frequent.begin(ints([5, 5]))
    assert frequent.tokens.tolist() == [5, 7, 9]
    frequent.reset()
    assert frequent.tokens.tolist() == [3, 7, 9]


def test_counts_go_round_and_foreign_ones_are_refused():
    one, other = FrequentTokens(2, 20), FrequentTokens(2, 20)
    one.begin(ints([4, 9, 25]))  # a token beyond the smaller vocabulary
    other.load(one.state())
    assert other.tokens.tolist() == [4, 9]
    for counts in (np.zeros(19), np.zeros(20, np.int64), np.full(20, np.nan), np.full(20, -1.0)):
        with pytest.raises(MethodError, match=r"another vocabulary|impossible frequent"):
            other.load({"frequent": counts})

"""The factor of an inverse by blocks of rows, against the whole matrix in double precision."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from paceline.compress import column_errors
from paceline.compress.column_errors import inverse_factor
from paceline.errors import MethodError


@given(
    columns=st.integers(1, 40),
    block=st.sampled_from([1, 3, 8, 64]),
    ordered=st.booleans(),
    seed=st.integers(0, 9),
)
def test_factors_by_blocks_are_those_of_the_whole(columns, block, ordered, seed):
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(2 * columns + 3, columns, generator=generator)
    inputs[:, 0] = 0  # a channel that never occurs
    moment, before = inputs.T @ inputs, column_errors._BLOCK
    order = torch.randperm(columns, generator=generator) if ordered else None
    try:
        column_errors._BLOCK = block
        factor = inverse_factor(moment.clone(), 0.01, "gptq", order)
    finally:
        column_errors._BLOCK = before
    damped = (moment if order is None else moment[order][:, order]).double()
    damped += torch.diag((damped.diagonal() == 0).double() + 0.01 * damped.diagonal().mean())
    expected = torch.linalg.cholesky(torch.linalg.inv(damped), upper=True)
    torch.testing.assert_close(factor.double(), expected, rtol=1e-4, atol=1e-6)
    assert torch.equal(factor, factor.triu())


def test_inputs_that_are_too_alike_are_refused():
    with pytest.raises(MethodError, match="raise gptq:damping=0"):
        inverse_factor(-torch.ones(3, 3), 0.0, "gptq")

"""Pruners and quantisers: selection, grids, statistics."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from paceline.compress.base import Statistic, Statistics
from paceline.compress.prune.magnitude import Magnitude
from paceline.compress.quantize.rtn import RoundToNearest
from paceline.errors import MethodError
from paceline.registry import pruners, quantizers

NONE = Statistics()


def parse(spec):
    family = pruners if spec.partition(":")[0] in pruners.methods() else quantizers
    return family.parse(spec)


def matrix(rows, columns, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).normal(size=(rows, columns))).float()


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 9),
    columns=st.integers(1, 40),
    sparsity=st.floats(0, 1),
    seed=st.integers(0, 99),
)
def test_every_row_keeps_its_largest_weights(rows, columns, sparsity, seed):
    weight = matrix(rows, columns, seed)
    found = torch.from_numpy(Magnitude(sparsity=sparsity).compress(weight, NONE).dense())
    removed = int(columns * sparsity)
    assert ((found == 0).sum(1) == removed).all()
    assert torch.equal(found[found != 0], weight[found != 0])
    for row, kept in zip(weight.abs(), found != 0, strict=True):
        if 0 < removed < columns:
            assert row[kept].min() >= row[~kept].max()


@pytest.mark.parametrize(("pattern", "keep", "of"), [("2:4", 2, 4), ("4:8", 4, 8)])
def test_patterns_keep_as_many_of_each_group(pattern, keep, of):
    weight = matrix(5, 48)
    found = Magnitude(pattern=pattern).compress(weight, NONE)
    kept = (found.dense() != 0).reshape(5, -1, of)
    assert (kept.sum(-1) == keep).all()
    magnitudes = weight.abs().numpy().reshape(5, -1, of)
    best = np.sort(magnitudes, -1)[..., -keep:].sum()
    assert np.isclose(magnitudes[kept].sum(), best)


def test_equal_scores_keep_the_first_inputs():
    found = Magnitude(sparsity=0.5).compress(torch.ones(1, 4), NONE).dense()
    assert found.tolist() == [[1, 1, 0, 0]]


@settings(max_examples=80, deadline=None)
@given(
    rows=st.integers(1, 6),
    columns=st.integers(1, 70),
    bits=st.integers(2, 8),
    group=st.sampled_from([0, 1, 7, 32]),
    symmetric=st.booleans(),
    seed=st.integers(0, 99),
)
def test_every_weight_is_the_nearest_value_of_its_grid(rows, columns, bits, group, symmetric, seed):
    weight = matrix(rows, columns, seed)
    method = RoundToNearest(bits=bits, group=group, symmetric=symmetric, search=0)
    found = torch.from_numpy(method.compress(weight, NONE).dense())
    scales = method.grid(weight).scales.repeat_interleave(group or columns, 1)[:, :columns]
    # Half a step, as much again where the zero point was rounded away from the range's end, and at
    # the ends what the rounding of scales to half precision moves them by.
    steps = (0.5001 if symmetric else 1.0001) + 2**bits / 2**10
    assert ((found - weight).abs() <= scales * steps).all()
    searched = RoundToNearest(bits=bits, group=group, symmetric=symmetric, search=5)
    better = torch.from_numpy(searched.compress(weight, NONE).dense())
    assert (better - weight).square().sum() <= (found - weight).square().sum() * 1.0001


def test_zeros_stay_zeros():
    for symmetric in (True, False):
        method = RoundToNearest(bits=4, group=8, symmetric=symmetric)
        weight = matrix(3, 16)
        weight[:, ::3] = 0
        found = method.compress(weight, NONE).dense()
        assert (found[:, ::3] == 0).all()
        assert (method.compress(torch.zeros(2, 16), NONE).dense() == 0).all()


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("magnitude:sparsity=1.5", "magnitude:sparsity is 1.5, expected 0.0 to 1.0"),
        ("magnitude:pattern=1:4", "expected unstructured, 2:4 or 4:8"),
        ("magnitude:pattern=2:4,sparsity=0.3", "leave sparsity out"),
        ("rtn:bits=9", "rtn:bits is 9, expected 2 to 8"),
        ("rtn:group=-1", "rtn:group is -1"),
    ],
)
def test_wrong_settings_are_refused(spec, said):
    with pytest.raises(MethodError, match=said):
        parse(spec)


def test_a_pattern_needs_whole_groups():
    with pytest.raises(MethodError, match="multiple of 4 inputs, this matrix has 6"):
        Magnitude(pattern="2:4").compress(matrix(2, 6), NONE)


def test_statistics_add_up():
    x, wanted = matrix(50, 6), frozenset(Statistic)
    found = Statistics().plus(x[:20], wanted).plus(x[20:].reshape(5, 6, 6), wanted)
    assert found.count == 50
    torch.testing.assert_close(found.input_norm, x.norm(dim=0))
    torch.testing.assert_close(found.second_moment, x.T @ x)
    assert Statistics().plus(x, frozenset()).input_norm is None

"""Factorisations that are trained: sparse codes, matrix product operators."""

import numpy as np
import pytest
import torch

from paceline.compress.base import Statistic, Statistics
from paceline.compress.lowrank.compactifai import contract, decompose, split_sites
from paceline.errors import MethodError
from paceline.models.tensors import Dense, LowRank, Sparse, TensorTrain
from paceline.registry import factorizers, quantizers

TRAINED = ((factorizers, "dsformer"), (factorizers, "compactifai"), (quantizers, "edkm"))


@pytest.fixture(scope="module")
def case():
    torch.manual_seed(0)
    x = torch.randn(400, 48) @ torch.randn(48, 48)
    weight = torch.randn(40, 48) @ torch.diag(torch.logspace(0, -1, 48))
    return weight, x, Statistics().plus(x, frozenset({Statistic.SECOND_MOMENT}))


def error(case, spec):
    weight, x, stats = case
    stored = factorizers.parse(spec).compress(weight, stats)
    found = torch.from_numpy(stored.dense())
    return float((x @ (found - weight).T).norm() / (x @ weight.T).norm()), stored


@pytest.mark.parametrize(
    "spec", ["dsformer:keep=0.7", "compactifai:keep=0.7", "compactifai:keep=0.7,sites=3"]
)
def test_training_brings_the_outputs_closer(case, spec):
    before, _ = error(case, f"{spec},steps=0")
    after, stored = error(case, f"{spec},steps=60")
    assert after < 0.95 * before
    assert stored.nbytes <= 0.75 * 2 * 40 * 48
    again, same = error(case, f"{spec},steps=60")
    assert again == after
    assert np.array_equal(stored.dense(), same.dense())


@pytest.mark.parametrize(("pattern", "keep", "of"), [("1:4", 1, 4), ("2:4", 2, 4), ("1:8", 1, 8)])
def test_codes_follow_the_pattern(case, pattern, keep, of):
    _, stored = error(case, f"dsformer:pattern={pattern},steps=2")
    assert isinstance(stored, LowRank)
    assert isinstance(stored.left, Sparse)
    assert stored.left.pattern == (keep, of)
    groups = stored.left.mask.reshape(40, -1, of)
    assert (groups.sum(-1) == keep).all()


def test_a_matrix_that_is_such_a_product_comes_back(case):
    _, _, stats = case
    torch.manual_seed(1)
    sites = split_sites((40, 48), 3)
    sizes = [a * b for a, b in sites]
    cores = [
        torch.randn(1, sizes[0] * 3),
        torch.randn(3, sizes[1] * 3),
        torch.randn(3, sizes[2]),
    ]
    weight = contract(cores, sites)
    again = contract(decompose(weight, sites, 3), sites)
    torch.testing.assert_close(again, weight, rtol=1e-4, atol=1e-4)
    stored = factorizers.parse("compactifai:sites=3,bond=3,steps=0").compress(weight, stats)
    assert isinstance(stored, TensorTrain)
    gap = torch.from_numpy(stored.dense()) - weight
    assert float(gap.norm()) < 2e-3 * float(weight.norm())


def test_sizes_that_have_no_factors_still_split(case):
    _, _, stats = case
    weight = torch.randn(37, 48)
    stored = factorizers.parse("compactifai:keep=0.5,steps=1").compress(weight, stats)
    assert stored.shape == (37, 48)
    bond = factorizers.parse("compactifai:keep=1,bond=2,steps=0").compress(weight, stats)
    assert [core.shape[0] for core in bond.cores] == [1, 2]
    assert isinstance(factorizers.parse("dsformer:keep=1").compress(weight, stats), Dense)


@pytest.mark.parametrize(("registry", "name"), TRAINED)
def test_searches_do_not_train(registry, name):
    quick = registry.parse(f"{name}:steps=7").quick
    assert quick.name == name
    assert quick.steps == 0


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("dsformer:pattern=3:4", "expected 1:4, 2:4, 1:8"),
        ("dsformer:steps=-1", "dsformer:steps is -1"),
        ("compactifai:sites=5", "compactifai:sites is 5, expected 2 to 4"),
        ("compactifai:bits=4", "compactifai:bits is 4, expected 8 or 16"),
        ("bitstack:blocks=17", "bitstack:blocks is 17, expected 1 to 16"),
    ],
)
def test_wrong_settings_are_refused(spec, said):
    with pytest.raises(MethodError, match=said):
        factorizers.parse(spec)

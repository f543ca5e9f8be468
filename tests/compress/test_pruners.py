"""Pruners that look at data: what they keep, and how much less they lose than magnitudes alone."""

import numpy as np
import pytest
import torch

from paceline.compress.base import Statistic, Statistics
from paceline.compress.column_errors import inverse_factor, replace_columns
from paceline.compress.prune.dass import DaSS
from paceline.compress.prune.pruner_zero import PrunerZero
from paceline.compress.prune.sparsegpt import SparseGPT
from paceline.compress.prune.wanda import Wanda
from paceline.compress.recipe import parse_recipe, parse_steps
from paceline.errors import MethodError

ROWS, COLUMNS = 24, 160
BOTH = frozenset({Statistic.INPUT_NORM, Statistic.SECOND_MOMENT})


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def inputs(columns=COLUMNS, count=600, seed=0):
    """Correlated inputs, some channels large, in no order."""
    sizes = torch.linspace(0.2, 3, columns)[torch.arange(columns) * 7 % columns]
    mixed = random(count, columns, seed=seed) @ (
        torch.eye(columns) + 0.2 * random(columns, columns, seed=7)
    )
    return mixed * sizes


def statistics(x):
    return Statistics().plus(x, BOTH)


def lost(recipe, x, weight):
    """Return the squared error of the outputs."""
    stored = parse_steps(recipe).compress(weight, statistics(x)).dense()
    return float((inputs(seed=5) @ (torch.from_numpy(stored) - weight).T).square().sum())


def kept(stored):
    return torch.from_numpy(stored.dense() != 0)


def test_wanda_keeps_the_largest_products_of_weight_and_input_norm():
    x, weight = inputs(), random(ROWS, COLUMNS)
    found = Wanda(sparsity=0.25).compress(weight, statistics(x))
    scores = weight.abs() * x.norm(dim=0)
    stays = kept(found)
    assert (stays.sum(1) == 120).all()
    for row in range(ROWS):
        assert scores[row][stays[row]].min() >= scores[row][~stays[row]].max()
    assert torch.equal(torch.from_numpy(found.dense())[stays], weight[stays])


@pytest.mark.parametrize("settings", ["sparsity=0.5", "pattern=2:4", "pattern=4:8"])
def test_what_looks_at_more_loses_less(settings):
    x, weight = inputs(), random(ROWS, COLUMNS)
    losses = [lost(f"{name}:{settings}", x, weight) for name in ("magnitude", "wanda", "sparsegpt")]
    assert losses[1] < 0.9 * losses[0]
    assert losses[2] < 0.9 * losses[1]


@pytest.mark.parametrize(("pattern", "of"), [("2:4", 4), ("4:8", 8)])
def test_sparsegpt_keeps_half_of_every_group(pattern, of):
    found = SparseGPT(pattern=pattern).compress(random(ROWS, COLUMNS), statistics(inputs()))
    assert (kept(found).reshape(ROWS, -1, of).sum(-1) == of // 2).all()
    assert found.pattern == (of // 2, of)


def test_sparsegpt_removes_its_share_of_every_128_columns():
    found = kept(SparseGPT(sparsity=0.3).compress(random(ROWS, COLUMNS), statistics(inputs())))
    removed = (~found[:, :128]).sum(), (~found[:, 128:]).sum()
    assert removed == (int(ROWS * 128 * 0.3), int(ROWS * 32 * 0.3))
    assert len(set(found.sum(1).tolist())) > 1  # rows differ


def test_sparsegpt_keeps_everything_or_nothing_at_the_ends():
    weight, stats = random(ROWS, COLUMNS), statistics(inputs())
    assert torch.equal(
        torch.from_numpy(SparseGPT(sparsity=0.0).compress(weight, stats).dense()), weight
    )
    assert not SparseGPT(sparsity=1.0).compress(weight, stats).dense().any()


def test_later_columns_make_up_for_replaced_ones_as_well_as_they_can():
    x, weight = inputs(12), random(3, 12)
    moment = statistics(x).second_moment
    factor = inverse_factor(moment, 0.0, "sparsegpt")

    def drop_the_first(at, rest):
        return torch.zeros(3, 1) if at == 0 else rest[:, at : at + 1]

    found = replace_columns(weight, factor, drop_the_first)
    solved = torch.linalg.lstsq(x[:, 1:].double(), (x @ weight.T).double()).solution.T
    torch.testing.assert_close(found[:, 1:], solved.float(), atol=1e-3, rtol=1e-3)


def test_inputs_that_never_occur_lose_their_weights_first():
    x = inputs()
    x[:, ::4] = 0
    found = kept(Wanda(pattern="2:4").compress(random(ROWS, COLUMNS), statistics(x)))
    assert not found[:, ::4].any()


def test_pruner_zero_multiplies_squares_by_scaled_gradients():
    weight, fisher = random(4, 8), random(4, 8, seed=1).square()
    scores = PrunerZero().score(weight, Statistics(fisher=fisher))
    size = fisher.sqrt().numpy()
    scaled = (size - size.min()) / (size.max() - size.min())
    np.testing.assert_allclose(scores, weight.numpy() ** 2 * scaled, rtol=1e-5)
    same = PrunerZero().score(weight, Statistics(fisher=torch.ones(4, 8)))
    assert not same.isnan().any()


def test_pruner_zero_takes_no_transform_before_it():
    with pytest.raises(MethodError, match=r"pruner_zero weighs errors by gradients .* awq changes"):
        parse_recipe("awq+pruner_zero+rtn:group=32")


def gated_block():
    hidden, units = 16, 24
    weights = {
        "q": random(hidden, hidden),
        "gate": random(units, hidden, seed=1),
        "up": random(units, hidden, seed=2),
        "down": random(hidden, units, seed=3),
    }
    x, between = inputs(hidden), inputs(units, seed=2)
    stats = {name: statistics(x) for name in ("q", "gate", "up")} | {"down": statistics(between)}
    return weights, stats, between.norm(dim=0)


def test_dass_lets_the_weights_of_an_input_compete_by_the_units_outputs():
    weights, stats, norm = gated_block()
    methods = DaSS(sparsity=0.25).for_block(weights, stats)
    for name in ("gate", "up"):
        stays = kept(methods[name].compress(weights[name], stats[name]))
        assert (stays.sum(0) == 18).all()
        scores = weights[name].abs() * norm[:, None].sqrt()
        for column in range(16):
            chosen = stays[:, column]
            assert scores[chosen, column].min() >= scores[~chosen, column].max()
    for name in ("q", "down"):
        wanda = kept(Wanda(sparsity=0.25).compress(weights[name], stats[name]))
        assert torch.equal(kept(methods[name].compress(weights[name], stats[name])), wanda)


def test_dass_takes_patterns_over_outputs_into_the_mlp():
    weights, stats, _ = gated_block()
    methods = DaSS(pattern="2:4").for_block(weights, stats)
    stays = kept(methods["up"].compress(weights["up"], stats["up"]))
    assert (stays.reshape(6, 4, 16).sum(1) == 2).all()
    assert methods["down"].compress(weights["down"], stats["down"]).pattern == (2, 4)


def test_dass_without_a_gate_is_wanda():
    weights, stats, _ = gated_block()
    del weights["gate"], stats["gate"]
    assert set(DaSS().for_block(weights, stats).values()) == {DaSS()}


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("sparsegpt:damping=-1", "sparsegpt:damping is -1.0, expected 0.0 to 1.0"),
        ("dass:alpha=nan", "dass:alpha is nan, expected 0.0 to 4.0"),
        ("wanda:pattern=4:8,sparsity=0.4", "leave sparsity out"),
    ],
)
def test_wrong_settings_are_refused(spec, said):
    with pytest.raises(MethodError, match=said):
        parse_steps(spec)


@pytest.mark.parametrize("pruner", ["wanda:pattern=2:4", "sparsegpt", "sparsegpt:pattern=4:8"])
@pytest.mark.parametrize("quantizer", ["rtn:group=32", "gptq:bits=3,group=32"])
def test_quantizers_keep_the_zeros(pruner, quantizer):
    weight, stats = random(ROWS, COLUMNS), statistics(inputs())
    before = kept(parse_steps(pruner).compress(weight, stats))
    after = parse_steps(f"{pruner}+{quantizer}").compress(weight, stats)
    assert not after.dense()[~before.numpy()].any()
    assert after.dense()[before.numpy()].any()


@pytest.mark.parametrize("recipe", ["wanda:pattern=2:4", "sparsegpt", "wanda+gptq:group=32"])
def test_eora_makes_up_for_much_of_what_pruning_lost(recipe):
    x, weight = inputs(), random(ROWS, COLUMNS)
    assert lost(f"{recipe}+eora:rank=8", x, weight) < 0.75 * lost(recipe, x, weight)

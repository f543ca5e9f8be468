"""Activations of few bits: what products of integers would compute, in calibration and engine."""

import numpy as np
import pytest
import torch

from paceline import LM
from paceline.compress.base import Statistic, Statistics
from paceline.compress.calibrate import Calibration
from paceline.compress.job import CompressionJob
from paceline.compress.recipe import parse_recipe
from paceline.errors import MethodError
from paceline.models import load
from paceline.models.rounding import round_inputs, rounded_product
from paceline.models.tensors import Dense, RoundedInputs
from paceline.registry import quantizers
from tests.conftest import shared

TEXT = "Once upon a time there was a little girl named Lily. She liked to play. " * 8


def outliers(columns=64, count=300):
    random = torch.Generator().manual_seed(0)
    x = torch.randn(count, columns, generator=random)
    x[:, [3, 17]] *= 40
    return x, torch.randn(24, columns, generator=random) * 0.05


def stored(spec, x, weight):
    stats = Statistics().plus(x, frozenset({Statistic.SECOND_MOMENT}))
    return quantizers.parse(spec).compress(weight, stats)


def loss(form, x, weight):
    missed = rounded_product(form, torch.from_numpy(form.dense()))(x) - x @ weight.T
    return float(missed.square().sum() / (x @ weight.T).square().sum())


def test_inputs_are_whole_multiples_of_a_scale_of_their_position():
    x = torch.tensor([[7.0, -3.4, 0.2, 0.0], [0.0, 0.0, 0.0, 0.0]])
    torch.testing.assert_close(round_inputs(x, 4), torch.tensor([[7.0, -3, 0, 0], [0.0, 0, 0, 0]]))
    assert torch.equal(round_inputs(x, 16), x)


def test_inputs_apart_have_a_scale_of_their_own():
    matrix = torch.eye(3)
    form = RoundedInputs(Dense(np.eye(3, dtype=np.float32)), 4, np.int32([1]), 16)
    found = rounded_product(form, matrix)(torch.tensor([[0.7, 1000.3, 0.34]]))
    torch.testing.assert_close(found, torch.tensor([[0.7, 1000.3, 0.3]]))


@pytest.mark.parametrize("spec", ["quik:outliers=0.04", "comet:group=32,block=2,ratio=3"])
def test_channels_with_outliers_are_found_and_kept_apart(spec):
    x, weight = outliers()
    form = stored(spec, x, weight)
    assert {3, 17} <= set(form.apart.tolist())
    assert len(form.apart) <= 3
    blind = RoundedInputs(form.matrix, form.bits, np.int32([]))
    assert loss(form, x, weight) < 0.5 * loss(blind, x, weight)


def test_outlier_channels_have_eight_bits_of_weight():
    x, weight = outliers()
    form = stored("quik:outliers=0.04,act_bits=8", x, weight)
    found = torch.from_numpy(form.dense())
    apart = torch.from_numpy(form.apart).long()
    narrow = torch.from_numpy(form.matrix.parts[0].dense())
    assert (narrow[:, apart] == 0).all()
    wide = form.matrix.parts[1].left
    assert wide.bits == 8
    np.testing.assert_array_equal(found[:, apart].numpy(), wide.dense())
    alone = stored("quik:outliers=0,act_bits=8", x, weight)
    assert loss(form, x, weight) < loss(alone, x, weight)


@pytest.fixture(scope="module")
def rounded(tmp_path_factory):
    model = load(shared("models", "stories260K"))
    tokens = np.array(model.tokenizer.encode(TEXT)[:96], np.int64).reshape(2, 48)
    out = tmp_path_factory.mktemp("rounded") / "out"
    CompressionJob(model, out, parse_recipe("quik")).run(Calibration(tokens, "a story"))
    return out


def test_the_engine_rounds_what_calibration_rounded(rounded):
    ids = np.array(load(rounded).tokenizer.encode(TEXT)[:40], np.int32)

    def logits(**options):
        rows = []
        with LM(rounded, drafter="plain", **options) as lm:
            assert lm.engine.name == "reference"
            lm.engine.start(ids, lambda _, __, found: rows.append(found.copy()))
        return np.concatenate(rows)

    one, other = logits(), logits(dtype="stored")
    np.testing.assert_allclose(one, other, atol=1e-4)
    model = load(rounded)
    layers = [
        form for name in model.weights if isinstance(form := model.weights[name], RoundedInputs)
    ]
    assert len(layers) == 7 * len(model.config.layers)


def test_what_cannot_round_is_refused(rounded):
    with pytest.raises(MethodError, match="no products for"):
        LM(rounded, engine="native")


def test_corrections_multiply_rounded_inputs():
    x, weight = outliers()
    stats = Statistics().plus(x, frozenset({Statistic.SECOND_MOMENT}))
    form = parse_recipe("comet:bits=2,group=32+eora:rank=8").steps.compress(weight, stats)
    plain = stored("comet:bits=2,group=32", x, weight)
    assert isinstance(form, RoundedInputs)
    assert loss(form, x, weight) < loss(plain, x, weight)


@pytest.mark.parametrize("out", ["dense", "small.gguf"])
def test_a_copy_that_rounds_no_activations_says_so(rounded, tmp_path, out):
    from typer.testing import CliRunner

    from paceline.cli.app import app

    done = CliRunner().invoke(app, ["convert", str(rounded), str(tmp_path / out)])
    assert done.exit_code == 0, done.output
    assert "are rounded no more" in " ".join(done.output.split())


def test_a_limit_is_the_scale_of_all_positions_and_clips():
    x = torch.tensor([[7.0, -3.4, 0.2, 20.0], [1.4, 0.0, 0.0, -9.0]])
    expected = torch.tensor([[7.0, -3, 0, 7], [1.0, 0, 0, -7]])
    torch.testing.assert_close(round_inputs(x, 4, 7.0), expected)


@pytest.mark.parametrize("bits", [4, 8])
def test_mobilequant_trains_scales_and_ranges_together(bits):
    from tests.compress.test_tune import Bench

    bench = Bench()
    grid = "rtn:bits=8,group=0"
    errors = {}
    for steps in (1, 60):
        stored, _, block = bench.compress(f"mobilequant:steps={steps},act_bits={bits}+{grid}")
        limits = {name: form.limit for name, form in stored.items()}
        assert limits["q"] == limits["k"] == limits["v"] != limits["o"]
        assert all(form.bits == bits and not len(form.apart) for form in stored.values())
        exact = bench.runner(bench.weights, bench.inputs[28:])
        products = {
            name: rounded_product(form, torch.from_numpy(form.dense()))
            for name, form in stored.items()
        }
        found = bench.runner({**block.weights, **products}, bench.inputs[28:])
        errors[steps] = float((found - exact).square().sum() / exact.square().sum())
    assert errors[60] < (0.8 if bits == 4 else 0.95) * errors[1]


def test_a_search_finds_ranges_without_outliers():
    from paceline.compress.reconstruct.objective import Objective
    from paceline.compress.transform.mobilequant import RangedInputs
    from tests.compress.test_tune import Bench

    bench = Bench()
    block = bench.block()
    parts = RangedInputs(block, quantizers.parse("rtn:bits=8,group=0"), 3)
    objective = Objective(block, 4)
    before = objective.error(parts.rounded())
    parts.search(objective)
    assert objective.error(parts.rounded()) < 0.9 * before


def test_what_looks_at_inputs_does_not_go_with_ranges():
    for recipe in ("mobilequant+quik", "mobilequant+flatquant+rtn", "flatquant+mobilequant+rtn"):
        with pytest.raises(MethodError, match="changes"):
            parse_recipe(recipe)

"""Tuners: the outputs of a block come closer, the form stays, and two runs have the same bits."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from paceline.compress.base import Block, BlockTuner
from paceline.compress.pipeline import _compress, _Runner
from paceline.compress.recipe import Recipe, parse_steps
from paceline.compress.reconstruct.objective import Objective, dense_weights
from paceline.errors import MethodError
from paceline.models import load
from paceline.models.tensors import Codebook, Grouped, Transformed, TwoGrained, from_tensors
from paceline.registry import tuners
from tests.conftest import shared

BLOCK_TUNERS = sorted(
    name for name, each in tuners.methods().items() if issubclass(each, BlockTuner)
)


class Bench:
    """The second block of a small model, on random tokens."""

    def __init__(self, name="stories260K"):
        model = load(shared("models", name))
        self.config = model.config
        self.weights = {
            each.removeprefix("layers.1."): torch.tensor(
                np.asarray(model.weights[each], np.float32)
            )
            for each in model.weights
            if each.startswith("layers.1.")
        }
        tokens = np.random.default_rng(0).integers(3, self.config.vocab_size, (32, 24))
        embed = np.asarray(model.weights["embed"], np.float32)
        self.inputs = torch.from_numpy(embed[tokens])
        self.runner = _Runner(self.config, self.config.layers[1], 24)

    def block(self, weights=None, bases=None):
        weights, bases = dict(weights or self.weights), bases or {}
        stats = self.runner.statistics(weights, self.inputs, parse_steps("gptq").statistics, bases)
        shape = self.config.layers[1]
        return Block(1, self.config, shape, weights, stats, self.inputs, self.runner, bases)

    def compress(self, recipe):
        """Return the stored matrices and the relative error on texts that were not trained on."""
        steps, block = parse_steps(recipe), self.block()
        objective = Objective(block, 4)
        for transform in steps.transforms:
            transform.transform(block, steps.compressors[-1])
        block = replace(self.block(block.weights, block.bases), ranges=block.ranges)
        stored = _compress(block, Recipe(steps), list(block.stats))
        for tuner in steps.tuners:
            stored |= tuner.tune(block, stored)
        return stored, objective.error(dense_weights(block, stored)), block


@pytest.fixture(scope="module")
def bench():
    return Bench()


ROUGH, GPTQ = "rtn:bits=2,group=16,symmetric=false", "gptq:bits=2,group=16,symmetric=false"

TABLE = "rtn:bits=2,group=16,scale_bits=6,levels=learned"


@pytest.mark.parametrize(
    ("quantizer", "tuner", "below"),
    [
        (ROUGH, "block_ap:steps=60,rate=0.02", 0.8),
        (GPTQ, "block_ap:steps=100,rate=0.02", 0.95),
        ("rtn:bits=3", "block_ap:steps=60,rate=0.02", 0.8),
        (ROUGH, "pv:steps=45,batch=8", 0.9),
        (GPTQ, "pv:steps=45,batch=8", 0.95),
        (ROUGH, "lrq:steps=60", 0.9),
        ("rtn:bits=3", "lrq:steps=60", 0.8),
        (f"{GPTQ},scale_bits=4", "block_ap:steps=60,rate=0.02", 0.99),
        ("rtn:bits=3,group=16,scale_bits=6", "block_ap:steps=60,rate=0.02", 0.7),
        (TABLE, "block_ap:steps=60,rate=0.02", 0.75),
    ],
)
def test_a_tuner_lowers_the_error_of_the_block(bench, quantizer, tuner, below):
    before, error, _ = bench.compress(quantizer)
    after, tuned, _ = bench.compress(f"{quantizer}+{tuner}")
    assert tuned < below * error
    for name in before:
        assert after[name].nbytes == before[name].nbytes
        assert type(after[name]) is type(before[name])


@pytest.mark.parametrize("name", BLOCK_TUNERS)
def test_two_runs_have_the_same_bits(bench, name):
    spec = tuners.methods()[name].examples[0]
    one, other = (bench.compress(f"rtn:bits=2,group=16+{spec}") for _ in range(2))
    for each in one[0]:
        assert one[0][each].dense().tobytes() == other[0][each].dense().tobytes()
    for each, weight in one[2].weights.items():
        assert torch.equal(weight, other[2].weights[each])


@pytest.mark.parametrize("quantizer", ["rtn:bits=3,group=16", "rtn:bits=4,group=32"])
@pytest.mark.parametrize("transform", ["teq:steps=60", "flatquant:steps=60"])
def test_a_trained_transform_lowers_the_error_of_the_block(bench, quantizer, transform):
    _, error, _ = bench.compress(quantizer)
    _, trained, _ = bench.compress(f"{transform}+{quantizer}")
    assert trained < 0.95 * error


def test_transforms_of_inputs_are_stored_and_tuned_through(bench):
    stored, error, block = bench.compress("flatquant:steps=30+rtn:bits=3,group=16")
    assert all(isinstance(each, Transformed) for each in stored.values())
    assert stored["q"].left.dense().tobytes() == stored["k"].left.dense().tobytes()
    x = torch.randn(5, 64)
    matrix = torch.from_numpy(stored["q"].matrix.dense())
    online = block.bases["q"].inputs(x) @ matrix.T
    torch.testing.assert_close(online, x @ torch.from_numpy(stored["q"].dense()).T)
    exact = block.bases["q"].back(block.bases["q"].into(block.weights["q"]))
    torch.testing.assert_close(exact, block.weights["q"], atol=1e-5, rtol=1e-4)
    tuned, after, _ = bench.compress("flatquant:steps=30+rtn:bits=3,group=16+block_ap:steps=60")
    assert all(isinstance(each, Transformed) for each in tuned.values())
    assert after < 0.95 * error


def test_a_trained_transform_needs_a_grid(bench):
    with pytest.raises(MethodError, match="teq learns through rounding to integers in groups"):
        bench.compress("teq+svd")


@pytest.mark.parametrize("rows", ["shared", "own"])
def test_entries_of_a_codebook_move_against_the_gradient(rows):
    from paceline.compress.reconstruct.codes import MovableEntries

    rng = np.random.default_rng(0)
    codes = rng.integers(0, 8, (6, 5, 2)).astype(np.uint16)
    entries = rng.normal(size=(2, 6 if rows == "own" else 1, 8, 4)).astype(np.float32)
    scales = rng.uniform(1, 2, (6, 2)).astype(np.float32)
    stored = Codebook(codes, entries, scales, 10)
    part = MovableEntries(stored)
    assert part.stored().dense().tobytes() == stored.dense().tobytes()
    target = torch.randn(6, 20)
    gradient = 2 * (part.weight().detach() - target)
    moved, change = part.propose(gradient, torch.ones(6, 20), 1)
    wanted = change.reshape(6, 5, 4)
    gain = (gradient * change + change.square()).reshape(6, 5, 4).sum(-1)
    assert bool((moved[..., 0] == part.codes[..., 0]).all())
    before = part.weight().detach()
    good = gain < 0
    assert 5 < int(good.sum()) < 30
    part.codes = torch.where(good[..., None], moved, part.codes)
    after = part.weight().detach()
    torch.testing.assert_close((after - before).reshape(6, 5, 4)[good], wanted[good])
    assert float((after - target).norm()) < float((before - target).norm())


def test_a_codebook_is_tuned_in_its_type(bench):
    recipe = "edkm:bits=2,group=16,steps=0"
    before, error, _ = bench.compress(recipe)
    after, tuned, _ = bench.compress(f"{recipe}+pv:steps=45,batch=8")
    assert tuned < 0.95 * error
    for name, each in after.items():
        assert each.nbytes == before[name].nbytes
        assert from_tensors(each.tensors()).dense().tobytes() == each.dense().tobytes()


def test_moves_of_a_row_are_chosen_one_after_another():
    from paceline.compress.reconstruct.codes import choose_moves

    # Two weights with the same input: moving one does what is needed, moving both overshoots.
    moment = torch.tensor([[1.0, 1.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
    gradient = torch.tensor([[-2.0, -2.0, -0.5]])
    change = torch.ones(1, 3)
    chosen = choose_moves(change, gradient, torch.ones(1), moment, 3, 3)
    assert chosen.tolist() == [[True, False, False]]


def test_what_does_not_help_is_not_kept(bench):
    plain, error, _ = bench.compress("rtn:bits=8,group=16")
    tuned, after, block = bench.compress("rtn:bits=8,group=16+block_ap:steps=2,rate=1.0")
    assert after == error
    for each in plain:
        assert tuned[each] is not None
        assert tuned[each].dense().tobytes() == plain[each].dense().tobytes()
    assert all(block.weights[each] is bench.weights[each] for each in bench.weights)


def test_norms_are_tuned_too(bench):
    _, _, block = bench.compress("rtn:bits=2,group=16+block_ap:steps=8")
    assert not torch.equal(block.weights["attn_norm"], bench.weights["attn_norm"])


@pytest.mark.parametrize("kind", ["symmetric", "zeros", "minima"])
def test_parameters_of_groups_start_at_what_is_stored(kind):
    from paceline.compress.reconstruct.grouped import TrainedGroups

    rng = np.random.default_rng(0)
    codes = rng.integers(0, 8, (6, 20)).astype(np.uint8)
    scales = rng.uniform(0.5, 1, (6, 3)).astype(np.float16).astype(np.float32)
    zeros = rng.integers(0, 8, (6, 3)).astype(np.uint16) if kind == "zeros" else None
    minima = -scales if kind == "minima" else None
    stored = Grouped(3, codes, scales, 8, zeros, minima, scale_type="F16")
    trained = TrainedGroups(torch.randn(6, 20), stored)
    assert trained.stored().dense().tobytes() == stored.dense().tobytes()
    weight = trained.weight()
    np.testing.assert_allclose(weight.detach().numpy(), stored.dense(), atol=1e-6)
    weight.square().sum().backward()
    assert all(bool((each.grad != 0).any()) for each, _ in trained.groups())


@pytest.mark.parametrize("kind", ["symmetric", "zeros", "levels"])
def test_two_grained_parameters_start_at_what_is_stored(kind):
    from paceline.compress.reconstruct.two_grained import TrainedTwoGrained

    rng = np.random.default_rng(0)
    codes = rng.integers(0, 8, (6, 20)).astype(np.uint8)
    steps = rng.integers(1, 16, (6, 3)).astype(np.uint8)
    steps[2] = 0  # groups of zeros
    units = rng.uniform(0.01, 0.02, 6).astype(np.float16).astype(np.float32)
    zeros = rng.integers(0, 8, (6, 3)).astype(np.uint8) if kind == "zeros" else None
    levels = np.array([-127, -60, -31, -9, 10, 30, 66, 127], np.int8) if kind == "levels" else None
    stored = TwoGrained(3, codes, 8, steps, 4, units, zeros, levels)
    trained = TrainedTwoGrained(torch.randn(6, 20), stored)
    assert trained.stored().dense().tobytes() == stored.dense().tobytes()
    weight = trained.weight()
    np.testing.assert_allclose(weight.detach().numpy(), stored.dense(), atol=1e-6)
    weight.square().sum().backward()
    assert all(bool((each.grad != 0).any()) for each, _ in trained.groups())


def test_a_single_text_is_trained_on_in_its_first_half_and_judged_on_its_second(bench):
    block = bench.block()
    single = replace(block, inputs=block.inputs[:1])
    objective = Objective(single, 4)
    end = {**block.weights, "down": block.weights["down"] * 1.1}
    rows = torch.arange(1)
    right, wrong = bench.runner(block.weights, single.inputs), bench.runner(end, single.inputs)
    each = ((wrong - right).square().sum(-1) / right.square().sum(-1))[0]
    torch.testing.assert_close(objective.loss(end, rows), each[:12].mean())
    assert objective.error(end) == pytest.approx(float(each[12:].mean()))
    with pytest.raises(MethodError, match="one text of one token"):
        Objective(replace(single, inputs=single.inputs[:, :1]), 4)


def test_forms_that_cannot_be_trained_are_refused(bench):
    with pytest.raises(
        MethodError, match=r"block_ap trains integers in groups, .* stores a bitmap"
    ):
        bench.compress("magnitude:sparsity=0.5+block_ap")


@pytest.mark.parametrize("name", BLOCK_TUNERS)
def test_a_block_whose_matrices_are_kept_is_not_tuned(bench, name):
    block = bench.block()
    assert tuners.parse(f"{name}:steps=2").tune(block, {}) == {}
    assert all(block.weights[each] is bench.weights[each] for each in bench.weights)


@pytest.mark.parametrize(
    ("spec", "said"),
    [("block_ap:steps=0", "block_ap:steps is 0"), ("block_ap:rate=2", "block_ap:rate is 2")],
)
def test_wrong_settings_are_refused(spec, said):
    with pytest.raises(MethodError, match=said):
        tuners.parse(spec)

"""Recipes through whole models: errors propagate, transforms change nothing, models still speak."""

import numpy as np
import pytest
import torch

from paceline.compress.base import MATRICES, Block, Statistic, Statistics
from paceline.compress.pipeline import _Runner, _transform, compress_blocks
from paceline.compress.prune.magnitude import Magnitude
from paceline.compress.recipe import Recipe, Steps, parse_recipe
from paceline.engines.reference import ReferenceEngine
from paceline.errors import MethodError, ModelError
from paceline.models import blocks, load
from paceline.models.tensors import Linear
from paceline.registry import corrections, factorizers, pruners, quantizers, transforms, tuners
from tests.conftest import shared

COMPLETE = (
    (transforms, "{}+rtn:group=32"),
    (corrections, "rtn:bits=3,group=32+{}"),
    (tuners, "rtn:bits=3,group=32+{}"),
)
EXAMPLES = [
    spec
    for family in (pruners, quantizers, factorizers)
    for name, method in family.methods().items()
    for spec in method.examples
    if name not in ("transmla", "pruner_zero")  # changes two matrices only; needs gradients
] + [
    frame.format(spec)
    for family, frame in COMPLETE
    for method in family.methods().values()
    for spec in method.examples
]


class Story:
    def __init__(self):
        self.model = load(shared("models", "stories260K"))
        self.config = self.model.config
        self.weights = {
            name: torch.tensor(np.asarray(self.model.weights[name], np.float32))
            for name in self.model.weights
        }
        text = "Once upon a time there was a little girl named Lily. She liked to play. " * 8
        self.tokens = torch.tensor([self.model.tokenizer.encode(text)[:160]])
        positions = torch.arange(self.tokens.shape[1])
        self.inputs = blocks.embed(self.tokens, positions, self.config, self.weights)

    def layer(self, index):
        start = f"layers.{index}."
        return {
            name.removeprefix(start): each
            for name, each in self.weights.items()
            if name.startswith(start)
        }

    def compress(self, recipe):
        found = {}
        for block in compress_blocks(self.config, self.layer, self.inputs, recipe):
            for name, each in block.tensors.items():
                found[f"layers.{block.index}.{name}"] = each
        return found

    def loss(self, weights):
        rows = []
        engine = ReferenceEngine(self.config, weights)
        ids = self.tokens[0].numpy().astype(np.int32)
        engine.start(ids, lambda _, __, logits: rows.append(logits.copy()))
        logits = torch.from_numpy(np.concatenate(rows))
        return torch.nn.functional.cross_entropy(logits[:-1], self.tokens[0, 1:]).item()


@pytest.fixture(scope="module")
def story():
    return Story()


def dense(each):
    return each.dense() if isinstance(each, Linear) else each.numpy()


@pytest.mark.parametrize("spec", EXAMPLES)
def test_a_compressed_model_still_speaks(story, spec):
    stored = story.compress(parse_recipe(spec))
    matrices = {name: each for name, each in stored.items() if isinstance(each, Linear)}
    assert len(matrices) == len(MATRICES) * len(story.config.layers)
    weights = {name: each.numpy() for name, each in story.weights.items()}
    before = story.loss(weights)
    after = story.loss(weights | {name: dense(each) for name, each in stored.items()})
    assert after != before
    assert after < np.log(story.config.vocab_size) - 1  # far better than a uniform guess
    whole = sum(weights[name].nbytes for name in matrices)
    assert sum(each.nbytes for each in matrices.values()) < 0.9 * whole


def test_eight_bits_lose_next_to_nothing(story):
    weights = {name: each.numpy() for name, each in story.weights.items()}
    stored = story.compress(parse_recipe("rtn:bits=8,group=32"))
    after = story.loss(weights | {name: dense(each) for name, each in stored.items()})
    assert abs(after - story.loss(weights)) < 0.01


def test_later_blocks_see_the_error_of_earlier_ones(story):
    seen = []

    class Recording(Magnitude):
        statistics = frozenset({Statistic.INPUT_NORM})

        def score(self, weight, stats):
            seen.append(stats.input_norm)
            return super().score(weight, stats)

    method = Recording(sparsity=0.5)
    story.compress(Recipe(Steps("recording", compressors=(method,))))
    inputs = {}
    layers = [story.layer(index) for index in range(len(story.config.layers))]
    blocks.logits(
        story.tokens,
        story.config,
        story.weights,
        layers,
        lambda *tap: inputs.update({tap[:2]: tap[2]}),
    )
    first, last = seen[0], seen[-len(MATRICES)]
    torch.testing.assert_close(first, inputs[0, "q"].flatten(0, 1).norm(dim=0))
    plain = inputs[len(layers) - 1, "q"].flatten(0, 1).norm(dim=0)
    assert not torch.allclose(last, plain, rtol=1e-2)


@pytest.mark.parametrize("name", ["stories260K", "TinyStories-656K"])
@pytest.mark.parametrize(
    "spec", [spec for kind in transforms.methods().values() for spec in kind.examples]
)
def test_a_transform_does_not_change_what_a_block_computes(spec, name):
    model = load(shared("models", name))
    config = model.config
    weights = {
        each.removeprefix("layers.0."): torch.tensor(np.asarray(model.weights[each], np.float32))
        for each in model.weights
        if each.startswith("layers.0.")
    }
    torch.manual_seed(0)
    x = torch.randn(2, 24, config.hidden_size)
    x[..., ::7] *= 20  # outliers, so that there is something to scale
    runner = _Runner(config, config.layers[0], 24)
    transform = transforms.parse(spec)
    before = runner.outputs(weights, x)
    stats = runner.statistics(weights, x, transform.statistics)
    kept = dict(weights)
    block = Block(0, config, config.layers[0], weights, stats, x, runner)
    transform.transform(block, quantizers.parse("rtn:bits=3,group=16"))
    for each, basis in block.bases.items():
        weights[each] = basis.back(basis.into(weights[each]))
    changed = any(not torch.equal(weights[each], kept[each]) for each in kept)
    assert changed or block.ranges
    after = runner.outputs(weights, x)
    assert (after - before).norm() < 1e-4 * before.norm()


def test_rules_choose_by_name(story, tmp_path):
    file = tmp_path / "mixed.toml"
    file.write_text(
        'recipe = "rtn:bits=4,group=32"\n'
        '[[rule]]\nmatch = "layers.0.*"\nrecipe = "keep"\n'
        '[[rule]]\nmatch = "*.v"\nrecipe = "rtn:bits=8,group=32"\n'
    )
    stored = story.compress(parse_recipe(str(file)))
    assert torch.equal(stored["layers.0.q"], story.weights["layers.0.q"])
    assert stored["layers.1.v"].bits == 8
    assert stored["layers.1.k"].bits == 4


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("gptqq", "gptq"),
        ("rtn+awq", "awq (transform) comes after rtn (quantizer)"),
        ("rtn+gptq", "rtn and gptq do not go together"),
        ("svd+rtn", "svd and rtn do not go together"),
        ("awq", "compresses nothing"),
        ("block_ap+rtn", "rtn (quantizer) comes after block_ap (tuner)"),
        ("rtn:bits=1", "rtn:bits is 1"),
        ("magnitude+svd", "magnitude and svd do not go together"),
        ("magnitude+transmla:cache=0.5", "transmla does not bear other methods"),
        ("awq+transmla", "give it a rule of its own"),
        ("transmla+eora", "transmla does not bear other methods"),
        ("flatquant+awq+rtn", "put flatquant behind all other transforms"),
        ("flatquant+flatquant+rtn", "put flatquant behind all other transforms"),
        ("flatquant+quik", "quik stores what multiplies the inputs as they are, and flatquant"),
        ("flatquant+comet", "comet stores what multiplies the inputs as they are, and flatquant"),
        ("missing.toml", "cannot read the recipe missing.toml"),
    ],
)
def test_what_cannot_compose_is_refused(text, said):
    with pytest.raises(MethodError) as caught:
        parse_recipe(text)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("recipe = 3", "no text 'recipe'"),
        ('recipe = "rtn"\nrules = 1', "did you mean rule?"),
        ('recipe = "rtn"\nrule = 1', "no tables"),
        ('recipe = "rtn"\n[[rule]]\nmatch = "*"', "no text 'recipe'"),
        ('recipe = "rtn"\n[[rule]]\nmatch = "*"\nrecipe = "awq+rtn"', "changes more than matrices"),
        ('recipe = "rtn"\nhead = "gptq"', "needs calibration"),
        (
            'recipe = "rtn"\n[[rule]]\nmatch = "*"\nrecipe = "rtn+block_ap"',
            "changes more than matrices",
        ),
        ('recipe = "rtn"\nhead = "rtn+block_ap"', "needs calibration"),
        ('recipe = "rtn"\nhead = 3', "no text 'head'"),
        ('recipe = "rtn"\n[[rule]]\nmatch = "*"\nrecipe = "rtn"\nhead = "rtn"', "unknown entry of"),
        (
            'recipe = "flatquant+rtn"\n[[rule]]\nmatch = "*.[kv]"\nrecipe = "transmla"',
            "transmla stores what multiplies the inputs as they are",
        ),
        ("recipe = ", "no TOML file"),
    ],
)
def test_a_bad_recipe_file_is_refused(tmp_path, text, said):
    file = tmp_path / "bad.toml"
    file.write_text(text)
    with pytest.raises(MethodError) as caught:
        parse_recipe(str(file))
    assert said in str(caught.value)


@pytest.mark.parametrize("spec", ["svd", "bitstack", "awq+rtn", "flatquant:steps=2+rtn"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_refused_by_name(spec, value):
    story = Story()
    story.weights["layers.1.q"][0, 0] = value
    with pytest.raises(ModelError, match=r"layers.1.q holds NaN or infinite weights"):
        story.compress(parse_recipe(spec))


@pytest.mark.parametrize("spec", ["svd", "gptq", "awq+rtn"])
def test_inputs_that_are_no_numbers_are_refused(spec):
    story = Story()
    story.weights["layers.0.attn_norm"] *= 1e38
    with pytest.raises(ModelError, match=r"inputs of layers.0.q are no numbers"):
        story.compress(parse_recipe(spec))


@pytest.mark.parametrize("spec", ["awq+gptq:bits=3,group=16", "teq:steps=4+gptq:bits=3,group=16"])
def test_statistics_of_scaled_channels_are_those_of_the_scaled_inputs(spec):
    story, recipe = Story(), parse_recipe(spec)
    runner = _Runner(story.config, story.config.layers[0], story.inputs.shape[1])
    weights = dict(story.layer(0))
    block = Block(0, story.config, runner.shape, weights, {}, story.inputs, runner)
    wanted = recipe.wanted(["layers.0.q"])
    before = runner.statistics(weights, story.inputs, wanted)
    found = _transform(block, recipe, wanted)
    right = runner.statistics(weights, story.inputs, wanted)
    assert any(not torch.equal(weights[name], story.layer(0)[name]) for name in MATRICES)
    for name in MATRICES:
        size = float(right[name].second_moment.abs().max())
        assert torch.allclose(
            found[name].second_moment, right[name].second_moment, rtol=1e-3, atol=1e-4 * size
        )
        assert found[name].count == right[name].count
    assert not torch.allclose(before["down"].second_moment, right["down"].second_moment, rtol=1e-2)
    assert found["q"].second_moment is found["v"].second_moment  # factored once


def test_rounding_weighs_errors_where_inputs_were_measured():
    torch.manual_seed(0)
    x = torch.randn(300, 32) * torch.logspace(0, -2, 32)
    stats = Statistics().plus(x, frozenset({Statistic.SECOND_MOMENT}))
    weight = torch.randn(24, 32)
    method = quantizers.parse("rtn:bits=3,group=32")

    def error(seen):
        found = torch.from_numpy(method.compress(weight, seen).dense())
        assert torch.allclose(found, method.nearest(weight, seen))
        return float((x @ (found - weight).T).square().sum())

    assert error(stats) < 0.9 * error(Statistics())


def test_gptq_loses_less_than_rounding():
    torch.manual_seed(0)
    mix = torch.randn(48, 48) * torch.logspace(0, -2, 48)
    x = torch.randn(600, 48) @ mix
    stats = Statistics().plus(x, frozenset({Statistic.SECOND_MOMENT}))
    weight = torch.randn(32, 48)

    def error(spec):
        found = torch.from_numpy(quantizers.parse(spec).compress(weight, stats).dense())
        return float((x @ (found - weight).T).square().sum())

    assert error("gptq:bits=3,group=16") < 0.7 * error("rtn:bits=3,group=16")


def test_a_whitened_factorisation_is_the_best_of_its_rank():
    torch.manual_seed(0)
    x = torch.randn(500, 24) @ torch.randn(24, 24)
    stats = Statistics().plus(x, frozenset({Statistic.SECOND_MOMENT}))
    weight = torch.randn(20, 24)
    # The output X W' has the same singular values as W times the root of the moment.
    values = torch.linalg.svdvals((x @ weight.T).double())
    keep = 6 * (20 + 24 - 6) / (20 * 24)
    stored = factorizers.parse(f"svd:keep={keep}").compress(weight, stats)
    assert stored.basis.shape == (6, 24)
    two = factorizers.parse(f"svd:pivots=false,keep={6 * 44 / 480}").compress(weight, stats)
    assert two.right.shape == (6, 24)
    for matrix in (stored, two):
        error = float((x @ (torch.from_numpy(matrix.dense()) - weight).T).norm())
        assert error == pytest.approx(float(values[6:].norm()), rel=1e-3)
    for rank in range(1, 9):  # a share of numbers that is rounded down keeps its rank
        share = rank * 44 / 480
        assert factorizers.parse(f"svd:pivots=false,keep={share}").rank(20, 24) == rank
    assert stored.nbytes - 6 * 4 == two.nbytes - 2 * 6 * 6
    assert np.abs(stored.coefficients.dense()).max() < 1.06


def test_ranks_go_where_they_save_most():
    torch.manual_seed(0)
    x = torch.randn(400, 32)
    stats = Statistics().plus(x, frozenset({Statistic.SECOND_MOMENT}))
    thin = torch.randn(32, 4) @ torch.randn(4, 32) + 0.01 * torch.randn(32, 32)
    weights = {"q": torch.randn(32, 32), "k": thin}
    known = dict.fromkeys("qk", stats)
    plan = factorizers.parse("svd:keep=0.6").for_block(weights, known)
    assert plan["k"].keep < 0.3 < 0.8 < plan["q"].keep
    numbers = sum(each.keep * 1024 for each in plan.values())
    assert 0.55 * 2048 < numbers <= 0.6 * 2048
    stored = {name: plan[name].compress(weights[name], stats) for name in plan}
    assert sum(each.nbytes for each in stored.values()) <= 2 * 0.63 * 2048
    even = factorizers.parse("svd:keep=0.6,spread=false").for_block(weights, known)
    assert {each.keep for each in even.values()} == {0.6}


def test_a_correction_brings_the_matrix_closer():
    torch.manual_seed(0)
    x = torch.randn(400, 32) @ torch.randn(32, 32)
    stats = Statistics().plus(x, frozenset({Statistic.SECOND_MOMENT}))
    weight = torch.randn(24, 32)
    stored = quantizers.parse("rtn:bits=2,group=16").compress(weight, stats)

    def error(matrix):
        return float((x @ (torch.from_numpy(matrix.dense()) - weight).T).norm())

    better = corrections.parse("eora:rank=8").correct(weight, stored, stats)
    assert error(better) < 0.6 * error(stored)
    assert error(corrections.parse("eora:rank=4096").correct(weight, stored, stats)) < 0.05 * error(
        stored
    )


def test_recipes_of_ours_parse_and_may_keep_the_head():
    from paceline.compress.recipe import NAMED

    for name in NAMED:
        recipe = parse_recipe(name)
        assert recipe.steps.compressors
        assert recipe.head.compressors
    assert str(parse_recipe("mobilenmt", "rtn:bits=4,group=32").head.text) == "rtn:bits=4,group=32"
    assert parse_recipe("mobilenmt").steps.compressors[0].bits == 8

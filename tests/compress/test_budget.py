"""The search for levels under a budget of bytes: what fits, what is found, and what is kept."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from paceline.compress.allocate.base import Problem, mutate
from paceline.compress.allocate.evopress import EvoPress
from paceline.compress.budget.level_loss import LevelLoss
from paceline.compress.budget.level_recipes import level_recipes
from paceline.compress.budget.level_store import LevelStore
from paceline.compress.budget.search import BudgetSearch
from paceline.compress.calibrate import Calibration
from paceline.compress.job import CompressionJob
from paceline.compress.recipe import parse_recipe
from paceline.compress.whole_model import WholeModel
from paceline.errors import MethodError, RequestError
from paceline.models import load
from tests.conftest import shared


def problem(matrices=12, levels=5, budget=0.5, seed=0):
    """A problem whose loss is the sum of prices and of some of neighbours."""
    draws = np.random.default_rng(seed)
    sizes = np.cumsum(draws.choice([30, 60, 90], (matrices, 1)) * np.ones((1, levels), int), 1)
    importance = draws.lognormal(0, 1.5, (matrices, 1))
    prices = importance * 4.0 ** -np.arange(levels)
    calls = []

    def loss(allocation, tokens):
        calls.append((allocation, tokens))
        own = prices[np.arange(matrices), list(allocation)]
        return float(own.sum() + (own[1:] * own[:-1]).sum())

    low, high = sizes[:, 0].sum(), sizes[:, -1].sum()
    made = Problem(sizes, prices, int(low + budget * (high - low)), loss)
    return made, calls


@settings(max_examples=40, deadline=None)
@given(budget=st.floats(0, 1), seed=st.integers(0, 50))
def test_every_allocation_fits(budget, seed):
    made, _ = problem(budget=budget, seed=seed)
    parent = made.uniform()
    assert made.bytes_of(parent) <= made.budget
    assert made.bytes_of(made.cheapest()) <= made.budget
    for draw in range(5):
        child = mutate(made, parent, np.random.default_rng(draw))
        assert made.bytes_of(child) <= made.budget
        assert all(0 <= level < made.levels for level in child)
        assert max(b - a for a, b in zip(parent, child, strict=True)) <= 1


def test_a_budget_below_the_smallest_level_is_refused():
    made, _ = problem(budget=-0.1)
    with pytest.raises(
        RequestError, match=r"smallest level of all matrices takes .*raise --budget"
    ):
        made.uniform()


def test_the_search_finds_less_loss_than_the_same_level_everywhere():
    made, calls = problem()
    found = EvoPress(generations=30).search(made, lambda done: None)
    uniform = made.loss(made.uniform(), 1)
    assert made.loss(found, 1) < 0.7 * uniform
    assert made.loss(found, 1) <= made.loss(made.cheapest(), 1)
    assert made.bytes_of(found) <= made.budget
    again, others = problem()
    assert EvoPress(generations=30).search(again, lambda done: None) == found
    assert others == calls[: len(others)]


def test_estimates_that_mislead_cost_nothing():
    made, _ = problem()
    misled = Problem(made.sizes, -made.prices[::-1], made.budget, made.loss)
    found = EvoPress(generations=0).search(misled, lambda done: None)
    assert made.loss(found, 1) <= made.loss(made.uniform(), 1)


def test_levels_of_recipes():
    def texts(text):
        return [str(each) for each in level_recipes(text)]

    assert "wanda:sparsity=0.4" in texts("wanda")
    assert len(texts("wanda")) == 8
    assert texts("gptq:group=32")[0] == "gptq:bits=2,group=32"
    assert "rtn:bits=3,group=32,symmetric=false+eora:rank=8" in texts(
        "rtn:group=32,symmetric=false+eora:rank=8"
    )
    mixed = texts("wanda:pattern=2:4 | rtn:bits=8,group=32 | wanda:sparsity=0.25 | keep")
    assert mixed == ["wanda:pattern=2:4", "rtn:bits=8,group=32", "wanda:sparsity=0.25", "keep"]
    assert len(texts("wanda+rtn:bits=4")) == 8


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("wanda:pattern=2:4", "has one level"),
        ("awq+gptq:group=32", "awq changes whole blocks, and a search with --budget"),
        ("rtn:mean_bits=3", "rtn:mean_bits divides bits among matrices, and so does --budget"),
        ("keep", "has one level"),
    ],
)
def test_recipes_without_levels_are_refused(text, said):
    with pytest.raises(MethodError, match=said):
        level_recipes(text)


@pytest.fixture(scope="module")
def model():
    torch.set_num_threads(1)
    return load(shared("models", "stories260K"))  # five layers


@pytest.fixture(scope="module")
def texts(model):
    story = "Once upon a time there was a little girl named Lily. She liked to play. " * 12
    return Calibration(np.array(model.tokenizer.encode(story)[:192], np.int64).reshape(4, 48), "a")


def search_of(model, out, **changed):
    levels = level_recipes(changed.pop("recipe", "wanda"))
    allocator = EvoPress(generations=2, offspring=3, tokens=96, first_tokens=48)
    asked = {"levels": levels, "budget": 700_000, "allocator": allocator} | changed
    return BudgetSearch(model, out, levels[0], **asked)


def test_a_search_fits_the_budget_and_beats_the_same_level_everywhere(model, texts, tmp_path):
    search = search_of(model, tmp_path / "out")
    found = search.find(texts)
    assert found.recipe.rules
    assert found.loss < found.uniform
    file = tmp_path / "recipe.toml"
    file.write_text(found.toml)
    assert parse_recipe(str(file)).rules == found.recipe.rules
    file.unlink()
    size = CompressionJob(model, tmp_path / "out", found.recipe).run(texts)
    assert 0.97 * search.budget < size.total <= search.budget
    search.finish()
    assert [each.name for each in tmp_path.iterdir()] == ["out"]


def test_pruned_and_rounded_levels_go_together(model, texts, tmp_path):
    recipe = "wanda:sparsity=0.5|rtn:group=32"
    search = search_of(model, tmp_path / "out", recipe=recipe, budget=400_000)
    size = CompressionJob(model, tmp_path / "out", search.find(texts).recipe).run(texts)
    assert size.total <= 400_000


def test_an_interrupted_search_goes_on_with_the_losses_it_knows(
    model, texts, tmp_path, monkeypatch
):
    whole = search_of(model, tmp_path / "whole").find(texts)
    judge, calls = LevelLoss.__call__, []

    def stops(self, allocation, tokens):
        if len(calls) == 5:
            raise KeyboardInterrupt
        calls.append(allocation)
        return judge(self, allocation, tokens)

    monkeypatch.setattr(LevelLoss, "__call__", stops)
    with pytest.raises(KeyboardInterrupt):
        search_of(model, tmp_path / "out").find(texts)
    kept = json.loads((tmp_path / ".out.search" / "losses.json").read_text())
    assert len(kept["losses"]) == 5
    monkeypatch.setattr(LevelLoss, "__call__", judge)
    monkeypatch.setattr(LevelStore, "_keep", None)  # levels are there
    again = search_of(model, tmp_path / "out").find(texts)
    assert again == whole
    with pytest.raises(RequestError, match="another compression that was interrupted"):
        search_of(model, tmp_path / "out", recipe="wanda|rtn").find(texts)


def test_blocks_that_are_not_run_again_change_no_loss(model, texts, tmp_path):
    search = search_of(model, tmp_path / "out")
    search.find(texts)
    store = LevelStore(search.search_path, model.config, search._layer, search.levels)
    names, tokens = store.names(), torch.from_numpy(texts.tokens)

    def fresh():
        source = WholeModel(model.config, search._layer, search._outer(), tokens)
        return LevelLoss(source, store.dense, names)

    one, draws = fresh(), np.random.default_rng(0)
    allocation = np.full(len(names), 3)
    for _ in range(4):
        allocation[draws.integers(len(names), size=2)] = draws.integers(0, 8, 2)
        loss = one(tuple(allocation.tolist()), 96)
        assert loss == pytest.approx(fresh()(tuple(allocation.tolist()), 96), rel=1e-4)
        assert loss > 0

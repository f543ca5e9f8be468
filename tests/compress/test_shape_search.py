"""The search for shapes and bits of every layer under a budget of bytes or time, without clocks."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from paceline.cli.budget import budget_search, parse_budget
from paceline.compress.allocate.base import Problem
from paceline.compress.budget import latency
from paceline.compress.budget.latency import LatencyTable
from paceline.compress.budget.level_loss import LevelLoss
from paceline.compress.budget.module_levels import ShapeWords, modules, split_words
from paceline.compress.budget.module_loss import ModuleLoss
from paceline.compress.budget.module_store import ModuleStore
from paceline.compress.budget.shape_search import Speed
from paceline.compress.job import CompressionJob
from paceline.compress.recipe import parse_recipe
from paceline.errors import MethodError, RequestError
from paceline.models import load
from paceline.registry import allocators
from tests.compress.test_budget import problem
from tests.compress.test_structure import loss, source, texts  # noqa: F401

SHAPES = "narrow+attention_drop+layer_drop"
SEARCHES = (
    "evopress:generations=3,offspring=4,tokens=160,first_tokens=80",
    "ziplm:trials=6,tokens=160",
    "llama_nas:generations=2,population=5,tokens=160",
    "subnets:generations=2,population=5,parents=2,tokens=160",
    "darwinlm:generations=1,offspring=2,steps=1,tokens=80",
)


@pytest.fixture(autouse=True)
def no_clock(monkeypatch, tmp_path):
    """Passes take a time that follows from the bytes that they read, on any machine."""
    monkeypatch.setattr(latency, "_pass_seconds", lambda engine: 1e-9 * engine.weight_bytes + 1e-6)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def search_of(model, out, budget, recipe=SHAPES, allocate=SEARCHES[1]):
    return budget_search(model, out, recipe, "keep", False, budget, allocate, 1)


def ragged(budget=0.5):
    """A problem whose units have numbers of levels of their own."""
    made, calls = problem(levels=5, budget=budget)
    ends = tuple(int(end) for end in np.random.default_rng(1).integers(1, 5, made.matrices))
    tops = sum(int(made.sizes[at, end]) for at, end in enumerate(ends))
    low = int(made.sizes[:, 0].sum())
    trained = lambda allocation, tokens: made.loss(allocation, tokens) / 2  # noqa: E731
    room = int(low + budget * (tops - low))
    return Problem(made.sizes, made.prices, room, made.loss, ends, trained), calls


@pytest.mark.parametrize("spec", SEARCHES)
def test_searches_fit_levels_of_each_unit_and_repeat(spec):
    for budget in (0.05, 0.5, 1.0):
        made, _ = ragged(budget)
        found = allocators.parse(spec).search(made, lambda done: None)
        assert made.bytes_of(found) <= made.budget
        assert all(0 <= level <= end for level, end in zip(found, made.highest, strict=True))
        assert made.loss(found, 160) <= made.loss(made.uniform(), 160)
        again, _ = ragged(budget)
        assert allocators.parse(spec).search(again, lambda done: None) == found
    everything, _ = ragged(1.0)
    assert everything.cheapest() == everything.highest == everything.uniform()


def test_dynamic_programming_finds_the_smallest_sum():
    made, _ = problem(matrices=6, levels=4, budget=0.4)
    best = min(
        (
            tuple(int(each) for each in levels)
            for levels in np.ndindex(*(4,) * 6)
            if made.bytes_of(levels) <= made.budget
        ),
        key=lambda levels: made.prices[np.arange(6), list(levels)].sum(),
    )
    plain = Problem(
        made.sizes,
        made.prices,
        made.budget,
        lambda levels, tokens: float(made.prices[np.arange(6), list(levels)].sum()),
    )
    assert allocators.parse("ziplm:trials=0").search(plain, lambda done: None) == best


def test_a_budget_that_nothing_fits_is_refused():
    made, _ = ragged(-0.1)
    with pytest.raises(RequestError, match="smallest levels of all layers do not fit"):
        made.uniform()
    unable, _ = problem()
    with pytest.raises(MethodError, match="trains what it judges"):
        allocators.parse("darwinlm").search(unable, lambda done: None)


@pytest.mark.parametrize(
    ("text", "words", "rest"),
    [
        ("gptq:group=32", (False, False, False), "gptq:group=32"),
        ("narrow", (True, False, False), "keep"),
        ("narrow + layer_drop + gptq | keep", (True, False, True), " gptq |keep"),
        ("attention_drop|rtn:bits=4", (False, True, False), "keep|rtn:bits=4"),
    ],
)
def test_words_of_a_recipe_say_what_may_become_of_shapes(text, words, rest):
    found, left = split_words(text)
    assert (found.widths, found.attention, found.layers) == words
    assert left.replace(" ", "") == rest.replace(" ", "")


def test_words_with_settings_are_refused():
    with pytest.raises(MethodError, match="write narrow alone"):
        split_words("narrow:share=0.3|keep")


def test_budgets_are_bytes_or_speed():
    assert parse_budget("bytes=1MB") == (1_000_000, None)
    assert parse_budget("tokens/s=1.5x") == (0, Speed(1.5, True))
    assert parse_budget("tokens/s=80") == (0, Speed(80.0, False))
    for text in ("tokens/s=", "tokens/s=fast", "tokens/s=-1x", "tokens/s=nan", "tokens/s=0", "x=1"):
        with pytest.raises(RequestError, match=r"expected bytes=SIZE, tokens/s=NUMBER"):
            parse_budget(text)


def test_levels_of_a_module_are_quarters_and_bits(source):  # noqa: F811
    shape = source.config.layers[0]
    words = ShapeWords(True, True, False)
    assert [level.units for level in words.levels(shape, "down", 1)] == [172, 128, 88, 44]
    assert [tuple(level) for level in words.levels(shape, "o", 2)] == [
        *((4, 0), (4, 1), (3, 0), (3, 1), (2, 0), (2, 1), (1, 0), (1, 1)),
        (0, 0),
    ]
    assert ShapeWords(False, False, True).levels(shape, "down", 1)[-1].units == 0


@pytest.mark.parametrize("allocate", SEARCHES)
def test_a_search_of_shapes_fits_bytes_and_beats_equal_shares(
    source,  # noqa: F811
    tmp_path,
    allocate,
):
    search = search_of(source, tmp_path / "out", "bytes=600KB", allocate=allocate)
    found = search.find(texts(source))
    assert found.loss <= found.uniform
    assert "shape:" in str(found.recipe)
    job = CompressionJob(source, tmp_path / "out", found.recipe)
    assert job.run(texts(source)).total <= 600_000
    search.finish()
    assert loss(source, load(tmp_path / "out")) < 0.2


def test_a_search_of_shapes_and_bits_fits_a_time_and_is_repeated_from_its_file(
    source,  # noqa: F811
    tmp_path,
):
    search = search_of(source, tmp_path / "out", "tokens/s=4x", f"{SHAPES}|rtn:bits=8,group=32")
    found = search.find(texts(source))
    assert "a token takes" in found.note
    CompressionJob(source, tmp_path / "out", found.recipe).run(texts(source))
    made = load(tmp_path / "out")
    assert made.weights.nbytes() < source.weights.nbytes() / 2
    file = tmp_path / "recipe.toml"
    file.write_text(found.toml)
    CompressionJob(source, tmp_path / "again", parse_recipe(str(file))).run(texts(source))
    again = load(tmp_path / "again")
    for name in made.weights:
        assert np.array_equal(made.weights.dense(name), again.weights.dense(name)), name


def test_times_are_measured_once_and_kept(source, tmp_path, monkeypatch):  # noqa: F811
    calls = []

    def seconds(engine):
        calls.append(engine.config)
        return 1e-9 * engine.weight_bytes

    monkeypatch.setattr(latency, "_pass_seconds", seconds)
    prefix, shape = "layers.0.", source.config.layers[0]
    layer = {
        name.removeprefix(prefix): source.weights.dense(name)
        for name in source.weights
        if name.startswith(prefix)
    }
    table = LatencyTable(source.config, shape, layer, 1, tmp_path / "times")
    weights = sum(each.size for each in layer.values() if each.ndim == 2)
    found = table.seconds(shape, layer, "plain")
    assert found == pytest.approx(4e-9 * weights, rel=0.2)
    assert table.seconds(shape, layer, "plain") == found
    assert len(calls) == 2
    assert table.seconds(shape, {}, "gone") == 0
    [file] = (tmp_path / "times").iterdir()
    assert json.loads(file.read_text())["seconds"] == found


def test_a_pass_takes_time(source, monkeypatch):  # noqa: F811
    monkeypatch.undo()
    from paceline.engines.native import NativeEngine

    engine = NativeEngine(source.config, source.weights, 1, "auto")
    assert 0 < latency._pass_seconds(engine) < 60


class StoppedError(BaseException):
    pass


def test_an_interrupted_search_of_shapes_goes_on(source, tmp_path, monkeypatch):  # noqa: F811
    whole = search_of(source, tmp_path / "whole", "bytes=600KB").find(texts(source))
    judge, calls = LevelLoss.__call__, []

    def stops(self, allocation, tokens):
        calls.append(allocation)
        if len(calls) == 4:
            raise StoppedError
        return judge(self, allocation, tokens)

    monkeypatch.setattr(LevelLoss, "__call__", stops)
    with pytest.raises(StoppedError):
        search_of(source, tmp_path / "out", "bytes=600KB").find(texts(source))
    monkeypatch.setattr(ModuleStore, "_build_module", None)  # forms are there
    again = search_of(source, tmp_path / "out", "bytes=600KB").find(texts(source))
    assert again == whole


def test_whole_modules_lose_nothing_and_levels_are_loaded_both_ways(source, tmp_path):  # noqa: F811
    search = search_of(source, tmp_path / "out", "bytes=600KB")
    search.find(texts(source))
    base = search._base(texts(source), search._outer())
    store = ModuleStore(search.search_path, base, search.words, search.levels)
    units = modules(source.config)

    def fresh():
        return ModuleLoss(base, store.dense, units, store.levels)

    one, zeros = fresh(), (0,) * len(units)
    assert one(zeros, 40) == pytest.approx(0, abs=1e-5)
    draws = np.random.default_rng(0)
    for _ in range(3):
        levels = tuple(int(draws.integers(len(store.levels(*unit)))) for unit in units)
        assert one(levels, 80) == pytest.approx(fresh()(levels, 80), rel=1e-3, abs=1e-5)
    assert one(zeros, 80) == pytest.approx(0, abs=1e-5)
    with torch.no_grad():
        assert one.after_training(levels, 80) < 2 * one(levels, 240)


def test_searches_that_cannot_be_are_refused(source, tmp_path):  # noqa: F811
    with pytest.raises(RequestError, match=r"embedding and head alone take .* ask for less"):
        search_of(source, tmp_path / "out", "tokens/s=1000x").find(texts(source))
    with pytest.raises(MethodError, match="looks at gradients of whole matrices"):
        search_of(source, tmp_path / "out", "bytes=1MB", "narrow|squeezellm:bits=3")
    with pytest.raises(MethodError, match="has one level"):
        search_of(source, tmp_path / "out", "tokens/s=1.5x", "keep")


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("shape", "has no sizes"),
        ("shape:mlp=a", "expected whole numbers"),
        ("shape:mlp=3/4", "has 2 numbers, expected one, or 5"),
        ("shape:heads=9/4/4/4/4", "is 9 in layer 0, which has 4"),
        ("shape:heads=0", "leaves no layer with attention"),
    ],
)
def test_shapes_that_cannot_be_are_refused(source, tmp_path, spec, words):  # noqa: F811
    with pytest.raises(MethodError, match=words):
        CompressionJob(source, tmp_path / "out", parse_recipe(spec)).run(texts(source))


def test_a_shape_is_what_it_says(source, tmp_path):  # noqa: F811
    spec = "shape:mlp=172/88/0/44/0,heads=4/0/2/3/0"
    CompressionJob(source, tmp_path / "out", parse_recipe(spec)).run(texts(source))
    layers = load(tmp_path / "out").config.layers
    assert [(each.intermediate, each.kv_heads) for each in layers] == [
        *((172, 4), (88, 0), (0, 2), (44, 3)),
    ]

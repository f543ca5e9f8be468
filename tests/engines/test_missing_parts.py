"""Layers without attention or MLP: both engines skip what is gone, and all else works with them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

import tiny
from paceline.core import TokenTree
from paceline.engines.base import View
from paceline.engines.native import NativeEngine
from paceline.engines.reference import ReferenceEngine
from paceline.engines.static import StaticEngine
from paceline.errors import ModelError
from paceline.kvcache.base import parse_policy
from paceline.models import load
from paceline.models.config import LayerConfig
from paceline.models.tensor_names import has_part
from paceline.registry import patterns

# Layers without attention, and without MLP, of tiny models with three layers and more.
CASES = (((0,), ()), ((), (0,)), ((1,), (1,)), ((0, 2), (1,)), ((2,), (2,)))
FAMILIES = ("llama-gqa-tied-bias", "gpt_neox", "gemma3_text", "olmo2", "falcon-new-one-norm")


def without(model, attention=(), mlp=()):
    """Return the shape and the arrays of a model that lacks parts of some layers."""
    layers = list(model.config.layers)
    for index in attention:
        layers[index] = replace(layers[index], heads=0, kv_heads=0)
    for index in mlp:
        layers[index] = replace(layers[index], intermediate=0)
    kept = {}
    for name, each in model.weights.to_arrays().items():
        prefix, _, rest = name.partition(".")
        index, _, part = rest.partition(".")
        if prefix != "layers" or has_part(layers[int(index)], part):
            kept[name] = each
    return replace(model.config, layers=tuple(layers), context=256), kept


def logits(engine, ids, chunk=9):
    rows = []
    engine.release(engine.start(ids, lambda _, __, found: rows.append(found.copy()), chunk))
    return np.concatenate(rows)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    known = {}

    def get(name):
        if name not in known:
            folder = tmp_path_factory.mktemp(name)
            tiny.save(name, folder)
            known[name] = load(folder)
        return known[name]

    return get


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("case", CASES)
def test_both_engines_skip_what_is_gone(models, name, case):
    model = models(name)
    count = len(model.config.layers)
    attention, mlp = ([index % count for index in part] for part in case)
    config, arrays = without(model, attention, mlp)
    ids = tiny.tokens(21)
    native, reference = NativeEngine(config, arrays), ReferenceEngine(config, arrays)
    one, other = logits(native, ids), logits(reference, ids)
    np.testing.assert_allclose(one, other, atol=2e-4, rtol=0)
    whole = logits(ReferenceEngine(model.config, model.weights), ids)
    assert not (attention or mlp) or np.abs(whole - other).max() > 1e-3


@pytest.fixture(scope="module")
def partial_model(models):
    return without(models("llama-gqa-tied-bias"), (0,), (1,))


def test_a_tree_is_its_branches_and_views_and_exits_agree(partial_model):
    config, arrays = partial_model
    native, reference = NativeEngine(config, arrays), ReferenceEngine(config, arrays)
    tree = TokenTree(
        tiny.tokens(6, seed=3),
        np.array([-1, 0, 0, 1, 2, 4], np.int32),
        np.ones(6, np.float32),
        np.zeros(6, np.int16),
    )
    views = [
        None,
        View(layers=np.array([0], np.int32)),
        View(layers=np.arange(1, len(config.layers), dtype=np.int32)),
        View(exits=np.array([1], np.int32)),
        View(positions=np.array([0, 3, 7], np.int32)),
    ]
    for view in views:
        found = []
        for engine in (native, reference):
            sequence = engine.start(tiny.tokens(12), chunk=5)
            found.append(np.array(engine.forward([(sequence, tree)], view=view)))
        np.testing.assert_allclose(*found, atol=2e-4, rtol=0)


@pytest.mark.parametrize("kv_format", ["fp16", "int8", "int4"])
def test_chunks_and_forks_change_nothing_in_any_cache(partial_model, kv_format):
    config, arrays = partial_model
    engine = NativeEngine(config, arrays, kv_format=kv_format)
    ids = tiny.tokens(90)
    tree = TokenTree.chain(tiny.tokens(3, seed=5))
    rows = []
    for chunk in (90, 32, 7):
        sequence = engine.start(ids, chunk=chunk)
        fork = engine.fork(sequence)
        both = engine.forward([(sequence, tree), (fork, tree)])
        assert np.array_equal(both[:3], both[3:])
        rows.append(both[:3].copy())
    assert np.array_equal(rows[0], rows[1])
    assert np.array_equal(rows[0], rows[2])
    keys, values = engine.keys_values(sequence, 0)
    assert keys.shape == values.shape == (0, 90, config.layers[0].head_dim)


def test_a_layer_without_attention_takes_no_memory_of_the_cache(models, partial_model):
    whole = models("llama-gqa-tied-bias")
    count = len(whole.config.layers)
    for make in (NativeEngine, ReferenceEngine):
        full = make(whole.config, whole.weights.to_arrays()).memory.page_bytes
        assert make(*partial_model).memory.page_bytes == full * (count - 1) // count


POLICIES = (
    "h2o:budget=24,recent=8,every=8",
    "snapkv:budget=24,recent=8,every=8,pool=3",
    "light_transfer:budget=24,sinks=2,every=8,window=8",
    "retrieval_heads:budget=24,recent=8,every=8,window=16",
    "fastgen:budget=24,every=8,sinks=2,window=8,recovery=0.7",
    "adakv:budget=24,recent=8,every=8,of=keydiff",
)


@pytest.mark.parametrize("spec", POLICIES)
def test_policies_act_on_the_layers_with_attention_alike(partial_model, spec):
    policy = parse_policy(spec)
    found = []
    for make in (NativeEngine, ReferenceEngine):
        engine = make(*partial_model)
        policy.check(engine)
        sequence = engine.open()
        policy.begin(engine, sequence)
        ids = tiny.tokens(64)
        for start in range(0, 64, 8):
            engine.extend(sequence, ids[start : start + 8])
            policy.act(engine, sequence)
        assert engine.rows(sequence, 0).shape[0] == 0
        assert policy.max_rows(64) == 64 or engine.row_count(sequence) <= 24
        engine.extend(sequence, ids[:8])  # behind an eviction
        tree = TokenTree.chain(tiny.tokens(2, seed=7))
        found.append(np.array(engine.forward([(sequence, tree)])))
    np.testing.assert_allclose(*found, atol=2e-3, rtol=0)


def test_patterns_and_the_static_engine_run(partial_model):
    config, arrays = partial_model
    ids = tiny.tokens(40)
    expected = logits(ReferenceEngine(config, arrays), ids)
    static = StaticEngine(config, arrays)
    np.testing.assert_allclose(logits(static, ids), expected, atol=2e-4, rtol=0)
    for spec in ("quest:least=16,local=16", "lserve:least=16,local=16"):
        pattern = patterns.parse(spec)
        made = [make(config, arrays, pattern=pattern) for make in (NativeEngine, ReferenceEngine)]
        one, other = (logits(engine, ids) for engine in made)
        np.testing.assert_allclose(one, other, atol=2e-3, rtol=0)


def test_shapes_that_cannot_be_are_refused(models):
    config = models("llama-gqa-tied-bias").config
    layer = config.layers[0]
    with pytest.raises(ModelError, match="kv_heads is 0"):
        replace(layer, kv_heads=0)
    with pytest.raises(ModelError, match="kv_heads is 2"):
        LayerConfig(0, 2, 8, 16)
    with pytest.raises(ModelError, match="no layer has attention"):
        replace(config, layers=tuple(replace(each, heads=0, kv_heads=0) for each in config.layers))


def test_a_missing_or_unexpected_tensor_is_named(partial_model):
    config, arrays = partial_model
    with pytest.raises(ModelError, match=r"layers\.0\.up"):
        NativeEngine(config, {name: a for name, a in arrays.items() if name != "layers.0.up"})
    extra = {"layers.0.o": np.zeros((config.hidden_size, config.hidden_size), np.float32)}
    with pytest.raises(ModelError, match=r"layers\.0\.o"):
        NativeEngine(config, arrays | extra)

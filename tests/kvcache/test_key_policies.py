"""Policies that read keys and queries: what engines give them, and scores beside kvpress's."""

from __future__ import annotations

import sys
import types
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tiny
from paceline import _native
from paceline.abilities import Ability
from paceline.engines import open_engine
from paceline.engines.kv_formats import GROUPED_KV
from paceline.engines.native import KV_FORMATS
from paceline.engines.reference import ReferenceEngine
from paceline.errors import MethodError, RequestError
from paceline.kvcache.base import LayerCache, LayerCaches, parse_policy
from paceline.kvcache.snapkv import smoothed
from paceline.models import load
from tests.engines.test_attention import CONFIG, ROUND, WEIGHTS
from tests.engines.test_attention import native as open_native
from tests.engines.test_eviction import ENGINES, LAYERS, reference, some_rows
from tests.engines.test_native import path_to, trees

WINDOW = 20


def tracked(engine, tokens, chunk=64):
    sequence = engine.open()
    engine.track_queries(sequence, WINDOW)
    engine.extend(sequence, tokens, chunk=chunk)
    return sequence


@pytest.mark.parametrize("kind", KV_FORMATS)
def test_keys_values_and_queries_are_those_of_the_reference(kind: str) -> None:
    grouped = kind in GROUPED_KV
    other = ReferenceEngine(CONFIG, WEIGHTS, kv_format=kind) if grouped else reference()
    engine = open_native(kind, threads=2)
    tokens = tiny.tokens(150, 0)
    ours, theirs = tracked(engine, tokens), tracked(other, tokens)
    for index, layer in enumerate(CONFIG.layers):
        keys, values = engine.keys_values(ours, index)
        assert keys.shape == values.shape == (layer.kv_heads, 150, layer.head_dim)
        queries = engine.recent_queries(ours, index)
        assert queries.shape == (layer.heads, WINDOW, layer.head_dim)
        if index and kind != "fp32":
            continue  # later layers see what earlier ones have rounded
        expected = other.keys_values(theirs, index)
        for own, true in zip((keys, values), expected, strict=True):
            if not grouped:
                true = ROUND[kind](torch.tensor(true)).numpy()
            apart = np.abs(own - true)
            assert np.median(apart) < 1e-4
            # Where a number lies between two steps, rounding may take either.
            assert apart.max() < 1e-3 or (grouped and (apart > 1e-3).mean() < 0.01)
        np.testing.assert_allclose(queries, other.recent_queries(theirs, index), atol=1e-3)


@settings(max_examples=10, deadline=None)
@given(data=st.data())
def test_queries_do_not_depend_on_chunks_trees_forks_threads_or_evictions(data) -> None:
    isa = data.draw(st.sampled_from(_native.isas()))
    create = data.draw(st.sampled_from((reference, None)))
    engines = [
        create() if create else open_native("fp32", isa=isa, threads=threads) for threads in (1, 3)
    ]
    seed = data.draw(st.integers(0, 1000))
    chunks = [data.draw(st.sampled_from((1, 7, 64, 256))) for _ in engines]
    more = tiny.tokens(data.draw(st.integers(1, 100)), seed)
    tree = data.draw(trees(12))
    path = path_to(tree, len(tree) - 1)
    sequences = []
    for engine, chunk in zip(engines, chunks, strict=True):
        sequence = tracked(engine, more, chunk)
        kept = some_rows(engine, sequence, np.random.default_rng(seed), 0.7)
        engine.evict(sequence, kept)
        sequences.append(sequence)
    engines[0].forward([(sequences[0], tree)])
    engines[0].commit(sequences[0], path)
    sequences[1] = engines[1].fork(sequences[1])
    engines[1].extend(sequences[1], tree.tokens[path], chunk=1)
    for index in LAYERS:
        one, other = (
            (engine.recent_queries(sequence, index), *engine.keys_values(sequence, index))
            for engine, sequence in zip(engines, sequences, strict=True)
        )
        for a, b in zip(one, other, strict=True):
            if create:
                np.testing.assert_allclose(a, b, atol=1e-4)
            else:
                np.testing.assert_array_equal(a, b)


@ENGINES
def test_what_tracking_queries_refuses(create) -> None:
    engine = create()
    assert {Ability.KEYS, Ability.QUERIES} <= engine.abilities
    sequence = engine.open()
    with pytest.raises(RequestError, match="does not track queries"):
        engine.recent_queries(sequence, 0)
    for window in (0, CONFIG.context + 1):
        with pytest.raises(RequestError, match=f"window of queries is {window}, expected 1 to"):
            engine.track_queries(sequence, window)
    engine.extend(sequence, tiny.tokens(9, 0))
    with pytest.raises(RequestError, match="from the first position on"):
        engine.track_queries(sequence, 4)
    sequence = tracked(engine, tiny.tokens(30, 0))
    with pytest.raises(RequestError, match="queries of earlier"):
        engine.truncate(sequence, 29)
    engine.truncate(sequence, 0)
    assert engine.recent_queries(sequence, 0).shape[1] == 0
    engine.extend(sequence, tiny.tokens(3, 0))
    assert engine.recent_queries(sequence, 0).shape[1] == 3


def layer_cache(policy, engine, tokens, index: int) -> LayerCache:
    sequence = engine.open()
    policy.begin(engine, sequence)
    engine.extend(sequence, tokens)
    return LayerCaches(policy.required, engine, sequence)[index]


def test_settings_that_do_not_go_together_are_refused() -> None:
    for spec, message in (
        ("snapkv:pool=4", "snapkv:pool is 4, expected an odd number"),
        ("snapkv:recent=0", "recent"),
        ("expected_attention:window=1", "window"),
        ("expected_attention:epsilon=2", "epsilon"),
        ("random:seed=-1", "seed"),
    ):
        with pytest.raises(MethodError, match=message):
            parse_policy(spec)


def test_queries_that_are_normed_behind_their_rotation_are_refused() -> None:
    engine = reference()
    policy = parse_policy("expected_attention")
    policy.check(engine)
    engine.config = replace(engine.config, qk_norm="rotated")
    with pytest.raises(MethodError, match="takes back the rotation of queries"):
        policy.check(engine)
    parse_policy("keydiff").check(engine)


def test_a_draw_depends_on_its_row_alone() -> None:
    policy = parse_policy("random:budget=4,recent=0,sinks=0")
    positions = np.arange(30, dtype=np.int32)[None].repeat(2, 0)
    whole = policy.score(LayerCache(3, 4, 30, positions))
    part = policy.score(LayerCache(3, 4, 30, positions[:, ::3]))
    np.testing.assert_array_equal(part, whole[:, ::3])
    assert (whole[0] != whole[1]).all()
    assert (policy.score(LayerCache(2, 4, 30, positions)) != whole).all()


def test_means_over_neighbours_are_those_of_torch() -> None:
    values = np.random.default_rng(0).random((3, 17))
    for size in (1, 3, 5, 21):
        expected = torch.nn.functional.avg_pool1d(
            torch.tensor(values), size, stride=1, padding=size // 2
        )
        np.testing.assert_allclose(smoothed(values, size), expected, atol=1e-12)


@pytest.fixture(scope="module")
def kvpress():
    for name in ("datasets", "fire"):  # which it imports, and scores do not need
        if name not in sys.modules:
            stub = types.ModuleType(name)
            stub.load_dataset = stub.Fire = None
            sys.modules[name] = stub
    try:
        return pytest.importorskip("kvpress", reason="kvpress is not installed")
    finally:
        for name in ("datasets", "fire"):
            if getattr(sys.modules.get(name), "__file__", None) is None:
                sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A model of transformers with random weights, and its folder."""
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
        max_position_embeddings=512,
        attn_implementation="eager",
    )
    model = transformers.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:
                weight.mul_(8)  # so that attention is not flat
    folder = tmp_path_factory.mktemp("llama")
    model.save_pretrained(folder)
    return model, folder


PRESSES = {
    "knorm": ("KnormPress", {}, slice(None)),
    "keydiff": ("KeyDiffPress", {}, slice(None)),
    "tova": ("TOVAPress", {}, slice(-1)),
    "snapkv:recent=32,pool=5": ("SnapKVPress", {"window_size": 32}, slice(-32)),
    "expected_attention:window=4096,sinks=4,epsilon=0": (
        "ExpectedAttentionPress",
        {},
        slice(4, None),
    ),
    "expected_attention:window=4096,sinks=4,epsilon=0.02": (
        "ExpectedAttentionPress",
        {"epsilon": 0.02},
        slice(4, None),
    ),
}


@pytest.mark.parametrize("engine", ["native", "reference"])
@pytest.mark.parametrize("spec", PRESSES)
def test_scores_are_those_of_kvpress(kvpress, llama, spec: str, engine: str) -> None:
    """All that kvpress scores; it pads what it always keeps with the largest score."""
    name, options, compared = PRESSES[spec]
    model, folder = llama
    press = getattr(kvpress, name)(compression_ratio=0.5, **options)
    tokens = np.random.default_rng(1).integers(0, 64, 180).astype(np.int32)
    recorded = []

    def record(module, _, kwargs, output):
        cached = kwargs["past_key_values"].layers[module.layer_idx]
        hidden = kwargs["hidden_states"]
        recorded.append(press.score(module, hidden, cached.keys, cached.values, None, kwargs))

    hooks = [
        layer.self_attn.register_forward_hook(record, with_kwargs=True)
        for layer in model.model.layers
    ]
    for layer in model.model.layers:  # where presses look for it
        layer.self_attn.rotary_emb = model.model.rotary_emb
    with torch.no_grad():
        model(torch.tensor(tokens.astype(np.int64))[None], use_cache=True)
    for hook in hooks:
        hook.remove()
    policy = parse_policy(spec)
    opened = open_engine(load(folder), engine, weight_format="fp32")
    assert len(recorded) == 2
    for index, theirs in enumerate(recorded):
        ours = policy.score(layer_cache(policy, opened, tokens, index))[:, compared]
        expected = theirs[0].numpy()[:, compared]
        np.testing.assert_allclose(ours, expected, atol=1e-4 * np.abs(expected).max())

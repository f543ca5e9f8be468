"""Layers that share matrices: what is stored and held once, in both engines, and what trains it."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
import torch

from paceline import _native
from paceline.compress.base import MATRICES
from paceline.engines.native import NativeEngine
from paceline.engines.native_weights import SharedWeights
from paceline.engines.reference import ReferenceEngine
from paceline.errors import MethodError, ModelError
from paceline.lm import LM
from paceline.models import load
from paceline.models.export.safetensors import SafetensorsExport
from paceline.models.formats.shared_layers import read_shared
from tests.compress.test_structure import compress, source, whole_model  # noqa: F401

IDS = np.arange(5, 60, dtype=np.int32)


def logits(engine):
    found = []
    engine.start(IDS, lambda _, __, rows: found.append(rows.copy()))
    return np.concatenate(found)


def layers(model):
    """Return the layers that share matrices, each with the one whose it has."""
    settings = json.loads((model.path / "config.json").read_text())
    shared = settings["quantization_config"]["shared_layers"]
    return {int(layer): other for layer, other in shared.items()}


def matrix_bytes(model, layer):
    return sum(
        model.weights.stored(f"layers.{layer}.{name}").nbytes
        for name in MATRICES
        if f"layers.{layer}.{name}" in model.weights
    )


@pytest.mark.parametrize("more", ["", "+rtn:bits=8,group=32", "+gptq:bits=4,group=32"])
def test_shared_matrices_are_stored_and_held_once(source, tmp_path, monkeypatch, more):  # noqa: F811
    model, notes = compress(source, tmp_path / "out", f"fold:count=2,tokens=0{more}")
    shared = layers(model)
    assert len(shared) == 2
    assert "shares the matrices of layers" in notes[0]
    for layer, other in shared.items():
        for name in ("q", "o", "down"):
            one, two = (model.weights.dense(f"layers.{at}.{name}") for at in (layer, other))
            assert np.array_equal(one, two)
        norm = f"layers.{layer}.attn_norm"
        assert np.array_equal(model.weights.dense(norm), source.weights.dense(norm))
    once = sum(matrix_bytes(model, layer) for layer in range(5) if layer not in shared)
    vectors = sum(
        model.weights.dense(name).nbytes
        for name in model.weights
        if model.weights.dense(name).ndim == 1
    )
    assert model.weights.nbytes() == once + vectors + model.weights.stored("embed").nbytes
    engine = NativeEngine(model.config, model.weights, threads=1, format="auto")
    found = logits(engine)
    assert engine.shared_bytes > 0.9 * (engine.weight_bytes - engine.shared_bytes) / 5
    monkeypatch.setattr(SharedWeights, "share", lambda *_: False)
    apart = NativeEngine(model.config, model.weights, threads=1, format="auto")
    assert apart.shared_bytes == 0
    assert np.array_equal(found, logits(apart))
    reference = logits(ReferenceEngine(model.config, model.weights))
    assert np.abs(found - reference).max() < 0.02 * np.abs(reference).max()


@pytest.mark.parametrize("more", ["", "+rtn:bits=4,group=32"])
def test_products_of_low_rank_tell_shared_layers_apart(source, tmp_path, monkeypatch, more):  # noqa: F811
    model, _ = compress(source, tmp_path / "out", f"flexigpt:count=2,rank=8,tokens=0{more}")
    for layer, other in layers(model).items():
        for name in ("q", "v", "gate", "down"):
            one, two, right = (
                each.weights.dense(f"layers.{at}.{name}")
                for each, at in ((model, layer), (model, other), (source, layer))
            )
            assert np.linalg.matrix_rank(one - two, tol=1e-3) <= 8
            assert np.linalg.norm(one - right) < np.linalg.norm(two - right)
    engine = NativeEngine(model.config, model.weights, threads=1, format="auto")
    assert engine.shared_bytes > 0
    reference = ReferenceEngine(model.config, model.weights)
    dense = ReferenceEngine(model.config, model.weights.to_arrays())
    one, other, naive = (logits(each) for each in (engine, reference, dense))
    assert np.abs(other - naive).max() < 1e-3 * np.abs(naive).max()
    assert np.abs(one - naive).max() < 0.02 * np.abs(naive).max()


def test_a_product_of_full_rank_gives_a_layer_back(source, tmp_path):  # noqa: F811
    model, [note] = compress(source, tmp_path / "out", "flexigpt:count=1,rank=4096,tokens=0")
    for name in source.weights:
        old, new = source.weights.dense(name), model.weights.dense(name)
        assert np.abs(old - new).max() <= 0.02 * np.abs(old).max(), name
    assert "Nothing was trained" in note


@pytest.mark.parametrize("recipe", ["fold:count=2", "flexigpt:count=2,rank=8"])
def test_training_brings_shared_layers_back(source, tmp_path, recipe):  # noqa: F811
    model, [note] = compress(source, tmp_path / "out", f"{recipe},tokens=4000,rows=2")
    before, after = map(float, re.findall(r"\d\.\d{4}", note))
    assert after < 0.8 * before
    for layer, other in layers(model).items():
        term = model.weights.shared_term(f"layers.{layer}.o")
        assert (term is None) == recipe.startswith("fold")
        assert model.weights.shared_with(f"layers.{layer}.o") == f"layers.{other}.o"
        norm = f"layers.{layer}.mlp_norm"
        assert not np.array_equal(model.weights.dense(norm), source.weights.dense(norm))


def test_other_ways_to_run_and_write_them(source, tmp_path):  # noqa: F811
    model, _ = compress(source, tmp_path / "out", "flexigpt:count=2,rank=8,tokens=0")
    SafetensorsExport(model, "fp32").write(tmp_path / "whole")
    whole = load(tmp_path / "whole")
    told = []
    for path, options in (
        (model.path, {"threads": 1}),
        (model.path, {"engine": "reference"}),
        (whole.path, {"threads": 1}),
        (model.path, {"threads": 1, "format": "fp32"}),
        (model.path, {"threads": 1, "weights_memory": 700_000}),
    ):
        with LM(path, **options) as lm:
            told.append(list(lm.generate("Once", max_new_tokens=24, temperature=0).tokens))
    assert all(each == told[0] for each in told[1:])


def test_what_would_end_the_sharing_is_refused(source, tmp_path):  # noqa: F811
    for more in ("recover", "awq+rtn", "layer_drop:count=1", "rtn:bits=4+block_ap"):
        with pytest.raises(MethodError, match="layers share them behind fold"):
            compress(source, tmp_path / "out", f"fold:count=1+{more}")
    with pytest.raises(MethodError, match=r"count is 5, and only \d layers"):
        compress(source, tmp_path / "out", "fold:count=5,tokens=0")


@pytest.mark.parametrize(
    "entry",
    [3, None, [], {"x": 0}, {"1": 1}, {"1": 2}, {"1": -1}, {"1": True}, {"1": 0, "2": 1}, {"²": 0}],
)
def test_entries_that_name_no_layers_are_refused(entry):
    with pytest.raises(ModelError, match="expected layers, each with an earlier one"):
        read_shared(entry)


def test_entries_that_do_not_fit_the_model_are_refused(source, tmp_path):  # noqa: F811
    model, _ = compress(source, tmp_path / "out", "fold:count=1,tokens=0")
    file = model.path / "config.json"
    settings = json.loads(file.read_text())
    [(layer, other)] = layers(model).items()
    for entry, message in (
        ({}, "lacks tensor"),
        ({str(layer): other, "99": 0}, "which it does not have"),
        (
            {str(layer): other, next(str(at) for at in (4, 3, 2) if at not in (layer, other)): 0},
            "shares",
        ),
    ):
        settings["quantization_config"]["shared_layers"] = entry
        file.write_text(json.dumps(settings))
        with pytest.raises(ModelError, match=message):
            load(model.path)


def test_native_models_share_what_fits_alone(source):  # noqa: F811
    engine = native_model(source)
    whole = {name: source.weights.dense(name) for name in source.weights}
    q = [whole[f"layers.1.{name}"] for name in "qkv"]
    with pytest.raises(ValueError, match="shared before the other one is stored"):
        engine.share("layers.2.q", "layers.1.q")
    engine = native_model(source)
    for name, values in zip("qkv", q, strict=True):
        engine.set(f"layers.1.{name}", values)
    for one, other in (
        ("layers.1.q", "layers.1.q"),
        ("layers.2.q", "layers.1.k"),
        ("layers.2.q", "embed"),
        ("embed", "layers.1.q"),
        ("layers.2.attn_norm", "layers.1.q"),
        ("layers.9.q", "layers.1.q"),
    ):
        with pytest.raises(ValueError, match="weight"):
            engine.share(one, other)
    engine.share("layers.2.q", "layers.1.q")
    assert np.array_equal(engine.get("layers.2.v"), engine.get("layers.1.v"))
    with pytest.raises(ValueError, match="has been shared before"):
        engine.set("layers.2.k", q[1])
    with pytest.raises(ValueError, match="too late to choose a format"):
        engine.share("layers.2.q", "layers.1.q")
    assert np.array_equal(engine.get("layers.1.k"), q[1])


def native_model(model):
    """Return a native model of the shape of another, without weights."""
    return _native.NativeModel(model.config, "fp32", "fp32", "fp32", "", 1)


def test_gradients_of_shared_matrices_are_those_of_the_naive_form(source):  # noqa: F811
    from paceline.compress.reconstruct.recovery import Recovery, TrainedLayer
    from paceline.compress.structure.sharing.borrowing import BorrowingLayer

    model = whole_model(source)
    before = [dict(model.layer(index)) for index in range(len(model.config.layers))]
    owners = [TrainedLayer(each, "all", 1, None) for each in before]
    terms = {"o": (torch.randn(64, 2) * 0.1, torch.randn(2, 64) * 0.1)}
    borrowing = BorrowingLayer(before[2], owners[1], terms)
    trained = [*owners[:2], borrowing, *owners[3:]]
    recovery = Recovery(model, model, trained, 1)
    rows = torch.tensor([0])
    recovery._backwards(rows)
    gradient = owners[1].trained["down"].grad
    weights = [dict(each) for each in before]
    weights[2] |= {name: before[1][name] for name in MATRICES}
    weights[2]["o"] = before[1]["o"] + terms["o"][0] @ terms["o"][1]
    step = 1e-3 * gradient / gradient.norm()
    texts, losses = model.texts[rows], []
    right = recovery._teach(texts)[:, recovery.split.trained_positions]
    for sign in (1, -1):
        for at in (1, 2):
            weights[at]["down"] = before[1]["down"] + sign * step
        with torch.no_grad():
            x = recovery._states(texts, weights)[:, recovery.split.trained_positions]
            losses.append(recovery._divergence(right, x))
    assert (losses[0] - losses[1]) / 2e-3 == pytest.approx(float(gradient.norm()), rel=0.05)

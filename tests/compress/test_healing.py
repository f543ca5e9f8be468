"""PERP behind pruners, uneven pruning of MLPs, and models whose hidden size got smaller."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from paceline.compress.job import CompressionJob
from paceline.compress.recipe import parse_recipe, parse_steps
from paceline.errors import MethodError
from paceline.lm import LM
from paceline.models import load
from paceline.models.export.safetensors import SafetensorsExport
from tests.compress.interruption import run_again
from tests.compress.test_structure import (  # noqa: F401
    changed,
    compress,
    loss,
    settings,
    source,
    texts,
    whole_model,
)


def zeros(model):
    """Return which weights of each matrix are zero."""
    return {
        name: model.weights.dense(name) == 0
        for name in model.weights
        if name.startswith("layers.") and model.weights.dense(name).ndim == 2
    }


@pytest.mark.parametrize(
    ("recipe", "parameters"),
    [
        ("wanda:sparsity=0.6", "norms"),
        ("wanda:sparsity=0.6", "masked"),
        ("magnitude:pattern=2:4", "masked"),
        ("wanda+rtn:bits=4,group=32", "norms"),
        ("layer_drop:count=1+rtn:bits=4,group=32", "norms"),
    ],
)
def test_perp_comes_closer_and_keeps_the_zeros(source, tmp_path, recipe, parameters):  # noqa: F811
    before, _ = compress(source, tmp_path / "before", recipe)
    trained = f"{recipe}+perp:tokens=2000,rank=4,parameters={parameters}"
    after, _ = compress(source, tmp_path / "after", trained)
    assert loss(source, after) < 0.9 * loss(source, before)
    gone = zeros(before)
    for name, kept in zeros(after).items():
        assert kept[gone[name]].all(), name
    moved = {
        name.rpartition(".")[2]
        for name in after.weights
        if not np.array_equal(before.weights.dense(name), after.weights.dense(name))
    }
    norms = {"attn_norm", "mlp_norm"}
    assert moved == norms if parameters == "norms" else moved > norms
    assert after.weights.nbytes() == before.weights.nbytes()


def test_perp_that_is_interrupted_ends_as_if_it_were_not(
    source,  # noqa: F811
    tmp_path,
    monkeypatch,
):
    recipe = "wanda+perp:tokens=800,parameters=masked,rank=2"
    whole, _ = compress(source, tmp_path / "whole", recipe)
    (again, _), steps = run_again(monkeypatch, lambda: compress(source, tmp_path / "again", recipe))
    assert steps == 6 + 10 - 5
    for name in whole.weights:
        assert np.array_equal(whole.weights.dense(name), again.weights.dense(name)), name


def test_perp_that_cannot_be_is_refused(source, tmp_path):  # noqa: F811
    with pytest.raises(MethodError, match="trains matrices with zeros"):
        compress(source, tmp_path / "out", "rtn:bits=4,group=32+perp:parameters=masked")
    with pytest.raises(MethodError, match="expected norms, masked"):
        parse_steps("wanda+perp:parameters=all")


def test_heavy_hitters_keep_more(source):  # noqa: F811
    model = whole_model(source)
    weights, inputs = model.layer(1), {}
    x = model.run(0, model.embed(model.texts))
    model.run(1, x, lambda name, seen: inputs.setdefault(name, seen))
    from paceline.compress.base import Statistic, Statistics

    wanted = frozenset({Statistic.INPUT_NORM})
    own = {name: weights[name] for name in ("gate", "up", "down", "q")}
    stats = {name: Statistics().plus(inputs[name], wanted) for name in ("gate", "down", "q")}
    stats["up"] = stats["gate"]
    [method] = parse_steps("ffsplit:sparsity=0.5,heavy=0.25,heavy_sparsity=0.2").compressors
    plans = method.for_block(own, stats)
    norms = stats["down"].input_norm * own["down"].norm(dim=0)
    heavy = norms.argsort(descending=True)[:43]
    for name, each in own.items():
        kept = torch.from_numpy(plans[name].compress(each, stats[name]).mask)
        assert kept.float().mean() == pytest.approx(0.5, abs=0.02)
        if name == "q":
            continue
        part = kept[:, heavy] if name == "down" else kept[heavy]
        assert part.float().mean() == pytest.approx(0.8, abs=0.02)


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("ffsplit:pattern=2:4", "removes as much of every channel"),
        ("ffsplit:sparsity=0.9,heavy=0.5,heavy_sparsity=0", "cannot lose so much"),
    ],
)
def test_splits_that_cannot_be_are_refused(spec, words):
    with pytest.raises(MethodError, match=words):
        parse_steps(spec)


def test_a_rotation_alone_changes_nothing(source, tmp_path):  # noqa: F811
    model, _ = compress(source, tmp_path / "out", "slicegpt:share=0")
    assert model.config.hidden_size == 64
    assert not model.config.tied
    assert abs(loss(source, model)) < 1e-5
    moved = model.weights.dense("layers.0.q") - source.weights.dense("layers.0.q")
    assert np.abs(moved).max() > 0.01


def test_directions_that_hold_nothing_are_deleted_for_nothing(source, tmp_path):  # noqa: F811
    def flatten(tensors):  # eight directions of the stream are never written
        rng = np.random.default_rng(0)
        basis = np.linalg.qr(rng.normal(size=(64, 64)))[0][:, :56].astype(np.float32)
        keep = basis @ basis.T
        for name, each in tensors.items():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                each[:] = keep @ each
            elif name.endswith("embed_tokens.weight"):
                each[:] = each @ keep

    flat = changed(source, tmp_path / "flat", flatten)
    model, notes = compress(flat, tmp_path / "out", "slicegpt:share=0.125,multiple=8")
    assert model.config.hidden_size == 56
    assert "56 of 64 directions of the residual stream, which hold 100.00%" in notes[0]
    assert abs(loss(flat, model)) < 1e-3
    plain, _ = compress(flat, tmp_path / "plain", "slicegpt:share=0.125,multiple=8,rotate=false")
    assert loss(flat, plain) > 10 * abs(loss(flat, model))


def test_slices_of_nothing_are_refused(source, tmp_path):  # noqa: F811
    with pytest.raises(MethodError, match="is no whole multiple of 1024"):
        compress(source, tmp_path / "out", "slicegpt:multiple=1024")


def test_sliced_models_run_everywhere_and_are_sliced_on(source, tmp_path):  # noqa: F811
    recipe = "layer_drop:count=1+slicegpt:share=0.1,multiple=8+recover:tokens=400,rank=2"
    job = CompressionJob(
        source, tmp_path / "out", parse_recipe(f"{recipe}+rtn:bits=8,group=32", "rtn:bits=8")
    )
    job.run(texts(source))
    model = load(tmp_path / "out")
    assert (model.config.hidden_size, len(model.config.layers)) == (56, 4)
    assert model.config.layers[0].head_dim == 8
    with (
        LM(tmp_path / "out", threads=1, drafter="plain", budget=1) as plain,
        LM(tmp_path / "out", threads=1, drafter="blend", budget=6) as drafting,
    ):
        answers = [
            lm.generate("Once", max_new_tokens=20, temperature=0).tokens for lm in (plain, drafting)
        ]
    assert answers[0] == answers[1]
    compress(source, tmp_path / "sliced", "slicegpt:share=0.1,multiple=8")
    SafetensorsExport(load(tmp_path / "sliced")).write(tmp_path / "hf")
    assert settings(tmp_path / "hf")["hidden_size"] == 56
    assert abs(loss(load(tmp_path / "sliced"), load(tmp_path / "hf"))) < 1e-6


def weights_of(model):
    """Return the number of weights of the matrices in the layers."""
    names = (name for name in model.weights if name.startswith("layers."))
    return sum(model.weights.dense(name).size for name in names if "norm" not in name)


def test_training_between_prunings_comes_closer_than_pruning_alone(source, tmp_path):  # noqa: F811
    words = "share=0.3,multiple=4,rank=2,rows=3"
    trained, notes = compress(
        source, tmp_path / "trained", f"efficient_llm:{words},rounds=3,tokens=1500"
    )
    alone, _ = compress(source, tmp_path / "alone", f"efficient_llm:{words},rounds=3,tokens=1")
    assert loss(source, trained) < 0.8 * loss(source, alone)
    for each in (trained, alone):
        assert weights_of(each) == pytest.approx(0.7 * weights_of(source), rel=0.05)
    assert notes[0].count(", ") >= 2
    with pytest.raises(MethodError, match="expected norms, lora, all"):
        parse_steps("efficient_llm:parameters=some")


def test_minitron_takes_the_shape_that_trains_best(source, tmp_path, monkeypatch):  # noqa: F811
    from paceline.compress.structure.minitron import Minitron

    tried = []

    def error(self, made, model, base):
        tried.append(len(made.layers))
        return {5: 0.3, 4: 0.1, 3: 0.2}[len(made.layers)]

    with monkeypatch.context() as patch:
        patch.setattr(Minitron, "_error", error)
        model, notes = compress(source, tmp_path / "out", "minitron:share=0.3,multiple=4,layers=2")
    assert tried == [5, 4, 3]
    assert (
        "took that without 1; after a short training they were 0.3000, 0.1000, 0.2000" in notes[0]
    )
    assert len(model.config.layers) == 4
    assert len({each.intermediate for each in model.config.layers}) == 1
    assert weights_of(model) == pytest.approx(0.7 * weights_of(source), rel=0.05)
    _, notes = compress(source, tmp_path / "real", "minitron:multiple=4,layers=1,tokens=200")
    assert "of shapes without 0 to 1 layers" in notes[0].lower()
    with pytest.raises(MethodError, match="expected fewer than the 5 layers"):
        compress(source, tmp_path / "none", "minitron:layers=5")


@pytest.mark.parametrize("recipe", ["magnitude:sparsity=0.6", "wanda:pattern=2:4"])
def test_trained_masks_come_closer_and_stay_as_sparse(source, tmp_path, recipe):  # noqa: F811
    before, _ = compress(source, tmp_path / "before", recipe)
    after, _ = compress(source, tmp_path / "after", f"{recipe}+pst:steps=40,rank=4")
    assert loss(source, after) < 0.8 * loss(source, before)
    moved = 0
    gone = zeros(before)
    for name, each in zeros(after).items():
        assert np.array_equal(each.sum(1), gone[name].sum(1)), name
        if recipe.endswith("2:4"):
            assert (each.reshape(len(each), -1, 4).sum(-1) == 2).all()
        moved += (each != gone[name]).sum()
    assert moved > 0
    with pytest.raises(MethodError, match="trains the masks of pruned matrices"):
        compress(source, tmp_path / "none", "rtn:bits=4,group=32+pst:steps=1")


def test_the_first_layers_are_trained_into_a_model(source, tmp_path):  # noqa: F811
    model, notes = compress(source, tmp_path / "out", "inheritune:layers=3,tokens=2000")
    alone, _ = compress(source, tmp_path / "alone", "layer_drop:count=2,by=last")
    assert len(model.config.layers) == len(alone.config.layers) == 3
    assert notes[0].startswith("inheritune kept the first 3 of 5 layers. ")
    assert loss(source, model) < 0.8 * loss(source, alone)
    with pytest.raises(MethodError, match="expected fewer than the 5 layers"):
        compress(source, tmp_path / "none", "inheritune:layers=5")

"""Sorted fine-tuning: losses at several depths by the naive form, and what first layers learn."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest
import torch

from paceline import LM
from paceline.compress.recipe import parse_recipe
from paceline.compress.reconstruct.nested import NestedRecovery
from paceline.compress.reconstruct.recovery import TrainedLayer
from paceline.errors import MethodError
from paceline.models import blocks
from tests.compress.interruption import run_again
from tests.compress.test_structure import compress, source, texts, whole_model  # noqa: F401

DEPTHS = (2, 3, 5)


def training(model, parameters="all"):
    before = [dict(model.layer(index)) for index in range(len(model.config.layers))]
    layers = [TrainedLayer(each, parameters, 2, torch.Generator()) for each in before]
    return NestedRecovery(model, model, layers, batch=2, depths=DEPTHS), before


def logits(model, tokens, layers):
    """Return the logits behind some first layers by the naive form."""
    first = replace(model.config, layers=model.config.layers[: len(layers)])
    return blocks.logits(tokens, first, model.outer, layers)


def divergences(model, rows, weights, positions):
    tokens = model.texts[rows]
    layers = [model.layer(index) for index in range(len(model.config.layers))]
    right = logits(model, tokens, layers)[:, positions].log_softmax(-1)
    found = []
    for depth in DEPTHS:
        ours = logits(model, tokens, weights[:depth])[:, positions].log_softmax(-1)
        found.append(float((right.exp() * (right - ours)).sum(-1).mean()))
    return found


def test_losses_and_gradients_are_those_of_the_naive_form(source):  # noqa: F811
    model = whole_model(source)
    nested, before = training(model)
    held = nested.split.held
    expected = divergences(model, held, before, nested.split.held_positions)
    assert nested.errors(before) == pytest.approx(expected, rel=1e-4, abs=1e-5)
    assert expected[-1] == pytest.approx(0, abs=1e-5)
    assert min(expected[:2]) > 0.1

    rows, positions = torch.tensor([0, 1]), nested.split.trained_positions
    made = nested._backwards(rows)
    assert made == pytest.approx(sum(divergences(model, rows, before, positions)), rel=1e-4)
    for index in (0, 2):  # one layer that all depths run, and one that the first does not
        weights = nested.layers[index].trained["down"]
        step = 1e-3 * weights.grad / weights.grad.norm()
        moved, losses = [dict(each) for each in before], []
        for sign in (1, -1):
            moved[index]["down"] = before[index]["down"] + sign * step
            losses.append(sum(divergences(model, rows, moved, positions)))
        slope = (losses[0] - losses[1]) / 2e-3
        assert slope == pytest.approx(float(weights.grad.norm()), rel=0.05)


def test_first_layers_learn_what_all_of_them_predict(source, tmp_path):  # noqa: F811
    _, [note] = compress(source, tmp_path / "out", "sorted:depths=3,tokens=6000,rank=8")
    (depth, old, new), (count, _, whole) = re.findall(r"(\d) layers: (\S+) to ([\d.]+\d)", note)
    assert (depth, count) == ("3", "5")
    assert float(new) < 0.5 * float(old)
    assert float(whole) < 0.3 * float(new) + 0.05
    plain = {"engine": "native", "threads": 1, "budget": 4}
    passes = {}
    for path in (source.path, tmp_path / "out"):
        with LM(path, drafter="plain", **plain) as lm:
            expected = lm.generate("Once upon a time", max_new_tokens=40, ignore_eos=True).tokens
        with LM(path, drafter="layer_skip:skip=3+4", **plain) as lm:
            drafted = lm.generate("Once upon a time", max_new_tokens=40, ignore_eos=True)
        assert drafted.tokens == expected
        passes[path] = drafted.passes
    assert passes[tmp_path / "out"] < passes[source.path]


def test_a_training_that_harms_changes_nothing(source, tmp_path):  # noqa: F811
    model, [note] = compress(source, tmp_path / "out", "sorted:depths=3,tokens=200,rate=1")
    assert note.endswith("so that all stays as it was.")
    for name in source.weights:
        assert np.array_equal(source.weights.dense(name), model.weights.dense(name)), name


def test_an_interrupted_training_goes_on(source, tmp_path, monkeypatch):  # noqa: F811
    recipe = "sorted:depths=3,tokens=800,rank=2"
    whole, _ = compress(source, tmp_path / "whole", recipe)
    (again, _), steps = run_again(monkeypatch, lambda: compress(source, tmp_path / "again", recipe))
    assert steps == 6 + 10 - 5
    for name in whole.weights:
        assert np.array_equal(whole.weights.dense(name), again.weights.dense(name)), name


@pytest.mark.parametrize("depths", ["0", "5", "2+x", "-1", "²"])
def test_depths_that_the_model_does_not_have_are_refused(source, tmp_path, depths):  # noqa: F811
    with pytest.raises(MethodError, match=r"expected numbers from 1 to 4 with \+ between them"):
        compress(source, tmp_path / "out", f"sorted:depths={depths}")


@pytest.mark.parametrize("settings", ["parameters=norms", "dtype=fp16", "tokens=0", "rate=2"])
def test_settings_that_make_no_sense_are_refused(settings):
    with pytest.raises(MethodError, match="sorted"):
        parse_recipe(f"sorted:{settings}")

"""Learning a document part by part: losses by hand, and what was learnt against what was not."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch

from paceline.compress.calibrate import Calibration
from paceline.compress.job import CompressionJob
from paceline.compress.recipe import parse_recipe
from paceline.compress.reconstruct.document import DocumentTraining
from paceline.compress.reconstruct.recovery import TrainedLayer
from paceline.errors import MethodError
from paceline.models import blocks, load
from tests.compress.test_structure import compress, source, texts, whole_model  # noqa: F401

NAMES = ("Zog", "Mib", "Tuk")


def document(model, rows=10, length=60):
    """A story with words that no other story has, in parts."""
    story = "".join(
        f"{one} the robot lives in a red bottle. {one} says beep to {other}. "
        for one, other in zip(NAMES * 40, NAMES[1:] * 60, strict=True)
    )
    tokens = np.array(model.tokenizer.encode(story)[: rows * length], np.int64)
    return Calibration(tokens.reshape(rows, length), "a story of robots")


def learn(model, out, recipe, texts):
    job = CompressionJob(model, out, parse_recipe(recipe))
    job.run(texts)
    return load(out), job.notes


def nats(model, tokens):
    """Return the loss of texts [B, T] by the naive form of the model."""
    layers = [
        {
            name.split(".", 2)[2]: torch.from_numpy(np.array(model.weights.dense(name)))
            for name in model.weights
            if name.startswith(f"layers.{index}.")
        }
        for index in range(len(model.config.layers))
    ]
    outer = {
        name: torch.from_numpy(np.array(model.weights.dense(name)))
        for name in model.weights
        if not name.startswith("layers.")
    }
    rows = torch.from_numpy(tokens)
    logits = blocks.logits(rows, model.config, outer, layers)[:, :-1]
    return float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten()))


def test_what_was_read_helps_with_what_comes(source, tmp_path):  # noqa: F811
    parts = document(source)
    seen = Calibration(parts.tokens[:8], parts.origin)
    model, [note] = learn(source, tmp_path / "out", "temp_lora:rank=4,rate=0.002", seen)
    learnt, plain = map(float, re.findall(r"(\d\.\d{4})", note))
    assert plain == pytest.approx(nats(source, seen.tokens[1:]), abs=2e-4)
    assert learnt < 0.8 * plain
    rest = parts.tokens[8:]
    assert nats(model, rest) < 0.6 * nats(source, rest)


def test_a_text_that_teaches_nothing_changes_nothing(source, tmp_path):  # noqa: F811
    model, [note] = learn(source, tmp_path / "out", "temp_lora:rank=2,rate=0.2", texts(source))
    assert note.endswith("so that all stays as it was.")
    for name in source.weights:
        assert np.array_equal(source.weights.dense(name), model.weights.dense(name)), name


def test_losses_and_gradients_are_those_of_the_naive_form(source, monkeypatch):  # noqa: F811
    monkeypatch.setattr("paceline.compress.reconstruct.document.HEADED", 7)
    model = whole_model(source)
    before = [dict(model.layer(index)) for index in range(len(model.config.layers))]
    layers = [TrainedLayer(each, "all", 1, None) for each in before]
    training = DocumentTraining(model, model, layers, batch=1)
    rows = torch.tensor([0, 2])
    tokens = model.texts[rows]
    assert training.loss(rows, before) == pytest.approx(nats(source, tokens.numpy()), rel=1e-5)
    made = training.backwards(rows)
    assert made == pytest.approx(training.loss(rows, before), rel=1e-5)
    weights = layers[1].trained["down"]
    with torch.no_grad():
        step = 1e-3 * weights.grad / weights.grad.norm()
    moved = [dict(each) for each in before]
    losses = []
    for sign in (1, -1):
        moved[1]["down"] = before[1]["down"] + sign * step
        losses.append(training.loss(rows, moved))
    slope = (losses[0] - losses[1]) / 2e-3
    assert slope == pytest.approx(float(weights.grad.norm()), rel=0.05)


def test_one_part_is_refused(source, tmp_path):  # noqa: F811
    tokens = texts(source).tokens[:1]
    with pytest.raises(MethodError, match="give --rows 2 or more"):
        learn(source, tmp_path / "out", "temp_lora", Calibration(tokens, "one"))

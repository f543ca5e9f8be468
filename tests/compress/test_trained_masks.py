"""Gates on channels and heads: hard-concrete variables by their formulas, and their training."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from paceline.compress.recipe import parse_steps
from paceline.compress.structure.compresso import Compresso
from paceline.compress.structure.widths.gates import (
    HIGH,
    LOW,
    Gates,
    gate_values,
    keep_size,
    open_chances,
    open_share,
    shift_to,
    start_logits,
)
from paceline.errors import MethodError
from tests.compress.interruption import run_again
from tests.compress.test_healing import weights_of
from tests.compress.test_structure import compress, loss, source, whole_model  # noqa: F401

METHODS = ("sheared", "compresso")


def test_gates_are_open_as_often_as_their_probability():
    logits = torch.tensor([-3.0, -0.5, 0.0, 2.0, 6.0])
    noise = torch.rand(200_000, 1, generator=torch.Generator().manual_seed(0))
    drawn = gate_values(logits, noise.clamp(1e-6, 1 - 1e-6))
    assert (float(drawn.min()), float(drawn.max())) == (0, 1)
    assert torch.allclose((drawn > 0).float().mean(0), open_chances(logits), atol=0.005)
    middle = gate_values(torch.zeros(1), torch.full((1,), 0.5))
    assert float(middle) == pytest.approx((LOW + HIGH) / 2)


def test_gates_begin_in_the_order_of_the_scores_whatever_their_size():
    scores = torch.tensor([1e9, 0.0, -5.0, 1.0, 1e-3])
    logits = start_logits(scores)
    assert logits.argsort().tolist() == scores.argsort().tolist()
    assert float((logits - logits.mean()).abs().max()) < 3


@pytest.mark.parametrize("share", [0.05, 0.6, 0.99])
def test_sizes_are_met_by_a_shift_and_kept_by_projected_gradients(share):
    together = [Gates(torch.randn(40), 192), Gates(torch.randn(4), 2048)]
    shift_to(together, share)
    assert open_share(together) == pytest.approx(share, abs=1e-4)
    for each in together:
        each.logits.grad = torch.randn(len(each.logits))
    before = torch.cat([each.logits.grad for each in together])
    keep_size(together)
    after = torch.cat([each.logits.grad for each in together])
    with torch.no_grad():
        for each in together:
            each.logits.sub_(0.01 * each.logits.grad)
    assert open_share(together) == pytest.approx(share, abs=1e-4)  # of the second order
    assert float(before @ after) == pytest.approx(float(after @ after), rel=1e-4)  # a projection
    assert float(after.norm()) > 0.5 * float(before.norm())


def test_gates_that_are_open_change_nothing_and_shut_ones_are_cuts(source):  # noqa: F811
    model = whole_model(source)
    layer = Compresso(rate=1e-3)._layers(model, Compresso().scores(model, model, None))[1]
    with torch.no_grad():
        for each in layer.gates.values():
            each.logits.fill_(50.0)
    x = torch.randn(3, 172)
    plain = layer.final()["down"]
    assert torch.allclose(layer.weights()["down"](x), x @ plain.T, atol=1e-5)
    with torch.no_grad():
        layer.gates["down"].logits[10:] = -50.0
        layer.gates["o"].logits[1:] = -50.0
    assert torch.allclose(layer.weights()["down"](x), x[:, :10] @ plain[:, :10].T, atol=1e-5)
    heads, o = torch.randn(3, 64), layer.final()["o"]
    width = model.config.layers[1].heads // 4 * model.config.layers[1].head_dim
    assert torch.allclose(layer.weights()["o"](heads), heads[:, :width] @ o[:, :width].T, atol=1e-5)
    assert open_share([layer.gates["down"]]) == pytest.approx(10 / 172, rel=1e-3)


@pytest.mark.parametrize("name", METHODS)
def test_trained_masks_beat_those_that_they_began_with(source, tmp_path, name):  # noqa: F811
    settings = "share=0.3,multiple=4"
    trained, notes = compress(source, tmp_path / "out", f"{name}:{settings},tokens=3000")
    alone, _ = compress(source, tmp_path / "alone", f"{name}:{settings},tokens=1")
    assert loss(source, trained) < 0.5 * loss(source, alone)
    for each in (trained, alone):
        assert weights_of(each) == pytest.approx(0.7 * weights_of(source), rel=0.05)
    assert "instead of" in notes[0]
    widths = {(each.kv_heads, each.intermediate) for each in trained.config.layers}
    assert (len(widths) == 1) == (name == "sheared")


def test_what_training_spoils_is_left_out(source, tmp_path):  # noqa: F811
    model, notes = compress(source, tmp_path / "out", "compresso:multiple=4,tokens=400,rate=0.9")
    first, _ = compress(source, tmp_path / "first", "llm_pruner:multiple=4,edges=0")
    assert "of the order that it began with, which was taken" in notes[0]
    assert loss(source, model) < 2 * loss(source, first)


def test_masks_that_are_interrupted_end_as_if_they_were_not(
    source,  # noqa: F811
    tmp_path,
    monkeypatch,
):
    recipe = "compresso:multiple=4,tokens=800"
    whole, _ = compress(source, tmp_path / "whole", recipe)
    (again, _), steps = run_again(monkeypatch, lambda: compress(source, tmp_path / "again", recipe))
    assert steps == 6 + 10 - 5
    for name in whole.weights:
        assert np.array_equal(whole.weights.dense(name), again.weights.dense(name)), name


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("setting", ["share=1", "tokens=0", "gate_rate=0", "rate=2", "batch=0"])
def test_settings_out_of_range_are_refused(name, setting):
    with pytest.raises(MethodError, match=setting.partition("=")[0]):
        parse_steps(f"{name}:{setting}")

"""Methods that score channels and heads: what they keep, against random scores and by hand."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import median

import pytest
import torch

from paceline.compress.structure.bonsai import Bonsai
from paceline.compress.structure.widths.gradients import text_gradients
from paceline.compress.structure.widths.pruner import LayerScores, WidthPruner
from paceline.compress.structure.widths.submodels import regressed, states_without, units_of
from paceline.compress.whole_model import divergence, run_frozen
from paceline.errors import MethodError
from paceline.models import blocks
from paceline.registry import structures
from tests.compress.test_structure import compress, source, whole_model  # noqa: F401

METHODS = (
    "llm_pruner:share=0.2,multiple=4,rows=3",
    "llm_pruner:share=0.2,multiple=4,rows=3,order=mixed",
    "saap:share=0.2,multiple=4,rows=6",
    "cfsp:share=0.2,multiple=4",
    "comp:share=0.2,multiple=4,layers=0",
    "bonsai:share=0.2,multiple=8,samples=16,rows=1",
)


@pytest.fixture(scope="module")
def model(source):  # noqa: F811
    return whole_model(source)


@dataclass(frozen=True)
class ByLuck(WidthPruner):
    seed: int = 0

    def scores(self, model, base, folder):
        generator = torch.Generator().manual_seed(self.seed)

        def draw(count):
            return torch.rand(count, generator=generator).double()

        return [
            LayerScores({"o": draw(shape.kv_heads), "down": draw(shape.intermediate)})
            for shape in model.config.layers
        ]


ByLuck.name = "by_luck"


def lost(model, made):
    """Return the divergence of what a method made from a model, in nats."""
    x = right = model.embed(model.texts)
    for index, shape in enumerate(model.config.layers):
        right = run_frozen(model.config, shape, model.layer(index), right)
    for layer in made.layers:
        weights = {**model.layer(layer.source), **layer.tensors}
        x = run_frozen(model.config, layer.shape, weights, x)
    return divergence(model, right, x)


def left(model, made):
    """Return the number of weights of the matrices of what a method made."""
    return sum(
        each.numel()
        for layer in made.layers
        for each in {**model.layer(layer.source), **layer.tensors}.values()
        if each.dim() == 2
    )


class StoppedError(BaseException):
    pass


@pytest.mark.parametrize("spec", METHODS)
def test_scores_choose_better_than_luck(model, tmp_path, spec):
    made = structures.parse(spec).restructure(model, model, tmp_path)
    assert left(model, made) == pytest.approx(0.8 * model.matrix_weights, rel=0.06)
    luck = [ByLuck(0.2, 4, seed).restructure(model, model, tmp_path) for seed in range(5)]
    assert 0 < lost(model, made) < median(lost(model, each) for each in luck)


@pytest.mark.parametrize("spec", METHODS)
def test_channels_that_do_nothing_go_first(model, tmp_path, spec):
    layers = []
    for index, shape in enumerate(model.config.layers):
        weights = dict(model.layer(index))
        weights["gate"] = weights["gate"].clone()
        weights["gate"][1::2] = 0  # half of the channels put out nothing
        layers.append((shape, weights))
    idle = model.with_layers(layers)
    made = structures.parse(spec).restructure(idle, idle, tmp_path)
    for layer in made.layers:
        silent = (layer.tensors["gate"] == 0).all(1)
        assert (~silent).sum() == 86 or not silent.any()


def test_comp_removes_layers_first_and_the_rest_of_the_share_of_the_others(model, tmp_path):
    method = structures.parse("comp:share=0.3,multiple=4,layers=1")
    made = method.restructure(model, model, tmp_path)
    assert len(made.layers) == 4
    left = sum(
        each.numel() for layer in made.layers for each in layer.tensors.values() if each.dim() == 2
    )
    assert left == pytest.approx(0.7 * model.matrix_weights, rel=0.05)
    made = structures.parse("comp:share=0.1,layers=1").restructure(model, model, tmp_path)
    assert "No channels had to go" in made.note
    with pytest.raises(MethodError, match="expected fewer than the 5 layers"):
        structures.parse("comp:layers=5").restructure(model, model, tmp_path)


def test_masks_of_comp_fit_better_than_plain_columns(model):
    method = structures.parse("comp:layers=0")
    torch.manual_seed(0)
    x = torch.randn(300, 12) @ torch.randn(12, 12)
    weight, gone = torch.randn(7, 12), torch.arange(12) % 3 == 0
    fitted = method.repair({"down": weight}, "down", gone, {"down": x.T @ x / len(x)})["down"]
    kept = x[:, ~gone]
    right = x @ weight.T
    error = (kept @ fitted.T - right).square().sum()
    assert error < 0.95 * (kept @ weight[:, ~gone].T - right).square().sum()
    ratio = fitted / weight[:, ~gone]
    torch.testing.assert_close(ratio, ratio[:1].expand_as(ratio), rtol=1e-3, atol=1e-3)


def test_gradients_of_texts_are_those_of_the_whole_model(model):
    texts = model.texts[:2]
    layers = [
        {name: each.clone().requires_grad_() for name, each in model.layer(index).items()}
        for index in range(5)
    ]
    seen = {}
    for index, gradients in text_gradients(model, 2):
        seen.setdefault(index, []).append(gradients)
    for row, text in enumerate(texts):
        log_probs = blocks.logits(text, model.config, model.outer, layers).log_softmax(-1)
        loss = -log_probs[:-1].gather(1, text[1:, None]).mean()
        for index in (0, 4):
            names = list(seen[index][row])
            right = torch.autograd.grad(
                loss, [layers[index][name] for name in names], retain_graph=True
            )
            for name, each in zip(names, right, strict=True):
                torch.testing.assert_close(seen[index][row][name], each, atol=1e-5, rtol=1e-3)


def test_costs_are_regressed_from_sums():
    torch.manual_seed(0)
    costs = torch.rand(10).double()
    off = (torch.rand(200, 10) < 0.5).double()
    found = regressed(off, off @ costs, torch.ones(10).double())
    torch.testing.assert_close(found, costs, atol=0.15, rtol=0)
    few = regressed(off[:4], off[:4] @ costs, costs)
    torch.testing.assert_close(few, costs, atol=1e-6, rtol=0)


def test_units_that_are_off_are_columns_of_zeros(model):
    units = units_of(model, 8)
    assert sum(unit.size for unit in units) == model.matrix_weights
    assert torch.equal(states_without(model, []), states_without(model, []))
    some = [unit for unit in units if unit.layer == 2]
    rest = model.with_layers(
        (shape, model.layer(index)) for index, shape in enumerate(model.config.layers) if index != 2
    )
    torch.testing.assert_close(states_without(model, some), states_without(rest, []))


def test_sampling_that_is_interrupted_ends_as_if_it_were_not(model, tmp_path, monkeypatch):
    method = structures.parse(METHODS[-1])
    whole = method.restructure(model, model, tmp_path / "whole")
    calls = []

    def counted(model, off):
        calls.append(off)
        if len(calls) == 20:
            raise StoppedError
        return states_without(model, off)

    monkeypatch.setattr("paceline.compress.structure.bonsai.states_without", counted)
    with pytest.raises(StoppedError):
        method.restructure(model, model, tmp_path / "again")
    again = method.restructure(model, model, tmp_path / "again")
    assert len(calls) < 2 * (1 + 32)
    for one, other in zip(whole.layers, again.layers, strict=True):
        assert one.shape == other.shape
        assert torch.equal(one.tensors["down"], other.tensors["down"])


def test_settings_out_of_range_are_refused():
    for spec, words in (
        ("llm_pruner:order=third", "expected first, second, mixed"),
        ("bonsai:samples=1", "expected 2 to 100000"),
        ("cfsp:spread=-1", "expected 0"),
        ("saap:rows=1", "expected 2 to 1000"),
    ):
        with pytest.raises(MethodError, match=words):
            structures.parse(spec)
    assert Bonsai().share == 0.2


def test_attention_alone_is_not_enough_for_cfsp(model, tmp_path):
    with pytest.raises(MethodError, match="more than all MLP channels"):
        structures.parse("cfsp:share=0.9").restructure(model, model, tmp_path)

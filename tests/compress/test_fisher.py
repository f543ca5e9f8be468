"""Gradients of the whole model, a block at a time: Fisher information, and bits that follow it."""

import numpy as np
import pytest
import torch

from paceline.compress.calibrate import Calibration
from paceline.compress.fisher import Gradients, extra_bits
from paceline.compress.job import CompressionJob
from paceline.compress.recipe import parse_recipe
from paceline.errors import MethodError
from paceline.models import blocks, load
from tests.conftest import shared


@pytest.fixture(scope="module")
def model():
    return load(shared("models", "stories260K"))


@pytest.fixture(scope="module")
def texts(model):
    text = "Once upon a time there was a little girl named Lily. She liked to play. " * 8
    tokens = np.array(model.tokenizer.encode(text)[:96], np.int64).reshape(2, 48)
    return Calibration(tokens, "a story")


def tensors(model, start):
    return {
        name.removeprefix(start): torch.from_numpy(np.array(model.weights.dense(name)))
        for name in model.weights
        if name.startswith(start)
    }


def test_fisher_information_is_the_sum_of_squared_derivatives(model, texts):
    """By central differences of the loss: a product at one position is moved by a weight's step."""
    layers = [tensors(model, f"layers.{index}.") for index in range(len(model.config.layers))]
    outer = {name: each for name, each in tensors(model, "").items() if "layers." not in name}
    tokens = torch.from_numpy(texts.tokens)
    gradients = Gradients(model.config, lambda index: layers[index], outer)
    found = dict(gradients.fisher(tokens))
    assert sorted(found) == list(range(len(layers)))
    for index, name in ((0, "q"), (2, "down"), (len(layers) - 1, "up")):
        weight = layers[index][name].double()
        squares = torch.zeros_like(weight)
        for text in tokens:
            inputs, moved = [], []

            def product(x, weight=weight, inputs=inputs, moved=moved):
                added = torch.zeros(*x.shape[:-1], len(weight), requires_grad=True)
                inputs.append(x.detach())
                moved.append(added)
                return x @ weight.float().T + added

            used = [dict(layer) for layer in layers]
            used[index][name] = product
            logits = blocks.logits(text[None], model.config, outer, used)[0]
            loss = torch.nn.functional.cross_entropy(logits[:-1], text[1:], reduction="sum")
            (gradient,) = torch.autograd.grad(loss, moved)
            for position in range(len(text)):
                whole = torch.outer(gradient[0, position], inputs[0][0, position])
                squares += whole.double().square()
        torch.testing.assert_close(found[index][name].double(), squares, rtol=1e-3, atol=1e-9)


def test_bits_follow_the_loss():
    extra = extra_bits({"a": 4.0, "b": 1.0, "c": 1.0}, {"a": 10, "b": 10, "c": 20})
    assert extra == pytest.approx({"a": 0.75, "b": -0.25, "c": -0.25})
    assert extra_bits({"a": 0.0}, {"a": 10}) == {"a": 0.0}


def test_matrices_that_matter_take_more_bits(model, texts, tmp_path):
    recipe = parse_recipe("rtn:group=32,mean_bits=4,search=0")
    assert recipe.needs_data
    out = tmp_path / "out"
    size = CompressionJob(model, out, recipe).run(texts)
    assert 4.2 < size.bits_per_weight < 5.8  # scales take half a bit
    stored = load(out).weights
    widths = {
        name: stored[name].bits
        for name in stored
        if name.startswith("layers.0.") and hasattr(stored[name], "bits")
    }
    assert len(set(widths.values())) > 1
    again = tmp_path / "again"
    CompressionJob(model, again, recipe).run(texts)
    name = "model.safetensors"
    assert (out / name).read_bytes() == (again / name).read_bytes()


def test_gradients_survive_an_interruption(model, texts, tmp_path):
    recipe = parse_recipe("rtn:group=32,mean_bits=3.5,search=0")
    CompressionJob(model, tmp_path / "whole", recipe).run(texts)

    def stop(done):
        if done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        CompressionJob(model, tmp_path / "out", recipe).run(texts, stop)
    CompressionJob(model, tmp_path / "out", recipe).run(texts)
    name = "model.safetensors"
    assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_the_head_has_no_gradients():
    with pytest.raises(MethodError, match="needs calibration"):
        parse_recipe("rtn", "rtn:mean_bits=4")

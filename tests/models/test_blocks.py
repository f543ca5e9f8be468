"""The decoder block against transformers in batches, its gradient, its taps, and the engine."""

import numpy as np
import pytest
import torch

import tiny
from paceline.engines.reference import ReferenceEngine
from paceline.models import blocks, load


@pytest.fixture(scope="module", params=tiny.MODELS)
def checkpoint(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    oracle = tiny.save(request.param, folder)
    return load(folder), oracle


def tensors(model, dtype=torch.float32, gradient=False):
    """The tensors of a model outside its layers and of each layer."""
    outer, layers = {}, [{} for _ in model.config.layers]
    for name in model.weights:
        tensor = torch.tensor(np.asarray(model.weights[name])).to(dtype)
        place, key = outer, name
        if name.startswith("layers."):
            _, index, key = name.split(".", 2)
            place = layers[int(index)]
        place[key] = tensor.requires_grad_(gradient)
    return outer, layers


def test_a_batch_has_the_logits_of_transformers(checkpoint):
    model, oracle = checkpoint
    tokens = torch.tensor(
        np.stack([tiny.tokens(24, seed) for seed in (1, 2, 3)]), dtype=torch.int64
    )
    with torch.no_grad():
        found = blocks.logits(tokens, model.config, *tensors(model))
        expected = oracle(tokens).logits
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


def test_one_text_has_the_bits_of_the_engine(checkpoint):
    model, _ = checkpoint
    ids = tiny.tokens(24)
    rows = []
    ReferenceEngine(model.config, model.weights).start(ids, lambda _, __, x: rows.append(x.copy()))
    with torch.no_grad():
        found = blocks.logits(torch.tensor(ids, dtype=torch.int64), model.config, *tensors(model))
    np.testing.assert_array_equal(found.numpy(), rows[0])


def test_the_gradient_is_that_of_transformers(checkpoint):
    model, oracle = checkpoint
    tokens = torch.tensor(tiny.tokens(16), dtype=torch.int64)[None]
    outer, layers = tensors(model, gradient=True)
    blocks.logits(tokens, model.config, outer, layers).square().mean().backward()
    oracle.zero_grad()
    oracle(tokens).logits.square().mean().backward()
    grads = [t.grad for place in (outer, *layers) for name, t in place.items()]
    assert all(grad is not None and grad.isfinite().all() for grad in grads)
    embedding = oracle.get_input_embeddings().weight.grad
    torch.testing.assert_close(outer["embed"].grad, embedding, atol=1e-4, rtol=1e-3)


def test_taps_see_the_input_of_every_matrix(checkpoint):
    model, _ = checkpoint
    outer, layers = tensors(model)
    tokens = torch.tensor(tiny.tokens(9), dtype=torch.int64)[None]
    seen = {}
    blocks.logits(tokens, model.config, outer, layers, lambda *tap: seen.update({tap[:2]: tap[2]}))
    names = {"q", "k", "v", "o", "up", "down", "queries", "attention"} | (
        {"gate"} if model.config.gated else set()
    )
    assert set(seen) == {(i, n) for i in range(len(layers)) for n in names}
    for (index, name), x in seen.items():
        if name == "attention":
            torch.testing.assert_close(x.sum(-1), torch.ones_like(x[..., 0]))
            assert (x.triu(1) == 0).all()
        elif name == "queries":
            shape = model.config.layers[index]
            assert x.shape == (1, shape.heads, 9, shape.head_dim)
        else:
            assert x.shape[-1] == layers[index][name].shape[1]


def test_a_matrix_may_be_a_function(checkpoint):
    model, _ = checkpoint
    outer, layers = tensors(model)
    tokens = torch.tensor(tiny.tokens(9), dtype=torch.int64)
    plain = blocks.logits(tokens, model.config, outer, layers)
    matrices = ("q", "k", "v", "o", "gate", "up", "down")
    wrapped = [
        {n: (lambda x, w=t: x @ w.T) if n in matrices else t for n, t in layer.items()}
        for layer in layers
    ]
    found = blocks.logits(tokens, model.config, outer, wrapped)
    torch.testing.assert_close(found, plain, atol=1e-5, rtol=1e-5)


def test_a_function_cannot_stand_for_a_norm(checkpoint):
    model, _ = checkpoint
    outer, layers = tensors(model)
    with pytest.raises(TypeError, match="norms, biases"):
        blocks.logits(torch.tensor([1, 2]), model.config, {**outer, "embed": torch.abs}, layers)

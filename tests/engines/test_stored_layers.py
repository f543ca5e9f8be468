"""Layers that are expanded while they run: every form as `dense` has it, also as devices do it."""

import numpy as np
import pytest
import torch

from paceline.engines import stored_layers
from paceline.engines.reference import ReferenceEngine
from paceline.models.tensors import SignBlocks, Sparse
from tests import tiny
from tests.engines.test_native import tiny_model

__all__ = ["tiny_model"]  # the fixture

CPU = torch.device("cpu")


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16"])
def test_a_bitmap_is_expanded_where_its_values_are(kind):
    random = np.random.default_rng(0)
    mask = random.random((7, 13)) < 0.4
    values = random.normal(size=int(mask.sum())).astype(np.float32)
    stored = (values.view(np.uint32) >> 16).astype(np.uint16)
    stored = stored if kind == "BF16" else values.astype({"F32": "f4", "F16": "f2"}[kind])
    matrix = Sparse(mask, stored, kind)
    found = stored_layers._expand_sparse(matrix, CPU, torch.float32)
    assert np.array_equal(found.numpy(), matrix.dense())


def test_bits_are_unpacked_as_numpy_does():
    packed = np.random.default_rng(0).integers(0, 256, (5, 3)).astype(np.uint8)
    expected = np.unpackbits(packed, axis=1, count=21, bitorder="little")
    assert np.array_equal(stored_layers._unpack(torch.from_numpy(packed), 21).numpy(), expected)


def test_blocks_of_signs_are_summed():
    random = np.random.default_rng(0)
    matrix = SignBlocks(
        random.integers(0, 256, (3, 6, 2)).astype(np.uint8),
        random.normal(size=(3, 6, 2)).astype(np.float16),
        random.normal(size=(3, 2, 11)).astype(np.float16),
        np.float32([0.3, 0.2, 0.1]),
    )
    found = stored_layers.expand(matrix, CPU, torch.float32)
    np.testing.assert_allclose(found.numpy(), matrix.dense(), atol=1e-5)


def test_a_thread_begins_with_the_next_layer(monkeypatch):
    weights = {f"layers.{index}.q": np.full((2, 2), index, np.float32) for index in range(3)}
    monkeypatch.setattr(stored_layers, "expand", lambda weight, *_: torch.from_numpy(weight))
    layers = stored_layers.StoredLayers(weights, 3, torch.device("meta"), torch.float32)
    for index in (0, 1, 2, 0, 2, 1):  # in order, and where a view leaves layers out
        assert float(layers[index]["q"][0, 0]) == index


def test_an_engine_with_stored_layers_computes_the_same(tiny_model):
    model = tiny_model("llama")
    whole = ReferenceEngine(model.config, model.weights)
    stored = ReferenceEngine(model.config, model.weights, stored=True)
    assert stored.format == "stored"
    rows = []
    for engine in (whole, stored):
        found = []
        engine.start(tiny.tokens(20), lambda _, __, logits, f=found: f.append(logits.copy()))
        rows.append(np.concatenate(found))
    assert np.array_equal(*rows)
    layers = stored._layers
    again = layers[0]
    assert {name: each.shape for name, each in again.items()} == {
        name: each.shape for name, each in whole._layers[0].items()
    }
    assert len(layers) == len(model.config.layers)

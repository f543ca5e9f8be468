import numpy as np
import pytest

from paceline.core import TokenTree
from paceline.errors import ModelError
from paceline.measuring.inflate import TargetShape, inflate
from paceline.models import load
from tests.conftest import shared

reference = pytest.importorskip("paceline.engines.reference")


def logits(model):
    engine = reference.ReferenceEngine(model.config, model.weights)
    return engine.forward([(engine.open(), TokenTree.chain(range(3, 60)))])


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("stories260K", TargetShape(512, 11, 32, 4, 600)),
        ("stories260K", TargetShape(128, 5, 16, 8, 172)),
        ("TinyStories-656K", TargetShape(256, 3, 16, 8, 400)),
        ("bitstories-1M", TargetShape(256, 9, 16, 8, 640)),
        ("bitstories-3M", TargetShape(1024, 9, 16, 8, 300)),
    ],
)
def test_a_grown_model_computes_what_it_did(name, shape, tmp_path):
    small = load(shared("models", name))
    inflate(small, tmp_path / "grown", shape)
    grown = load(tmp_path / "grown")
    assert grown.config.hidden_size == shape.hidden
    assert len(grown.config.layers) == shape.layers
    before, after = logits(small), logits(grown)
    assert np.abs(before - after).max() < 1e-3
    assert np.array_equal(before.argmax(1), after.argmax(1))


@pytest.mark.parametrize(
    ("name", "shape", "said"),
    [
        ("tinystories-instruct-3m-chat", TargetShape(512, 9, 16, 8, 600), "not gpt_neo"),
        ("stories260K", TargetShape(96, 5, 8, 4, 172), "no multiple of 8"),
        ("stories260K", TargetShape(128, 4, 8, 4, 172), "cannot hold"),
        ("stories260K", TargetShape(100, 5, 8, 4, 172), "multiple of its heads"),
        ("bitstories-1M", TargetShape(256, 9, 16, 4, 640), "2 query heads"),
    ],
)
def test_shapes_that_cannot_hold_the_model_are_refused(name, shape, said, tmp_path):
    with pytest.raises(ModelError, match=said):
        inflate(load(shared("models", name)), tmp_path, shape)
    assert not list(tmp_path.iterdir())

"""A shape that no decoder has cannot be made."""

from dataclasses import fields, replace

import numpy as np
import pytest

from paceline import _native
from paceline.errors import ModelError
from paceline.models.config import LayerConfig, ModelConfig
from paceline.models.rope import Rope

LAYER = LayerConfig(4, 2, 8, 16, 3, Rope(1e4, 8))
CONFIG = ModelConfig("test", 11, 12, 64, (LAYER,), "rms", 1e-5, "silu", True, 0.5, False)
NOT_SIZES = (0, -1, 2**40, 1.5, "4", None, True)
NOT_NUMBERS = (float("nan"), float("inf"), "1", None)


@pytest.mark.parametrize("name", ["heads", "kv_heads", "head_dim", "intermediate"])
@pytest.mark.parametrize("value", NOT_SIZES)
def test_a_layer_has_sizes(name, value):
    if (name, value) == ("intermediate", 0) and type(value) is int:
        assert replace(LAYER, intermediate=0).intermediate == 0  # a layer without an MLP
        return
    with pytest.raises(ModelError, match=name):
        replace(LAYER, **{name: value})


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"kv_heads": 3}, "divisor of 4 heads"),
        ({"window": 0}, "window"),
        ({"rope": Rope(1e4, 7)}, "even number up to head_dim 8"),
        ({"rope": Rope(1e4, 10)}, "even number up to head_dim 8"),
        ({"rope": Rope(1e4, 0)}, "dim of a rope"),
    ],
)
def test_parts_of_a_layer_fit_each_other(values, words):
    with pytest.raises(ModelError, match=words):
        replace(LAYER, **values)


@pytest.mark.parametrize("name", ["vocab_size", "hidden_size", "context"])
@pytest.mark.parametrize("value", NOT_SIZES)
def test_a_decoder_has_sizes(name, value):
    with pytest.raises(ModelError, match=name):
        replace(CONFIG, **{name: value})


@pytest.mark.parametrize("layers", [(), [LAYER], None, (None,)])
def test_a_decoder_has_layers(layers):
    with pytest.raises(ModelError, match="layers"):
        replace(CONFIG, layers=layers)


SCALES = ("attention_scale", "embedding_scale", "residual_scale", "logit_scale")


@pytest.mark.parametrize("name", ["norm_eps", "norm_offset", *SCALES])
@pytest.mark.parametrize("value", NOT_NUMBERS)
def test_a_decoder_has_finite_numbers(name, value):
    with pytest.raises(ModelError, match=name):
        replace(CONFIG, **{name: value})


@pytest.mark.parametrize(
    "values",
    [
        {"norm": "batch"},
        {"activation": "tanh"},
        {"attention_softcap": 0.0},
        {"logit_softcap": -1.0},
        {"position_offset": -1},
        {"norm_eps": -1e-5},
        {"qk_norm": "layer"},
        {"qkv_clip": 0.0},
    ],
)
def test_a_decoder_has_settings_in_range(values):
    with pytest.raises(ModelError, match=next(iter(values)).split("_")[0]):
        replace(CONFIG, **values)


def test_sizes_of_numpy_are_sizes():
    assert replace(CONFIG, vocab_size=np.int64(7)).vocab_size == 7


class Loose:
    """A decoder's attributes without any check."""

    def __init__(self, shape, **values):
        self.__dict__.update({field.name: getattr(shape, field.name) for field in fields(shape)})
        self.__dict__.update(values)


def native(config):
    return _native.NativeModel(config, "fp32", "fp32", "fp32", "", 1)


@pytest.mark.parametrize(
    "values",
    [
        {"layers": ()},
        {"layers": 3},
        {"layers": (None,)},
        {"layers": (Loose(LAYER, heads=0),)},
        {"layers": (Loose(LAYER, kv_heads=3),)},
        {"layers": (Loose(LAYER, head_dim=2**20),)},
        {"layers": (Loose(LAYER, intermediate=-1),)},
        {"layers": (Loose(LAYER, window=0),)},
        {"layers": (Loose(LAYER, rope=Rope(1e4, 7)),)},
        {"layers": (Loose(LAYER, rope=3),)},
        {"vocab_size": 0},
        {"vocab_size": 2**62},
        {"vocab_size": 2**80},
        {"hidden_size": "8"},
        {"context": None},
        {"norm": 3},
        {"activation": "tanh"},
        {"norm_eps": float("nan")},
        {"attention_softcap": -1.0},
        {"qkv_clip": -1.0},
        {"qk_norm": "layer"},
        {"pre_norm": 3},
        {"residual_scale": float("inf")},
        {"gated": "yes"},
    ],
)
def test_the_native_engine_checks_the_shape_itself(values):
    with pytest.raises((ValueError, AttributeError)):
        native(Loose(CONFIG, **values))
    assert native(CONFIG).isa

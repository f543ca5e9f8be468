"""Angles against transformers, and that a row depends on its position alone."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

import tiny
from paceline.core import TokenTree
from paceline.engines.reference import ReferenceEngine
from paceline.models import load
from paceline.models.fields import Fields
from paceline.models.layer_variants import context, read_rope

ORIGINAL = {"factor": 8.0, "original_max_position_embeddings": 512}
SCALINGS: dict[str, dict[str, Any]] = {
    "linear": {"factor": 4.0},
    "dynamic": {"factor": 2.0},
    "llama3": {**ORIGINAL, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    "yarn": ORIGINAL,
    "yarn-betas": {**ORIGINAL, "beta_fast": 16.0, "beta_slow": 2.0, "truncate": False},
    "yarn-factor": {**ORIGINAL, "attention_factor": 0.7},
    "yarn-mscale": {**ORIGINAL, "mscale": 1.3, "mscale_all_dim": 0.6},
    "longrope": {
        "factor": 4.0,
        "original_max_position_embeddings": 512,
        "short_factor": [1 + i / 10 for i in range(32)],
        "long_factor": [2.0] * 32,
    },
}


def settings(name: str) -> dict[str, Any]:
    return {"rope_type": name.split("-")[0], "rope_theta": 5e4, **SCALINGS[name]}


@pytest.mark.parametrize("name", [name for name in SCALINGS if name != "dynamic"])
def test_angles_are_those_of_transformers(name: str) -> None:
    config = transformers.LlamaConfig(
        head_dim=64, max_position_embeddings=4096, rope_parameters=settings(name)
    )
    inverse, amplitude = ROPE_INIT_FUNCTIONS[name.split("-")[0]](config, "cpu")
    rope = read_rope(Fields({"max_position_embeddings": 4096}), settings(name), 64)
    cos, sin = rope.table(100, 356)
    angles = torch.arange(100, 356)[:, None].float() * inverse
    np.testing.assert_allclose(cos, (angles.cos() * amplitude).numpy(), atol=5e-5)
    np.testing.assert_allclose(sin, (angles.sin() * amplitude).numpy(), atol=5e-5)
    assert cos.dtype == sin.dtype == np.float32


@pytest.mark.parametrize("name", SCALINGS)
@given(st.integers(0, 600), st.integers(0, 200), st.integers(0, 200))
def test_a_row_depends_on_its_position_alone(name: str, start: int, skip: int, size: int) -> None:
    rope = read_rope(Fields({"max_position_embeddings": 512}), settings(name), 64)
    whole, part = (
        rope.table(start, start + skip + size),
        rope.table(start + skip, start + skip + size),
    )
    for ours, theirs in zip(part, whole, strict=True):
        assert ours.shape == (size, 32)
        assert np.array_equal(ours, theirs[skip:])


def test_dynamic_is_decoding_token_by_token(tmp_path) -> None:
    """Beyond the original context: transformers with a cache, one token at a time."""
    model = tiny.save("llama-dynamic", tmp_path)
    loaded = load(tmp_path)
    assert loaded.config.context == 2 * tiny.CONTEXT
    ids = tiny.tokens(tiny.CONTEXT + 20)
    cache = transformers.DynamicCache()
    engine = ReferenceEngine(loaded.config, loaded.weights)
    sequence = engine.open()
    for index in ids:
        with torch.inference_mode():
            step = torch.tensor([[int(index)]])
            expected = model(step, past_key_values=cache, use_cache=True).logits[0].numpy()
        logits = engine.forward([(sequence, TokenTree.root(int(index)))])
        engine.commit(sequence, [0])
    np.testing.assert_allclose(logits, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("scaling", "expected"),
    [
        ({"rope_type": "default"}, 1024),
        ({"rope_type": "linear", "factor": 4.0}, 4096),
        ({"rope_type": "dynamic", "factor": 2.0}, 2048),
        ({**settings("llama3")}, 1024),
        ({**settings("yarn")}, 4096),
        ({**settings("longrope")}, 512),
    ],
)
def test_context(scaling: dict[str, Any], expected: int) -> None:
    fields = Fields({"max_position_embeddings": 1024})
    rope = read_rope(fields, scaling, 64)
    assert context(fields, [rope, None, replace(rope, theta=2.0)]) == expected

"""Canonical weights: every stored format and layout, and every inconsistency refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

import tiny
from paceline.engines.reference import ReferenceEngine
from paceline.errors import ModelError
from paceline.models import load
from paceline.models.tensors import widen

TENSORS = dict[str, torch.Tensor]


def change(folder: Path, **tensors: torch.Tensor | None) -> None:
    """Replace tensors of a saved checkpoint; None removes one. `__` stands for a dot."""
    path = folder / "model.safetensors"
    held = safetensors.torch.load_file(path)
    for name, tensor in tensors.items():
        held.pop(name.replace("__", "."), None)
        if tensor is not None:
            held[name.replace("__", ".")] = tensor
    safetensors.torch.save_file(held, path)


def logits(folder: Path) -> np.ndarray:
    model = load(folder)
    rows: list[np.ndarray] = []
    engine = ReferenceEngine(model.config, model.weights)
    engine.start(tiny.tokens(12), lambda _, __, logits: rows.append(logits))
    return np.concatenate(rows)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox", "phi3"])
def test_half_precision(tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    tiny.MODELS[name]().to(dtype).save_pretrained(tmp_path)
    wide = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    expected = tiny.oracle(wide, tiny.tokens(12))
    np.testing.assert_allclose(logits(tmp_path), expected, atol=1e-4, rtol=0)
    assert load(tmp_path).weights.formats() == ({"torch.bfloat16": "bf16"}.get(str(dtype), "f16"),)


def test_shards(tmp_path: Path) -> None:
    model = tiny.save("qwen3", tmp_path, max_shard_size="20KB")
    assert not (tmp_path / "model.safetensors").exists()
    np.testing.assert_allclose(
        logits(tmp_path), tiny.oracle(model, tiny.tokens(12)), atol=1e-4, rtol=0
    )


def test_weights_are_a_mapping_of_contiguous_arrays(tmp_path: Path) -> None:
    tiny.save("gpt2", tmp_path)
    model = load(tmp_path)
    assert len(model.weights) == len(list(model.weights)) == 4 + 16 * tiny.LAYERS
    for name in model.weights:
        array = model.weights.dense(name)
        assert array.dtype == np.float32
        assert array.flags.c_contiguous
        assert name in model.weights
    assert "head" not in model.weights
    assert model.weights["layers.0.q"].shape == (40, 40)
    assert model.weights["layers.1.up"].shape == (160, 40)


def test_fp32_is_not_copied(tmp_path: Path) -> None:
    tiny.save("llama", tmp_path)
    weights = load(tmp_path).weights
    assert np.shares_memory(weights.dense("layers.0.q"), weights.dense("layers.0.q"))
    assert weights.stored("layers.0.q").dtype == "F32"


def test_prefixes_and_buffers_of_older_files(tmp_path: Path) -> None:
    """The hub's gpt2: no prefix, and masks among the weights."""
    tiny.save("gpt2", tmp_path)
    before = logits(tmp_path)
    path = tmp_path / "model.safetensors"
    held = safetensors.torch.load_file(path)
    bare = {name.removeprefix("transformer."): tensor for name, tensor in held.items()}
    bare["h.0.attn.bias"] = torch.ones(1, 1, 4, 4, dtype=torch.bool)
    safetensors.torch.save_file(bare, path)
    assert np.array_equal(logits(tmp_path), before)


def test_tied_heads(tmp_path: Path) -> None:
    """Stored once under either name, or twice; different values are not tied after all."""
    tiny.save("bitnet-silu-tied", tmp_path)
    before = logits(tmp_path)
    embed = torch.tensor(load(tmp_path).weights.dense("embed"))
    change(tmp_path, lm_head__weight=embed.clone())
    assert load(tmp_path).config.tied
    assert np.array_equal(logits(tmp_path), before)
    change(tmp_path, model__embed_tokens__weight=None)
    assert np.array_equal(logits(tmp_path), before)
    change(tmp_path, model__embed_tokens__weight=embed, lm_head__weight=embed * 2)
    assert not load(tmp_path).config.tied
    np.testing.assert_allclose(logits(tmp_path), before * 2, rtol=1e-5)


Q = "model__layers__1__self_attn__q_proj__weight"


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({Q: None}, r"lacks tensor layers\.1\.self_attn\.q_proj\.weight"),
        ({Q: torch.zeros(40, 39)}, "shape 40x39, expected 40x40"),
        ({Q: torch.zeros(1600)}, "shape 1600, expected 40x40"),
        ({Q: torch.zeros(40, 40, dtype=torch.int8)}, "stored as I8, expected F32, F16, BF16"),
        ({"model__layers__3__mlp__up_proj__weight": torch.zeros(2, 2)}, "does not account for"),
        ({"layers__1__self_attn__q_proj__weight": torch.zeros(2, 2)}, "twice"),
        ({"lm_head__weight": None}, "lacks tensor lm_head"),
    ],
)
def test_names_and_shapes_are_checked(
    tmp_path: Path, tensors: dict[str, torch.Tensor | None], message: str
) -> None:
    tiny.save("llama", tmp_path)
    change(tmp_path, **tensors)
    with pytest.raises(ModelError, match=message):
        load(tmp_path)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_values_are_checked_when_read(tmp_path: Path, value: float) -> None:
    tiny.save("llama", tmp_path)
    broken = torch.zeros(40, 40)
    broken[3, 4] = value
    change(tmp_path, **{Q: broken})
    weights = load(tmp_path).weights
    assert np.isfinite(weights["layers.0.q"]).all()
    with pytest.raises(ModelError, match=r"layers\.1.*NaN or infinite"):
        _ = weights["layers.1.q"]


def test_large_values_are_finite(tmp_path: Path) -> None:
    tiny.save("llama", tmp_path)
    change(tmp_path, **{Q: torch.full((40, 40), 3e38)})
    assert load(tmp_path).weights.dense("layers.1.q").max() > 1e38


def test_config_and_weights_must_agree(tmp_path: Path) -> None:
    tiny.save("llama", tmp_path)
    path = tmp_path / "config.json"
    values = json.loads(path.read_text())
    path.write_text(json.dumps({**values, "num_hidden_layers": 9999}))
    with pytest.raises(ModelError, match=r"lacks tensor layers\.3\."):
        load(tmp_path)


@given(st.lists(st.integers(0, 2**16 - 1)))
def test_bfloat16_is_exact(bits: list[int]) -> None:
    array = np.array(bits, np.uint16)
    expected = torch.tensor(array.view(np.int16)).view(torch.bfloat16).float().numpy()
    assert np.array_equal(widen(array, "BF16"), expected, equal_nan=True)

"""config.json: old and new layouts, defaults, and refusals by name."""

from __future__ import annotations

import json
import math
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tiny
from paceline.errors import ModelError
from paceline.models.families import FAMILIES
from paceline.models.fields import read_json
from paceline.models.hf_config import read_config

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 128,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "max_position_embeddings": 256,
}


def shape(**changes: Any) -> Any:
    return read_config({**LLAMA, **changes})[0]


def test_old_and_new_rope_layouts_agree() -> None:
    scaling = {"type": "linear", "factor": 2.0}
    old = shape(rope_theta=5e5, rope_scaling=scaling)
    new = shape(rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5})
    assert old == new
    assert old.layers[0].rope.theta == 5e5
    assert shape(rope_scaling=None, rope_theta=1e4) == shape()


def test_gemma3_bases_of_both_layouts_agree() -> None:
    gemma = {**LLAMA, "model_type": "gemma3_text", "num_hidden_layers": 7, "sliding_window": 9}
    old = {"rope_theta": 2e6, "rope_local_base_freq": 3e4}
    old |= {"rope_scaling": {"rope_type": "linear", "factor": 8.0}, "sliding_window_pattern": 3}
    new = {
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 2e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 3e4},
        },
        "layer_types": (["sliding_attention"] * 2 + ["full_attention"]) * 2 + ["sliding_attention"],
    }
    config = read_config({**gemma, **old})[0]
    assert config == read_config({**gemma, **new})[0]
    assert [layer.window for layer in config.layers] == [9, 9, None, 9, 9, None, 9]
    assert [layer.rope.theta for layer in config.layers if layer.rope][1:3] == [3e4, 2e6]
    assert config.context == 256


def test_defaults() -> None:
    config = shape()
    layer = config.layers[0]
    assert (layer.kv_heads, layer.head_dim, layer.window) == (4, 16, None)
    assert layer.rope.theta == 1e4
    assert math.isclose(config.attention_scale, 16**-0.5)
    assert (config.tied, config.activation, config.eos, config.bos) == (False, "silu", (), None)
    assert read_config({**LLAMA, "model_type": "mistral"})[0].layers[0].window == 4096
    gemma = read_config({**LLAMA, "model_type": "gemma", "hidden_act": "gelu"})[0]
    assert (gemma.activation, gemma.tied, gemma.norm_offset) == ("gelu_tanh", True, 1.0)


def test_eos_of_every_form() -> None:
    assert shape(eos_token_id=[2, 5]).eos == (2, 5)
    assert shape(eos_token_id=7).eos == (7,)
    assert shape(eos_token_id=None).eos == shape(eos_token_id=-1).eos == ()


def test_llama_3_2() -> None:
    config = shape(
        **{"hidden_size": 2048, "num_attention_heads": 32, "num_key_value_heads": 8},
        **{"head_dim": 64, "max_position_embeddings": 131072, "rope_theta": 500000.0},
        rope_scaling={
            "factor": 32.0,
            "high_freq_factor": 4.0,
            "low_freq_factor": 1.0,
            "original_max_position_embeddings": 8192,
            "rope_type": "llama3",
        },
        eos_token_id=[128001, 128008, 128009],
    )
    assert config.context == 131072
    assert config.layers[0].rope.scaling == "llama3"
    assert config.eos == (128001, 128008, 128009)


def test_phi_3_5_stops_at_the_original_context() -> None:
    config = shape(
        **{"model_type": "phi3", "max_position_embeddings": 131072, "sliding_window": 262144},
        original_max_position_embeddings=4096,
        rope_scaling={"type": "su", "short_factor": [1.5] * 8, "long_factor": [2.0] * 8},
    )
    assert config.context == 4096
    rope = config.layers[0].rope
    assert rope.scaling == "longrope"
    assert math.isclose(
        rope.table(0, 1)[0][0, 0], math.sqrt(1 + math.log(32) / math.log(4096)), rel_tol=1e-6
    )


def test_gemma_3_with_vision_relies_on_defaults() -> None:
    text = {
        **{"hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34},
        **{"model_type": "gemma3_text", "sliding_window": 1024},
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
    }
    outer = {"model_type": "gemma3", "eos_token_id": [1, 106], "text_config": text}
    config = read_config(outer)[0]
    layer = config.layers[5]
    assert (layer.heads, layer.kv_heads, layer.head_dim, layer.window) == (8, 4, 256, None)
    assert (layer.rope.theta, layer.rope.scaling) == (1e6, "linear")
    assert (config.layers[0].rope.theta, config.layers[0].window) == (1e4, 1024)
    assert (config.context, config.vocab_size, config.eos) == (131072, 262208, (1, 106))
    assert (config.tied, config.attention_scale, config.logit_softcap) == (True, 1 / 16, None)


def test_pythia() -> None:
    config = shape(
        model_type="gpt_neox", rotary_pct=0.25, rotary_emb_base=10000, layer_norm_eps=1e-05
    )
    assert (config.layers[0].rope.dim, config.parallel, config.norm) == (4, True, "layer")
    assert (config.activation, config.gated) == ("gelu", False)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "lama"}, "unknown architecture 'lama'; did you mean llama"),
        ({"model_type": None}, "no model_type"),
        ({"model_type": ["llama"]}, "no model_type"),
        ({"quantization_config": {"quant_method": "bitnet"}}, "quantization_config"),
        ({"alibi": True}, "alibi"),
        ({"hidden_act": "gelu_10"}, "unknown activation 'gelu_10'"),
        ({"rope_scaling": {"type": "mrope", "factor": 2}}, "unknown rope scaling 'mrope'"),
        ({"rope_scaling": {"type": "linear", "mrope_section": [1]}}, "unknown rope setting"),
        ({"rope_scaling": {"type": "linear"}}, "factor in the rope settings .* is missing"),
        ({"rope_scaling": {"type": "linear", "factor": math.inf}}, "factor"),
        ({"rope_scaling": "linear"}, "rope_scaling"),
        ({"rope_theta": 0}, "rope_theta"),
        ({"hidden_size": None}, "hidden_size in config.json is missing"),
        ({"hidden_size": 65}, "not a multiple of its 4 attention heads"),
        ({"hidden_size": "64"}, "hidden_size"),
        ({"hidden_size": True}, "hidden_size"),
        ({"num_hidden_layers": 10**12}, "num_hidden_layers"),
        ({"num_key_value_heads": 3}, "divisor of the 4"),
        ({"head_dim": 15}, "even number"),
        ({"vocab_size": -1}, "vocab_size"),
        ({"rms_norm_eps": math.nan}, "rms_norm_eps"),
        ({"layer_types": ["sliding_attention"] * 2}, "layer_types"),
        ({"layer_types": ["full_attention"]}, "expected one for each of 2 layers"),
        ({"tie_word_embeddings": 1}, "true or false"),
        ({"eos_token_id": "x"}, "eos_token_id"),
        ({"model_type": "opt", "do_layer_norm_before": False}, "do_layer_norm_before"),
        ({"model_type": "opt", "word_embed_proj_dim": 32, "ffn_dim": 9}, "word_embed_proj_dim"),
        ({"model_type": "gemma2", "use_bidirectional_attention": True}, "bidirectional"),
        ({"model_type": "gemma2", "sliding_window": None}, "sliding_window"),
        ({"model_type": "gemma3"}, "hidden_size|num_hidden_layers"),
        ({"model_type": "smollm3", "no_rope_layers": [1]}, "no_rope_layers"),
        ({"model_type": "qwen3", "layer_types": ["x", "y"]}, "unknown layer type 'x'"),
    ],
)
def test_refusals(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        shape(**changes)


@pytest.mark.parametrize(
    "changes",
    [
        {"attention_types": [[["global"], 1]]},
        {"attention_types": [[["global", "far"], 1]]},
        {"attention_types": [[["local"], 10**12]]},
        {"attention_types": 3},
        {"scale_attn_weights": 2},
    ],
)
def test_gpt_neo_refusals(changes: dict[str, Any]) -> None:
    values = {**LLAMA, "model_type": "gpt_neo", "num_layers": 2, "num_heads": 4, **changes}
    with pytest.raises(ModelError):
        read_config(values)


def test_gpt2_refuses_scaling_by_layer() -> None:
    values = {"model_type": "gpt2", "vocab_size": 9, "n_embd": 8, "n_layer": 1, "n_head": 2}
    values |= {"n_positions": 16}
    assert read_config(values)[0].layers[0].intermediate == 32
    with pytest.raises(ModelError, match="scale_attn_by_inverse_layer_idx"):
        read_config({**values, "scale_attn_by_inverse_layer_idx": True})


JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=6,
)
CONFIGS = [
    tiny.MODELS[name]().config.to_dict()
    for name in (
        *("llama-yarn", "gemma2", "gemma3_text", "gpt_neo", "phi3-longrope", "ministral3"),
        *("olmo3-yarn", "hunyuan-alpha", "granite4-rope", "falcon-new", "mistral3-vision"),
        *("exaone4", "cohere2", "olmo-clipped", "stablelm"),
    )
]


def test_fuzz_starts_from_what_is_valid() -> None:
    for values in CONFIGS:
        assert read_config(values)[0].vocab_size == tiny.VOCAB


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_fuzz(data: st.DataObject) -> None:
    """Whatever stands in a config gives a shape or a ModelError."""
    values = dict(data.draw(st.sampled_from(CONFIGS)))
    names = st.sampled_from(sorted(values)) | st.just("layer_types") | st.just("rope_scaling")
    for name in data.draw(st.lists(names, max_size=3)):
        old = values.get(name)
        if isinstance(old, dict) and old and data.draw(st.booleans()):
            values[name] = {**old, data.draw(st.sampled_from(sorted(old))): data.draw(JUNK)}
        else:
            values[name] = data.draw(JUNK)
    if data.draw(st.booleans()):
        values["model_type"] = data.draw(st.sampled_from(sorted(FAMILIES)))
    with suppress(ModelError):
        config, _, _ = read_config(values)
        for rope in {layer.rope for layer in config.layers} - {None}:
            rope.table(0, 3)


@pytest.mark.parametrize(
    "text", ["", "[]", "{", "nul", '{"a": 1' + "0" * 5000 + "}", "[" * 100_000]
)
def test_broken_json(tmp_path: Path, text: str) -> None:
    path = tmp_path / "config.json"
    path.write_text(text)
    with pytest.raises(ModelError):
        read_json(path)
    path.write_bytes(b"\xff\xfe{}")
    with pytest.raises(ModelError):
        read_json(path)
    with pytest.raises(ModelError, match="cannot read"):
        read_json(tmp_path / "other.json")
    path.write_text(json.dumps(LLAMA))
    assert read_json(path) == LLAMA

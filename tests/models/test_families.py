"""Families that transformers has no code for, in the layout of their own checkpoints."""

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
import transformers

import tiny
from paceline.engines.native import NativeEngine
from paceline.engines.reference import ReferenceEngine
from paceline.errors import ModelError
from paceline.models import load
from paceline.models.families import FAMILIES
from paceline.models.gguf_architectures import ARCHITECTURES
from paceline.models.hf_config import read_config

KV_HEADS, GROUP, HEAD_DIM = 2, 2, 10


def write(folder: Path, config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    (folder / "config.json").write_text(json.dumps(config))
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    safetensors.torch.save_file(contiguous, folder / "model.safetensors")


def check_logits(folder: Path, oracle: transformers.PreTrainedModel) -> None:
    model, ids = load(folder), tiny.tokens(24)
    expected = tiny.oracle(oracle, ids)
    for kind in (ReferenceEngine, NativeEngine):
        rows: list[np.ndarray] = []
        kind(model.config, model.weights).start(ids, lambda _, __, x, rows=rows: rows.append(x))
        np.testing.assert_allclose(np.concatenate(rows), expected, atol=1e-4, rtol=0)


def to_internlm2(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Rename a Llama's tensors; a key/value head's queries, key and value lie together."""
    names = {
        "input_layernorm": "attention_norm",
        "self_attn.o_proj": "attention.wo",
        "post_attention_layernorm": "ffn_norm",
        "mlp.gate_proj": "feed_forward.w1",
        "mlp.up_proj": "feed_forward.w3",
        "mlp.down_proj": "feed_forward.w2",
        "embed_tokens": "tok_embeddings",
        "lm_head": "output",
    }
    tensors = {}
    for name, tensor in state.items():
        for old, new in names.items():
            name = name.replace(old, new)
        if "_proj" not in name:
            tensors[name] = tensor
    for layer in range(tiny.LAYERS):
        for kind in ("weight", "bias"):
            at = f"model.layers.{layer}.self_attn."
            q, k, v = (state[f"{at}{part}_proj.{kind}"] for part in "qkv")
            grouped = [part.reshape(KV_HEADS, -1, HEAD_DIM, *part.shape[1:]) for part in (q, k, v)]
            fused = torch.cat(grouped, 1).reshape(-1, *q.shape[1:])
            tensors[f"model.layers.{layer}.attention.wqkv.{kind}"] = fused
    return tensors


def test_internlm2_is_a_llama_with_interleaved_heads(tmp_path):
    config = tiny.MODELS["llama"]().config
    config.num_key_value_heads, config.attention_bias = KV_HEADS, True
    oracle = tiny.randomised(config)
    values = {**config.to_dict(), "model_type": "internlm2", "bias": True}
    write(tmp_path, values, to_internlm2(oracle.state_dict()))
    check_logits(tmp_path, oracle)


def test_exaone_is_a_llama_with_other_names(tmp_path):
    names = {
        "model.layers": "transformer.h",
        "model.embed_tokens": "transformer.wte",
        "model.norm": "transformer.ln_f",
        "input_layernorm": "ln_1",
        "post_attention_layernorm": "ln_2",
        "self_attn.o_proj": "attn.attention.out_proj",
        "self_attn": "attn.attention",
        "gate_proj": "c_fc_0",
        "up_proj": "c_fc_1",
        "down_proj": "c_proj",
    }
    oracle = tiny.MODELS["llama-llama3"]()
    tensors = {"transformer.rotary.inv_freq": torch.ones(5)}
    for name, tensor in oracle.state_dict().items():
        for old, new in names.items():
            name = name.replace(old, new)
        tensors[name] = tensor
    old = oracle.config.to_dict()
    values = {name: old[name] for name in old if name not in ("num_hidden_layers", "rms_norm_eps")}
    values |= {"model_type": "exaone", "num_layers": old["num_hidden_layers"]}
    values |= {"layer_norm_epsilon": old["rms_norm_eps"], "activation_function": "silu"}
    write(tmp_path, values, tensors)
    check_logits(tmp_path, oracle)


def test_minicpm_is_a_granite_with_other_names(tmp_path):
    scale_emb, scale_depth, base = 12, 1.4, 16
    config = transformers.GraniteConfig(
        **{**tiny.MODELS["granite"]().config.to_dict(), "tie_word_embeddings": True},
    )
    config.embedding_multiplier = float(scale_emb)
    config.residual_multiplier = scale_depth / math.sqrt(tiny.LAYERS)
    config.logits_scaling = config.hidden_size / base
    config.attention_multiplier = HEAD_DIM**-0.5
    oracle = tiny.randomised(config)
    values = {
        **config.to_dict(),
        "model_type": "minicpm",
        "scale_emb": scale_emb,
        "scale_depth": scale_depth,
        "dim_model_base": base,
    }
    state = {name: x for name, x in oracle.state_dict().items() if name != "lm_head.weight"}
    write(tmp_path, values, state)
    check_logits(tmp_path, oracle)


def test_every_family_has_a_tiny_model_or_a_test_here():
    tested = {tiny.MODELS[name]().config.model_type for name in tiny.MODELS}
    assert tested | {"internlm2", "minicpm", "exaone"} == set(FAMILIES)


def test_the_page_of_models_names_every_family_and_architecture():
    page = (Path(__file__).parents[2] / "docs/reference/models.md").read_text()
    rows = [line.split("|")[2:4] for line in page.splitlines() if line.startswith("| ")]
    families, architectures = set(), set()
    for row in rows:
        own = set(re.findall(r"`([^`]+)`", row[0]))
        families |= own
        architectures |= own if "the same" in row[1] else set(re.findall(r"`([^`]+)`", row[1]))
    assert families - {"model_type"} == set(FAMILIES)
    assert architectures == set(ARCHITECTURES)


def test_the_text_of_a_mistral3_may_be_one_of_two():
    values = tiny.MODELS["mistral3-vision"]().config.to_dict()
    assert read_config(values)[0].layers[0].rope.query_growth == 0
    values["text_config"] = {**values["text_config"], "model_type": "mistral4"}
    with pytest.raises(ModelError, match="unknown text model of mistral3 'mistral4'"):
        read_config(values)


def test_queries_of_a_ministral_grow_with_the_position():
    """Where a position is first beyond a multiple of the original context."""
    config = read_config(tiny.MODELS["ministral3"]().config.to_dict())[0]
    scales = config.layers[0].rope.query_scales(5, 15)
    grown = [1 + 0.8 * math.log(1 + position // 7) for position in range(5, 15)]
    np.testing.assert_allclose(scales, grown, rtol=1e-6)
    assert scales[1] == 1 < scales[2] == scales[8] < scales[9]


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("stablelm", {"qk_layernorm": True}, "qk_layernorm in config.json is True"),
        ("stablelm", {"use_parallel_residual": True}, "use_parallel_residual"),
        ("phi", {"qk_layernorm": True}, "qk_layernorm"),
        ("phi", {"use_parallel_residual": False}, "use_parallel_residual"),
        ("cohere", {"use_qk_norm": True}, "use_qk_norm"),
        ("hunyuan", {"use_qk_norm": False}, "use_qk_norm"),
        ("hunyuan", {"use_cla": True}, "use_cla"),
        ("hunyuan", {"rope_scaling": {"type": "dynamic", "alpha": 0}}, "alpha"),
        ("falcon", {"alibi": True}, "alibi"),
        ("falcon", {"num_ln_in_parallel_attn": 2}, "num_ln_in_parallel_attn"),
        ("falcon-new", {"parallel_attn": False}, "parallel_attn"),
        ("falcon-new", {"num_ln_in_parallel_attn": 3}, "num_ln_in_parallel_attn"),
        ("granite", {"logits_scaling": 0}, "logits_scaling"),
        ("granite", {"residual_multiplier": "1"}, "residual_multiplier"),
        ("granite4", {"layer_types": ["mamba"] * 3}, "attention in every layer"),
        ("granite4", {"layer_types": None}, "layer_types"),
        ("granite4", {"num_local_experts": 4}, "num_local_experts"),
        ("granite4", {"position_embedding_type": "alibi"}, "position_embedding_type"),
        ("olmo", {"clip_qkv": -1.0}, "clip_qkv"),
        ("cohere2", {"sliding_window": None}, "sliding_window"),
        ("ministral3", {"rope_parameters": None}, "rope_parameters"),
        ("ministral3", {"rope_scaling": {"llama_4_scaling_beta": "x"}}, "llama_4_scaling_beta"),
    ],
)
def test_what_a_family_cannot_do_is_refused_by_name(name, changes, message):
    values = {**tiny.MODELS[name]().config.to_dict(), **changes}
    if "rope_scaling" in changes:
        values.pop("rope_parameters")
    with pytest.raises(ModelError, match=message):
        read_config(values)


@pytest.mark.parametrize("setting", ["num_experts", "sparse_config"])
def test_minicpm_with_experts_or_sparse_attention_is_refused(setting):
    values = {**tiny.MODELS["llama"]().config.to_dict(), "model_type": "minicpm", setting: 8}
    with pytest.raises(ModelError, match=setting):
        read_config(values)


def test_rope_of_a_hunyuan_checkpoint():
    """The settings of Hunyuan-1.8B-Instruct: a fixed alpha, and mscale settings without use."""
    scaling = {"alpha": 1000.0, "beta_fast": 32, "beta_slow": 1, "factor": 1.0, "mscale": 1.0}
    values = tiny.MODELS["hunyuan"]().config.to_dict()
    values.pop("rope_parameters")
    values |= {"rope_theta": 10000.0, "rope_scaling": {**scaling, "type": "dynamic"}}
    config = read_config(values)[0]
    rope = config.layers[0].rope
    assert (rope.scaling, config.context) == ("default", tiny.CONTEXT)
    assert math.isclose(rope.theta, 1e4 * 1000 ** (14 / 12))


def test_windows_and_ropes_of_mixed_families():
    olmo3 = read_config(tiny.MODELS["olmo3-yarn"]().config.to_dict())[0].layers
    assert [layer.rope.scaling for layer in olmo3] == ["default", "yarn", "default"]
    for name in ("cohere2", "exaone4"):
        layers = read_config(tiny.MODELS[name]().config.to_dict())[0].layers
        assert [layer.window for layer in layers] == [tiny.WINDOW] * 3 + [None]
        assert [layer.rope is None for layer in layers] == [False] * 3 + [True]


def test_a_published_olmo_3_config():
    """Olmo-3-7B: flat settings of older files."""
    config = read_config(
        {
            "model_type": "olmo3",
            "vocab_size": 100278,
            "hidden_size": 4096,
            "num_hidden_layers": 8,
            "num_attention_heads": 32,
            "intermediate_size": 11008,
            "max_position_embeddings": 65536,
            "rope_theta": 500000,
            "rope_scaling": {
                "rope_type": "yarn",
                "factor": 8.0,
                "original_max_position_embeddings": 8192,
                "attention_factor": 1.2079441541679836,
                "beta_fast": 32,
                "beta_slow": 1,
            },
        }
    )[0]
    assert [layer.window for layer in config.layers] == ([4096] * 3 + [None]) * 2
    assert {layer.rope.theta for layer in config.layers} == {5e5}
    assert [layer.rope.scaling for layer in config.layers[2:4]] == ["default", "yarn"]
    assert (config.context, config.norm_eps, config.pre_norm) == (65536, 1e-5, False)

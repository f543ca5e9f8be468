"""Tiny GGUF files, written by the `gguf` package from models of transformers.

`write(model, path)` does what llama.cpp's converter does for the architecture: names by the
package's own table, rows of q and k in rotary pairs, fused matrices cut, norms of Gemma with
their 1. With a block type, matrices are stored in it, and the model gets the values that were
stored: it remains the oracle.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from transformers import PreTrainedModel

import tiny

ARCHITECTURES = {
    **{name: name for name in ("llama", "qwen2", "qwen3", "smollm3", "phi3", "bitnet", "gpt2")},
    **{name: name for name in ("gemma", "gemma2", "olmo", "olmo2", "granite", "arcee", "glm4")},
    **{name: name for name in ("ernie4_5", "seed_oss", "exaone4", "stablelm", "starcoder2")},
    **{name: name for name in ("cohere2", "falcon", "nemotron")},
    "ministral3": "mistral3",
    **{"mistral": "llama", "gemma3_text": "gemma3", "gpt_neox": "gptneox", "olmo3": "olmo2"},
    **{"glm": "chatglm", "hunyuan_v1_dense": "hunyuan-dense", "phi": "phi2", "cohere": "command-r"},
}
PAIRED = ("llama", "mistral3", "smollm3", "olmo", "granite", "arcee")
LAYER_NORMS = (
    *("gpt2", "gptneox", "olmo", "stablelm", "starcoder2", "phi2", "command-r", "cohere2"),
    *("falcon", "nemotron"),
)
WINDOWED = ("gemma2", "gemma3", "phi3", "olmo2", "exaone4", "cohere2")
_NAMES = {  # what the package's table lacks
    "self_attn.attn_sub_norm": "attn_sub_norm",
    "mlp.ffn_sub_norm": "ffn_sub_norm",
}
_SCALES = {
    "gemma2": {
        "attn_logit_softcapping": "attn_logit_softcapping",
        "final_logit_softcapping": "final_logit_softcapping",
    },
    "granite": {
        "attention.scale": "attention_multiplier",
        "embedding_scale": "embedding_multiplier",
        "residual_scale": "residual_multiplier",
        "logit_scale": "logits_scaling",
    },
    "olmo": {"attention.clamp_kqv": "clip_qkv"},
    "command-r": {"logit_scale": "logit_scale"},
    "cohere2": {"logit_scale": "logit_scale"},
}
_HALVES = {
    **{"Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)},
    **{"IQ4_NL": (0,), "IQ4_XS": (0,)},
}

# Variants that such files can describe, besides those of `tiny.MODELS`.
MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    **{
        name: tiny.MODELS[name]
        for name in (
            *("llama", "llama-gqa-tied-bias", "llama-wide-heads", "llama-linear", "llama-yarn"),
            *("mistral", "ministral3", "qwen2", "qwen3", "phi3", "phi3-partial", "phi3-longrope"),
            *("gemma", "gpt2", "gpt_neox", "gpt_neox-sequential", "bitnet-silu-tied"),
            *("mistral-window", "olmo", "olmo-clipped", "olmo2", "olmo2-bias", "olmo3"),
            *("olmo3-yarn", "granite", "granite-bias", "arcee", "ernie4_5", "ernie4_5-bias"),
            *("seed_oss", "exaone4", "exaone4-full", "glm", "glm4", "hunyuan", "hunyuan-alpha"),
            *("stablelm", "stablelm-bias", "phi", "cohere", "cohere2", "falcon", "falcon-new"),
            *("falcon-new-one-norm", "nemotron"),
        )
    },
    "llama-llama3": tiny._build(
        "Llama", max_position_embeddings=32, **tiny._rope("llama3", **tiny._LLAMA3)
    ),
    "smollm3": tiny._build("SmolLM3", **tiny._GQA, num_hidden_layers=5),
    "starcoder2": tiny._build("Starcoder2", **tiny._GQA, sliding_window=None),
    "gemma2": tiny._build(
        "Gemma2", **tiny._GEMMA2 | {"query_pre_attn_scalar": 14}, **tiny._SOFTCAPS
    ),
    "gemma3": tiny._build(
        "Gemma3Text", **tiny._GEMMA2 | {"query_pre_attn_scalar": 14}, num_hidden_layers=7
    ),
}


@torch.no_grad()
def write(
    model: PreTrainedModel,
    path: Path,
    kind: str | Callable[[str], str] = "F32",
    architecture: str | None = None,
    **changes: Any,
) -> None:
    """Write a model.

    Args:
        model: gets the values that were stored.
        path: of the file.
        kind: type of matrices, or one for each name in the file.
        architecture: to call it by another name.
        changes: metadata; keys without dots are those of the architecture, `__` stands for a dot.
            None removes a key.
    """
    config = model.config
    name = ARCHITECTURES[config.model_type]
    writer = gguf.GGUFWriter(path, architecture or name)
    metadata = settings(config, name)
    for key, value in changes.items():
        metadata[key if "." in key else f"{name}.{key.replace('__', '.')}"] = value
    for key, value in metadata.items():
        _add(writer, key.replace(f"{name}.", f"{architecture or name}.", 1), value)
    for tensor, (stored, rows) in _tensors(model, name, kind).items():
        if stored in ("F32", "F16"):
            writer.add_tensor(tensor, rows)
        else:
            writer.add_tensor(tensor, rows, raw_dtype=gguf.GGMLQuantizationType[stored])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    if value is None:
        return
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)


def settings(config: Any, name: str) -> dict[str, Any]:
    """The metadata of a config of transformers."""

    def get(*names: str, default: Any = None) -> Any:
        values = (getattr(config, each, None) for each in names)
        return next((value for value in values if value is not None), default)

    heads, hidden = config.num_attention_heads, config.hidden_size
    head_dim = get("head_dim", default=hidden // heads)
    width = {"gpt2": "n_inner", "falcon": "ffn_hidden_size"}.get(name, "intermediate_size")
    own: dict[str, Any] = {
        "context_length": config.max_position_embeddings,
        "embedding_length": hidden,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": get(width, default=4 * hidden),
        "attention.head_count": heads,
        "attention.head_count_kv": _kv_heads(config),
    }
    if head_dim != hidden // heads:
        own |= {"attention.key_length": head_dim, "attention.value_length": head_dim}
    if name in LAYER_NORMS:
        eps = get("layer_norm_epsilon", "layer_norm_eps", "norm_epsilon", "norm_eps", default=1e-5)
        own["attention.layer_norm_epsilon"] = eps
    else:
        own["attention.layer_norm_rms_epsilon"] = config.rms_norm_eps
    if name in ("gptneox", "stablelm"):
        own["use_parallel_residual"] = config.use_parallel_residual
    if name != "gpt2":
        own |= _rope(config, name, head_dim)
    if name in WINDOWED or config.model_type == "mistral":
        own["attention.sliding_window"] = get("sliding_window")
    if name in ("olmo2", "exaone4") and get("sliding_window"):
        kinds = [kind == "sliding_attention" for kind in config.layer_types]
        own["attention.sliding_window_pattern"] = kinds
    own |= {key: get(setting) for key, setting in _SCALES.get(name, {}).items()}
    tokens = [f"<{i}>" for i in range(config.vocab_size)]
    return {
        **{f"{name}.{key}": value for key, value in own.items()},
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.bos_token_id": config.bos_token_id,
        "tokenizer.ggml.eos_token_id": config.eos_token_id,
    }


def _kv_heads(config: Any) -> int:
    if config.model_type == "falcon" and not config.new_decoder_architecture:
        return 1 if config.multi_query else config.num_attention_heads
    if config.model_type == "falcon":
        return config.num_kv_heads
    return getattr(config, "num_key_value_heads", None) or config.num_attention_heads


def _rope(config: Any, name: str, head_dim: int) -> dict[str, Any]:
    rope = config.rope_parameters
    if name == "gemma3":
        return {
            "rope.freq_base": rope["full_attention"]["rope_theta"],
            "rope.freq_base_swa": rope["sliding_attention"]["rope_theta"],
        }
    if name == "olmo2":  # the scaling is that of full attention; the others have none
        rope = rope.get("full_attention", rope)
    dim = int(head_dim * rope.get("partial_rotary_factor", 1.0))
    own: dict[str, Any] = {"rope.freq_base": rope["rope_theta"], "rope.dimension_count": dim}
    kind = rope["rope_type"]
    if "alpha" in rope:
        own["rope.freq_base"] *= rope["alpha"] ** (head_dim / (head_dim - 2))
    if kind in ("linear", "yarn"):
        own |= {"rope.scaling.type": kind, "rope.scaling.factor": rope["factor"]}
    if kind == "yarn":
        original = rope["original_max_position_embeddings"]
        own["rope.scaling.original_context_length"] = original
    if name == "mistral3":
        own["rope.scaling.yarn_log_multiplier"] = rope["mscale_all_dim"]
        own["attention.temperature_scale"] = rope["llama_4_scaling_beta"]
    if kind == "longrope":
        original = config.original_max_position_embeddings
        stretch = config.max_position_embeddings / original
        factor = math.sqrt(1 + math.log(stretch) / math.log(original))
        own["rope.scaling.original_context_length"] = original
        own["rope.scaling.attn_factor"] = factor
    return own


def _rope_tensors(config: Any, dim: int) -> dict[str, np.ndarray]:
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") == "longrope":
        return {
            f"rope_factors_{each}.weight": np.array(rope[f"{each}_factor"], np.float32)
            for each in ("short", "long")
        }
    if rope.get("rope_type") != "llama3":
        return {}
    waves = 2 * math.pi * rope["rope_theta"] ** (np.arange(0, dim, 2) / dim)
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    kept = rope["original_max_position_embeddings"] / waves
    blend = np.clip((kept - low) / (high - low), 0, 1)
    return {"rope_freqs.weight": (1 / ((1 - blend) / rope["factor"] + blend)).astype(np.float32)}


def _tensors(
    model: PreTrainedModel, name: str, kind: str | Callable[[str], str]
) -> Mapping[str, tuple[str, np.ndarray]]:
    """Tensors as they are stored, with their types."""
    config = model.config
    arch = next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == name)
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    heads = config.num_attention_heads
    kv_heads = _kv_heads(config)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    tensors = {each: ("F32", values) for each, values in _rope_tensors(config, head_dim).items()}
    for own, parameter in model.state_dict().items():
        if own in ("lm_head.weight", "embed_out.weight") and config.tie_word_embeddings:
            continue
        stem, _, end = own.rpartition(".")
        target = names.get_name(stem) or next(
            f"blk.{own.split('.')[2]}.{new}" for old, new in _NAMES.items() if old in own
        )
        folded = name.startswith(("gemma", "nemotron")) and own.endswith("norm.weight")
        tensor = f"{target}.{end}"
        turned = name == "gpt2" and target.startswith("blk.") and parameter.ndim == 2
        values = (parameter.T if turned else parameter).float().numpy().copy()
        stored, rows = "F32", values
        if values.ndim == 2 and "position" not in tensor:
            stored = kind if isinstance(kind, str) else kind(tensor)
            rows, values = encode(stored, values)
            parameter.copy_(torch.from_numpy(values.T if turned else values))
        if folded:
            rows = rows + np.float32(1)
        if name in PAIRED and ".attn_q." in tensor:
            rows = _pairs(rows, heads)
        if name in PAIRED and ".attn_k." in tensor:
            rows = _pairs(rows, kv_heads)
        if name == "gptneox" and ".attn_qkv." in tensor:
            rows = _apart(rows, heads, heads, head_dim)
        if name == "falcon" and ".attn_qkv." in tensor:
            rows = _apart(rows, heads, kv_heads, head_dim)
        tensors[tensor] = (stored, np.ascontiguousarray(rows))
    return tensors


def _pairs(rows: np.ndarray, heads: int) -> np.ndarray:
    """Rows of each head in rotary pairs: 0, h / 2, 1, h / 2 + 1 ..."""
    return rows.reshape(heads, 2, -1, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def _apart(rows: np.ndarray, heads: int, kv_heads: int, head_dim: int) -> np.ndarray:
    """Fused rows as all queries, all keys, all values; they lie by key/value head."""
    groups = rows.reshape(kv_heads, heads // kv_heads + 2, head_dim, *rows.shape[1:])
    parts = (groups[:, :-2], groups[:, -2], groups[:, -1])
    return np.concatenate([part.reshape(-1, *rows.shape[1:]) for part in parts])


def encode(kind: str, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows as a type stores them, and the values that these are; of K types random ones."""
    if kind == "F32":
        return values, values
    if kind == "F16":
        rows = values.astype(np.float16)
        return rows, rows.astype(np.float32)
    number = gguf.GGMLQuantizationType[kind]
    if kind in _HALVES:
        weights, nbytes = gguf.GGML_QUANT_SIZES[number]
        random = np.random.default_rng(values.size)
        blocks = random.integers(0, 256, (values.size // weights, nbytes), np.uint8)
        for at in _HALVES[kind]:
            scales = random.uniform(0.5, 1.5, len(blocks)) * 2e-4
            blocks[:, at : at + 2] = scales.astype(np.float16)[:, None].view(np.uint8)
        rows = blocks.reshape(len(values), -1)
    else:
        rows = gguf.quants.quantize(values, number)
    return rows, gguf.quants.dequantize(rows, number)

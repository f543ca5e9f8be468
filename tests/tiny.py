"""Tiny random models of every family and variant, built by transformers: the oracle of the tests.

`MODELS[name]()` gives a model in fp32; `save(name, folder)` writes it as a checkpoint. Sizes are
odd on purpose: no head, row or vocabulary is a multiple of a vector's width.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from transformers import PreTrainedConfig, PreTrainedModel

torch.set_num_threads(1)  # models this small only wait for one another

LAYERS = 3
WINDOW = 5
CONTEXT = 64
VOCAB = 67

_COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 40,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "intermediate_size": 52,
    "max_position_embeddings": CONTEXT,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
    "attn_implementation": "eager",
}
_GQA = {"num_key_value_heads": 2}
_ALTERNATING = ["sliding_attention", "full_attention", "sliding_attention"]


def _rope(kind: str, theta: float = 1e4, **settings: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": theta, **settings}}


def _build(family: str, **settings: Any) -> Callable[[], PreTrainedModel]:
    def build() -> PreTrainedModel:
        config = getattr(transformers, f"{family}Config")(**{**_COMMON, **settings})
        return randomised(config)

    return build


def randomised(
    config: PreTrainedConfig,
    create: Callable[[PreTrainedConfig], PreTrainedModel] = (
        transformers.AutoModelForCausalLM.from_config
    ),
) -> PreTrainedModel:
    """A model with every parameter drawn, norms and biases too, so that no mistake hides."""
    torch.manual_seed(0)
    model = create(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, parameter.shape[-1] ** -0.5)
            elif name.endswith("bias"):
                parameter.normal_(0, 0.2)
            else:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return model.eval()


def _mistral3_with_vision(text: str) -> Callable[[], PreTrainedModel]:
    rope = _rope("yarn", **_MINISTRAL3_ROPE) if text == "ministral3" else _rope("default")

    def build() -> PreTrainedModel:
        config = transformers.Mistral3Config(
            text_config={**_COMMON, **_MINISTRAL3, **rope, "model_type": text},
            vision_config={
                "model_type": "pixtral",
                "hidden_size": 8,
                "intermediate_size": 8,
                "num_hidden_layers": 1,
                "num_attention_heads": 1,
                "head_dim": 8,
                "image_size": 8,
                "patch_size": 4,
            },
            tie_word_embeddings=False,
            image_token_index=VOCAB - 1,
            attn_implementation="eager",
        )
        return randomised(config, transformers.Mistral3ForConditionalGeneration)

    return build


def _gemma3_with_vision() -> PreTrainedModel:
    text = {**_COMMON, **_GQA, "head_dim": 14, "sliding_window": WINDOW}
    config = transformers.Gemma3Config(
        text_config={**text, "layer_types": _ALTERNATING, "query_pre_attn_scalar": 11},
        vision_config={
            "hidden_size": 8,
            "intermediate_size": 8,
            "num_hidden_layers": 1,
            "num_attention_heads": 1,
            "image_size": 8,
            "patch_size": 4,
        },
        mm_tokens_per_image=4,
        image_token_index=VOCAB - 1,
        attn_implementation="eager",
    )
    return randomised(config, transformers.Gemma3ForConditionalGeneration)


_NEW_FALCON = {"new_decoder_architecture": True, "num_kv_heads": 2, "ffn_hidden_size": 52}
_YARN = {"factor": 4.0, "original_max_position_embeddings": 16}
_MINISTRAL3_ROPE = {
    **_YARN,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "llama_4_scaling_beta": 0.8,
    "original_max_position_embeddings": 7,
}
_MINISTRAL3 = {**_GQA, "head_dim": 14, "sliding_window": None}
_LLAMA3 = {**_YARN, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
_LONGROPE = {
    "short_factor": [1.0, 1.1, 1.3, 1.7],
    "long_factor": [2.0, 3.0, 4.0, 5.0],
    "partial_rotary_factor": 0.8,
}
_SHARE = {"partial_rotary_factor": 0.6}
_OLMO3 = {
    "full_attention": {"rope_type": "yarn", "rope_theta": 1e4, **_YARN},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
}
_DENSE = {
    "num_local_experts": 0,
    "shared_intermediate_size": 52,
    "layer_types": ["full_attention"] * LAYERS,
    "mamba_n_heads": 4,
}
_GRANITE = {
    "embedding_multiplier": 3.0,
    "attention_multiplier": 0.2,
    "residual_multiplier": 0.4,
    "logits_scaling": 1.7,
}
_GEMMA = {"head_dim": 14, **_GQA}
_GEMMA2 = {**_GEMMA, "sliding_window": WINDOW, "query_pre_attn_scalar": 11}
_SOFTCAPS = {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 1.5}
_GPT2 = {"n_embd": 40, "n_layer": LAYERS, "n_head": 4, "n_positions": CONTEXT}
_GPT_NEO = {
    "num_layers": LAYERS,
    "num_heads": 4,
    "attention_types": [[["global", "local", "local"], 1]],
    "window_size": WINDOW,
}

MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": _build("Llama"),
    "llama-gqa-tied-bias": _build(
        "Llama", **_GQA, tie_word_embeddings=True, attention_bias=True, mlp_bias=True
    ),
    "llama-wide-heads": _build("Llama", num_key_value_heads=1, head_dim=18),
    "llama-linear": _build("Llama", **_rope("linear", factor=3.0)),
    "llama-dynamic": _build("Llama", **_rope("dynamic", factor=2.0)),
    "llama-llama3": _build("Llama", **_rope("llama3", **_LLAMA3)),
    "llama-yarn": _build("Llama", **_rope("yarn", **_YARN)),
    "mistral": _build("Mistral", **_GQA, sliding_window=None),
    "mistral-window": _build("Mistral", **_GQA, sliding_window=WINDOW),
    "ministral3": _build("Ministral3", **_MINISTRAL3 | _rope("yarn", **_MINISTRAL3_ROPE)),
    "mistral3-vision": _mistral3_with_vision("mistral"),
    "mistral3-ministral-vision": _mistral3_with_vision("ministral3"),
    "qwen2": _build("Qwen2", **_GQA),
    "qwen2-window": _build(
        "Qwen2", **_GQA, use_sliding_window=True, sliding_window=WINDOW, max_window_layers=1
    ),
    "qwen3": _build("Qwen3", **_GQA, head_dim=14),
    "qwen3-mixed": _build(
        "Qwen3",
        **_GQA,
        head_dim=14,
        use_sliding_window=True,
        sliding_window=WINDOW,
        layer_types=_ALTERNATING,
    ),
    "smollm3": _build("SmolLM3", **_GQA, no_rope_layer_interval=2),
    "smollm3-window": _build(
        "SmolLM3", **_GQA, no_rope_layers=[1, 0, 1], use_sliding_window=True, sliding_window=WINDOW
    ),
    "phi3": _build("Phi3", **_GQA, sliding_window=WINDOW),
    "phi3-partial": _build("Phi3", **_rope("default", partial_rotary_factor=0.6)),
    "phi3-longrope": _build(
        "Phi3", original_max_position_embeddings=32, **_rope("longrope", **_LONGROPE)
    ),
    "gemma": _build("Gemma", **_GEMMA),
    "gemma2": _build("Gemma2", **_GEMMA2, **_SOFTCAPS),
    "vaultgemma": _build("VaultGemma", **_GEMMA2, **_SOFTCAPS, layer_types=_ALTERNATING),
    "gemma3_text": _build("Gemma3Text", **_GEMMA2, layer_types=_ALTERNATING),
    "gemma3-vision": _gemma3_with_vision,
    "gpt2": _build("GPT2", **_GPT2),
    "gpt2-unscaled": _build("GPT2", **_GPT2, scale_attn_weights=False, n_inner=44),
    "gpt_neo": _build("GPTNeo", **_GPT_NEO),
    "gpt_neox": _build("GPTNeoX", **_rope("default", partial_rotary_factor=0.6)),
    "gpt_neox-sequential": _build("GPTNeoX", use_parallel_residual=False, attention_bias=False),
    "opt": _build("OPT", ffn_dim=52, word_embed_proj_dim=40),
    "opt-without-bias": _build("OPT", ffn_dim=52, word_embed_proj_dim=40, enable_bias=False),
    "bitnet": _build("BitNet", **_GQA),
    "bitnet-silu-tied": _build("BitNet", **_GQA, hidden_act="silu", tie_word_embeddings=True),
    "ministral": _build("Ministral", **_GQA, head_dim=14, sliding_window=WINDOW),
    "olmo": _build("Olmo", **_GQA),
    "olmo-clipped": _build("Olmo", clip_qkv=0.7, tie_word_embeddings=True),
    "olmo2": _build("Olmo2", **_GQA),
    "olmo2-bias": _build("Olmo2", attention_bias=True),
    "olmo3": _build("Olmo3", **_GQA, sliding_window=WINDOW, num_hidden_layers=4),
    "olmo3-yarn": _build(
        "Olmo3", **_GQA, sliding_window=WINDOW, layer_types=_ALTERNATING, rope_parameters=_OLMO3
    ),
    "granite": _build("Granite", **_GQA, **_GRANITE),
    "granite-bias": _build("Granite", **_GRANITE, attention_bias=True, mlp_bias=True),
    "granite4": _build("GraniteMoeHybrid", **_GQA, **_GRANITE, **_DENSE),
    "granite4-rope": _build(
        "GraniteMoeHybrid", **_GQA, **_GRANITE, **_DENSE, position_embedding_type="rope"
    ),
    "arcee": _build("Arcee", **_GQA, mlp_bias=True),
    "ernie4_5": _build("Ernie4_5", **_GQA, head_dim=14),
    "ernie4_5-bias": _build("Ernie4_5", **_GQA, head_dim=10, use_bias=True),
    "seed_oss": _build("SeedOss", **_GQA, head_dim=14),
    "exaone4": _build("Exaone4", **_GQA, sliding_window=WINDOW, num_hidden_layers=4),
    "exaone4-full": _build(
        "Exaone4", **_GQA, sliding_window=None, layer_types=["full_attention"] * LAYERS
    ),
    "glm": _build("Glm", **_GQA, head_dim=16),
    "glm4": _build("Glm4", **_GQA, head_dim=16),
    "helium": _build("Helium", **_GQA, head_dim=10),
    "hunyuan": _build("HunYuanDenseV1", **_GQA, head_dim=14),
    "hunyuan-alpha": _build(
        "HunYuanDenseV1",
        **_GQA,
        head_dim=14,
        attention_bias=True,
        **_rope("dynamic", alpha=50.0, factor=1.0),
    ),
    "stablelm": _build("StableLm", num_key_value_heads=4, **_rope("default", **_SHARE)),
    "stablelm-bias": _build("StableLm", **_GQA, use_qkv_bias=True, **_rope("default", **_SHARE)),
    "starcoder2": _build("Starcoder2", **_GQA),
    "starcoder2-window": _build(
        "Starcoder2", **_GQA, sliding_window=WINDOW, use_bias=False, tie_word_embeddings=False
    ),
    "phi": _build("Phi", **_rope("default", **_SHARE)),
    "cohere": _build("Cohere", **_GQA, logit_scale=0.3),
    "cohere2": _build(
        "Cohere2", **_GQA, logit_scale=0.3, sliding_window=WINDOW, num_hidden_layers=4
    ),
    "falcon": _build("Falcon", ffn_hidden_size=52),
    "falcon-bias": _build("Falcon", multi_query=False, bias=True, ffn_hidden_size=52),
    "falcon-sequential": _build("Falcon", parallel_attn=False),
    "falcon-new": _build("Falcon", **_NEW_FALCON),
    "falcon-new-one-norm": _build("Falcon", **_NEW_FALCON, num_ln_in_parallel_attn=1),
    "nemotron": _build("Nemotron", **_GQA, **_rope("default", **_SHARE)),
}


def save(name: str, folder: Path, **options: Any) -> PreTrainedModel:
    """Write `MODELS[name]` to `folder` as transformers does; return it."""
    model = MODELS[name]()
    model.save_pretrained(folder, **options)
    return model


def tokens(count: int, seed: int = 0) -> np.ndarray:
    """Random token ids, int32 [count]."""
    return np.random.default_rng(seed).integers(3, VOCAB - 1, count).astype(np.int32)


@torch.inference_mode()
def oracle(model: PreTrainedModel, ids: np.ndarray) -> np.ndarray:
    """Logits of transformers, float32 [N, V]."""
    return model(torch.tensor(ids[None].astype(np.int64))).logits[0].float().numpy()

"""Families with RMS norms: Llama and what came from it.

The facts are those of the `transformers` implementations, or of the models' own code where
`transformers` has none.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from paceline.errors import ModelError, unknown
from paceline.models import layer_variants, scales
from paceline.models.family import Family

_NORMS = {"input_layernorm": "attn_norm", "post_attention_layernorm": "mlp_norm"}
_ATTENTION = {f"self_attn.{name}_proj": name for name in "qkvo"}
_MLP = {f"mlp.{name}_proj": name for name in ("gate", "up", "down")}
_QK_NORMS = {"self_attn.q_norm": "q_norm", "self_attn.k_norm": "k_norm"}
_CAUSAL = {"use_bidirectional_attention": (False,)}
_POST_NORMS = {
    "post_attention_layernorm": "attn_post_norm",
    "post_feedforward_layernorm": "mlp_post_norm",
}
_FUSED_MLP = {"mlp.gate_up_proj": "gate up", "mlp.down_proj": "down"}
_CLOSE = {"rms_norm_eps": 1e-5}

_LLAMA = Family(
    layer=_NORMS | _ATTENTION | _MLP,
    biases=(("q k v o", "attention_bias"), ("gate up down", "mlp_bias")),
)
_QWEN2 = replace(
    _LLAMA,
    biases=(("q k v", "always"),),
    defaults={"sliding_window": 4096},
    windows=layer_variants.typed_windows(layer_variants.after_first_layers),
)
_GEMMA = Family(
    layer=_LLAMA.layer,
    biases=(("q k v o", "attention_bias"),),
    defaults={"tie_word_embeddings": True, "head_dim": 256, "hidden_act": "gelu_pytorch_tanh"},
    fixed=_CAUSAL,
    norm_offset=1.0,
    scales=scales.root_of_width,
)
_GEMMA2 = replace(
    _GEMMA,
    layer={
        **_ATTENTION,
        **_MLP,
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "attn_post_norm",
        "pre_feedforward_layernorm": "mlp_norm",
        "post_feedforward_layernorm": "mlp_post_norm",
    },
    names={"hidden_act": "hidden_activation"},
    defaults={
        **_GEMMA.defaults,
        "query_pre_attn_scalar": 256,
        "sliding_window": 4096,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
    },
    windows=layer_variants.typed_windows(layer_variants.every_other),
)
_GEMMA3 = replace(
    _GEMMA2,
    layer={**_GEMMA2.layer, **_QK_NORMS},
    defaults={
        **_GEMMA.defaults,
        "query_pre_attn_scalar": 256,
        "sliding_window": 4096,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "vocab_size": 262_208,
        "max_position_embeddings": 131_072,
    },
    windows=layer_variants.typed_windows(layer_variants.five_of_six),
    ropes=layer_variants.gemma3_ropes,
)
_MISTRAL = replace(
    _LLAMA, biases=(), defaults={"sliding_window": 4096}, windows=layer_variants.one_window
)
_MINISTRAL3 = replace(
    _MISTRAL,
    defaults={**_CLOSE, "head_dim": 128, "num_key_value_heads": 8},
    ropes=layer_variants.ministral3_ropes,
)
_OLMO2 = replace(
    _LLAMA,
    layer={**_ATTENTION, **_MLP, **_QK_NORMS, **_POST_NORMS},
    biases=(("q k v o", "attention_bias"),),
    defaults=_CLOSE,
    qk_norm="width",
)
_GRANITE = replace(_LLAMA, scales=scales.granite)
_GLM = replace(
    _LLAMA,
    layer={**_NORMS, **_ATTENTION, **_FUSED_MLP},
    biases=(("q k v", "attention_bias"),),
    defaults={
        "rms_norm_eps": 1.5625e-07,
        "num_key_value_heads": 2,
        "head_dim": 128,
        "partial_rotary_factor": 0.5,
        "attention_bias": True,
    },
    adjacent_rope=True,
)
_INTERNLM2 = replace(
    _LLAMA,
    outer={"tok_embeddings": "embed", "norm": "final_norm", "output": "head"},
    layer={
        "attention_norm": "attn_norm",
        "attention.wqkv": "q k v",
        "attention.wo": "o",
        "ffn_norm": "mlp_norm",
        "feed_forward.w1": "gate",
        "feed_forward.w3": "up",
        "feed_forward.w2": "down",
    },
    interleaved=True,
    biases=(("q k v o", "bias"),),
    defaults={"bias": True},
)


def _with_vision(text: str, family: Family) -> Family:
    """Return a family inside a model that sees images, whose other parts are left out."""
    return replace(
        family,
        nested="text_config",
        text=text,
        prefixes=("language_model.model.", "model.language_model.", "language_model.", "model."),
        skipped=r"^(vision_tower|multi_modal_projector)\.",
    )


def _mistral3(values: Mapping[str, Any]) -> Family:
    """Return the family of the text model inside a Mistral 3.

    Raises:
        ModelError: it is neither of the two that are known.
    """
    text = values.get("text_config")
    kind = text.get("model_type", "mistral") if isinstance(text, dict) else "mistral"
    known = {"mistral": _MISTRAL, "ministral3": _MINISTRAL3}
    if not isinstance(kind, str) or kind not in known:
        raise ModelError(unknown("text model of mistral3", str(kind), known))
    family = _with_vision(kind, known[kind])
    return replace(family, defaults={**family.defaults, "tie_word_embeddings": True})


RMS_FAMILIES: dict[str, Family] = {
    "llama": _LLAMA,
    "mistral": _MISTRAL,
    "ministral": replace(
        _LLAMA,
        biases=(),
        defaults={"sliding_window": 4096},
        windows=layer_variants.typed_windows(layer_variants.all_with_window),
    ),
    "ministral3": _MINISTRAL3,
    "mistral3": replace(_with_vision("ministral3", _MINISTRAL3), variant=_mistral3),
    "qwen2": _QWEN2,
    "qwen3": replace(
        _QWEN2,
        layer={**_LLAMA.layer, **_QK_NORMS},
        biases=(("q k v o", "attention_bias"),),
        defaults={"sliding_window": 4096, "head_dim": 128},
    ),
    "smollm3": replace(
        _LLAMA,
        defaults={"tie_word_embeddings": True, "rope_theta": 2e6},
        windows=layer_variants.typed_windows(layer_variants.without_rope),
        ropes=layer_variants.smollm3_ropes,
    ),
    "phi3": replace(
        _LLAMA,
        layer={
            **_NORMS,
            "self_attn.qkv_proj": "q k v",
            "self_attn.o_proj": "o",
            "mlp.gate_up_proj": "gate up",
            "mlp.down_proj": "down",
        },
        biases=(),
        windows=layer_variants.one_window,
    ),
    "bitnet": replace(
        _LLAMA,
        layer={
            **_LLAMA.layer,
            "self_attn.attn_sub_norm": "attn_inner_norm",
            "mlp.ffn_sub_norm": "mlp_inner_norm",
        },
        biases=(("q k v o", "attention_bias"),),
        defaults={"hidden_act": "relu2", "rope_theta": 5e5},
    ),
    "gemma": _GEMMA,
    "gemma2": _GEMMA2,
    "gemma3_text": _GEMMA3,
    "gemma3": _with_vision("gemma3_text", _GEMMA3),
    "vaultgemma": replace(
        _GEMMA2,
        layer={
            **_ATTENTION,
            **_MLP,
            "input_layernorm": "attn_norm",
            "pre_feedforward_layernorm": "mlp_norm",
        },
    ),
    "olmo": replace(
        _LLAMA,
        layer={**_ATTENTION, **_MLP},
        outer={"embed_tokens": "embed", "lm_head": "head"},
        biases=(("q k v o", "attention_bias"),),
        names={"qkv_clip": "clip_qkv"},
        defaults={"norm_eps": 1e-5},
        norm="plain",
    ),
    "olmo2": _OLMO2,
    "olmo3": replace(
        _OLMO2,
        defaults={**_CLOSE, "sliding_window": 4096},
        windows=layer_variants.typed_windows(layer_variants.three_of_four),
        ropes=layer_variants.olmo3_ropes,
    ),
    "granite": _GRANITE,
    "granitemoehybrid": replace(
        _GRANITE,
        layer={
            **_NORMS,
            **_ATTENTION,
            "shared_mlp.input_linear": "gate up",
            "shared_mlp.output_linear": "down",
        },
        biases=(("q k v o", "attention_bias"),),
        names={"intermediate_size": "shared_intermediate_size"},
        fixed={"num_local_experts": (0,)},
        windows=layer_variants.attention_only,
        ropes=layer_variants.rope_if_named,
    ),
    "arcee": replace(
        _LLAMA,
        layer={**_NORMS, **_ATTENTION, "mlp.up_proj": "up", "mlp.down_proj": "down"},
        biases=(("q k v o", "attention_bias"), ("up down", "mlp_bias")),
        defaults={**_CLOSE, "hidden_act": "relu2"},
    ),
    "ernie4_5": replace(
        _LLAMA,
        biases=(("q k v o gate up down", "use_bias"),),
        defaults={
            **_CLOSE,
            "rope_theta": 5e5,
            "head_dim": 128,
            "num_key_value_heads": 2,
            "tie_word_embeddings": True,
        },
        adjacent_rope=True,
    ),
    "seed_oss": replace(
        _LLAMA,
        biases=(
            ("q k v", "attention_bias"),
            ("o", "attention_out_bias"),
            ("gate up down", "mlp_bias"),
        ),
        defaults={"attention_bias": True, "head_dim": 128, "num_key_value_heads": 8},
    ),
    "exaone": replace(
        _LLAMA,
        outer={"wte": "embed", "ln_f": "final_norm", "lm_head": "head"},
        at="h.{i}.",
        prefixes=("transformer.",),
        layer={
            "ln_1": "attn_norm",
            **{f"attn.attention.{name}_proj": name for name in "qkv"},
            "attn.attention.out_proj": "o",
            "ln_2": "mlp_norm",
            "mlp.c_fc_0": "gate",
            "mlp.c_fc_1": "up",
            "mlp.c_proj": "down",
        },
        skipped=r"(^|\.)rotary(_emb)?\.inv_freq$",
        biases=(),
        names={
            "num_hidden_layers": "num_layers",
            "hidden_act": "activation_function",
            "norm_eps": "layer_norm_epsilon",
        },
        defaults={"norm_eps": 1e-5},
    ),
    "exaone4": replace(
        _OLMO2,
        biases=(),
        defaults={**_CLOSE, "num_key_value_heads": 32, "sliding_window": 4096},
        qk_norm="head",
        windows=layer_variants.typed_windows(layer_variants.three_of_four),
        ropes=layer_variants.exaone4_ropes,
    ),
    "glm": _GLM,
    "glm4": replace(
        _GLM,
        layer={
            **_GLM.layer,
            "post_self_attn_layernorm": "attn_post_norm",
            "post_mlp_layernorm": "mlp_post_norm",
        },
    ),
    "helium": replace(
        _LLAMA,
        biases=(("q k v", "attention_bias"), ("gate up down", "mlp_bias")),
        defaults={
            "rms_norm_eps": 1e-8,
            "rope_theta": 1e5,
            "head_dim": 128,
            "num_key_value_heads": 20,
        },
        adjacent_rope=True,
    ),
    "hunyuan_v1_dense": replace(
        _LLAMA,
        layer={
            **_LLAMA.layer,
            "self_attn.query_layernorm": "q_norm",
            "self_attn.key_layernorm": "k_norm",
        },
        biases=(("q k v o", "attention_bias"),),
        defaults=_CLOSE,
        fixed={"use_qk_norm": (True,), "use_cla": (False,)},
        qk_norm="rotated",
        ropes=layer_variants.hunyuan_ropes,
    ),
    "internlm2": _INTERNLM2,
    "minicpm": replace(
        _LLAMA,
        biases=(("q k v o", "attention_bias"),),
        defaults={"tie_word_embeddings": True},
        fixed={"num_experts": (0,), "sparse_config": (None,)},
        scales=scales.minicpm,
    ),
}

"""Families with layer norms: GPT-2 and what came from it, Cohere, Falcon.

The facts are those of the `transformers` implementations.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from paceline.models import layer_variants, scales
from paceline.models.family import Family

_NORMS = {"input_layernorm": "attn_norm", "post_attention_layernorm": "mlp_norm"}
_ATTENTION = {f"self_attn.{name}_proj": name for name in "qkvo"}
_MLP = {f"mlp.{name}_proj": name for name in ("gate", "up", "down")}
_ONE_NORM = {"mlp_norm": "attn_norm"}  # attention and MLP read the same input
_ALWAYS_PARALLEL = {"use_parallel_residual": (True,)}
_GPT_OUTER = {"wte": "embed", "wpe": "positions", "ln_f": "final_norm", "lm_head": "head"}
_GPT_NAMES = {"num_attention_heads": "n_head", "num_hidden_layers": "n_layer"}

_GPT2 = Family(
    outer=_GPT_OUTER,
    at="h.{i}.",
    prefixes=("transformer.",),
    layer={
        "ln_1": "attn_norm",
        "attn.c_attn": "q k v",
        "attn.c_proj": "o",
        "ln_2": "mlp_norm",
        "mlp.c_fc": "up",
        "mlp.c_proj": "down",
    },
    skipped=r"\.attn\.(masked_)?bias$",
    transposed=True,
    biases=(("q k v o up down", "always"),),
    names={
        **_GPT_NAMES,
        "hidden_size": "n_embd",
        "max_position_embeddings": "n_positions",
        "intermediate_size": "n_inner",
        "hidden_act": "activation_function",
        "norm_eps": "layer_norm_epsilon",
    },
    defaults={"hidden_act": "gelu_new", "norm_eps": 1e-5, "tie_word_embeddings": True},
    fixed={"scale_attn_by_inverse_layer_idx": (False,), "add_cross_attention": (False,)},
    ropes=layer_variants.no_rope,
    norm="layer",
)
_GPT_NEO = replace(
    _GPT2,
    layer={
        "ln_1": "attn_norm",
        **{f"attn.attention.{name}_proj": name for name in "qkv"},
        "attn.attention.out_proj": "o",
        "ln_2": "mlp_norm",
        "mlp.c_fc": "up",
        "mlp.c_proj": "down",
    },
    skipped=r"\.attention\.(masked_)?bias$",
    transposed=False,
    biases=(("o up down", "always"),),
    names={
        "num_attention_heads": "num_heads",
        "num_hidden_layers": "num_layers",
        "hidden_act": "activation_function",
        "norm_eps": "layer_norm_epsilon",
    },
    defaults={**_GPT2.defaults, "scale_attn_weights": False},
    fixed={},
    windows=layer_variants.gpt_neo_windows,
)
_GPT_NEOX = Family(
    outer={"embed_in": "embed", "final_layer_norm": "final_norm", "embed_out": "head"},
    prefixes=("gpt_neox.",),
    aliases={"lm_head.weight": "embed_out.weight"},
    layer={
        **_NORMS,
        "attention.query_key_value": "q k v",
        "attention.dense": "o",
        "mlp.dense_h_to_4h": "up",
        "mlp.dense_4h_to_h": "down",
    },
    skipped=r"\.attention\.((masked_)?bias|rotary_emb\.inv_freq)$",
    interleaved=True,
    biases=(("q k v o", "attention_bias"), ("up down", "always")),
    names={
        "rope_theta": "rotary_emb_base",
        "partial_rotary_factor": "rotary_pct",
        "norm_eps": "layer_norm_eps",
    },
    defaults={
        "hidden_act": "gelu",
        "partial_rotary_factor": 0.25,
        "norm_eps": 1e-5,
        "attention_bias": True,
        "use_parallel_residual": True,
    },
    norm="layer",
)
_OPT = Family(
    outer={
        "embed_tokens": "embed",
        "embed_positions": "positions",
        "final_layer_norm": "final_norm",
        "lm_head": "head",
    },
    prefixes=("model.decoder.", "decoder."),
    layer={
        "self_attn_layer_norm": "attn_norm",
        **{f"self_attn.{name}_proj": name for name in "qkv"},
        "self_attn.out_proj": "o",
        "final_layer_norm": "mlp_norm",
        "fc1": "up",
        "fc2": "down",
    },
    biases=(("q k v o up down", "enable_bias"),),
    names={"intermediate_size": "ffn_dim", "hidden_act": "activation_function"},
    defaults={
        "hidden_act": "relu",
        "norm_eps": 1e-5,
        "enable_bias": True,
        "tie_word_embeddings": True,
    },
    fixed={
        "do_layer_norm_before": (True,),
        "_remove_final_layer_norm": (False,),
        "layer_norm_elementwise_affine": (True,),
    },
    ropes=layer_variants.no_rope,
    norm="layer",
    position_offset=2,
)
_STABLELM = Family(
    layer={**_NORMS, **_ATTENTION, **_MLP},
    biases=(("q k v", "use_qkv_bias"),),
    names={"norm_eps": "layer_norm_eps"},
    defaults={"partial_rotary_factor": 0.25, "norm_eps": 1e-5},
    fixed={"qk_layernorm": (False,), "use_parallel_residual": (False,)},
    norm="layer",
)
_COHERE = Family(
    layer={"input_layernorm": "attn_norm", **_ATTENTION, **_MLP},
    shared=_ONE_NORM,
    biases=(("q k v o", "attention_bias"),),
    names={"norm_eps": "layer_norm_eps"},
    defaults={
        "norm_eps": 1e-5,
        "rope_theta": 5e5,
        "tie_word_embeddings": True,
        "use_parallel_residual": True,
    },
    fixed={**_ALWAYS_PARALLEL, "use_qk_norm": (False,)},
    norm="layer",
    norm_bias=False,
    scales=scales.cohere,
    adjacent_rope=True,
)
_FALCON = Family(
    outer={"word_embeddings": "embed", "ln_f": "final_norm", "lm_head": "head"},
    at="h.{i}.",
    prefixes=("transformer.",),
    layer={
        "input_layernorm": "attn_norm",
        "self_attention.query_key_value": "q k v",
        "self_attention.dense": "o",
        "mlp.dense_h_to_4h": "up",
        "mlp.dense_4h_to_h": "down",
    },
    shared=_ONE_NORM,
    interleaved=True,
    biases=(("q k v o up down", "bias"),),
    names={
        "num_key_value_heads": "num_kv_heads",
        "intermediate_size": "ffn_hidden_size",
        "hidden_act": "activation",
        "norm_eps": "layer_norm_epsilon",
        "use_parallel_residual": "parallel_attn",
    },
    defaults={
        "hidden_act": "gelu",
        "norm_eps": 1e-5,
        "tie_word_embeddings": True,
        "use_parallel_residual": True,
        "max_position_embeddings": 2048,
    },
    norm="layer",
)


def _falcon(values: Mapping[str, Any]) -> Family:
    """Return the layout of a Falcon config: that of 7B, of 40B, of 11B, or with sequential parts.

    Settings of another type than expected choose nothing; they are refused when they are read.
    """
    if values.get("new_decoder_architecture") is True:
        parallel = replace(_FALCON, fixed=_ALWAYS_PARALLEL)
        if values.get("num_ln_in_parallel_attn") == 1:
            return parallel
        layer = {name: value for name, value in _FALCON.layer.items() if value != "attn_norm"}
        norms = {"ln_attn": "attn_norm", "ln_mlp": "mlp_norm"}
        two = replace(parallel, layer={**norms, **layer}, shared={})
        return replace(two, fixed={**_ALWAYS_PARALLEL, "num_ln_in_parallel_attn": (2,)})
    old = replace(_FALCON, fixed={"num_ln_in_parallel_attn": (1,)})
    if values.get("parallel_attn") is False:
        norm = {"post_attention_layernorm": "mlp_norm"}
        old = replace(old, layer={**norm, **_FALCON.layer}, shared={}, fixed={})
    if values.get("multi_query") is False:
        return replace(old, implied={"num_kv_heads": None})
    return replace(old, interleaved=False, implied={"num_kv_heads": 1})


LAYER_NORM_FAMILIES: dict[str, Family] = {
    "gpt2": _GPT2,
    "gpt_neo": _GPT_NEO,
    "gpt_neox": _GPT_NEOX,
    "opt": _OPT,
    "stablelm": _STABLELM,
    "starcoder2": Family(
        layer={**_NORMS, **_ATTENTION, "mlp.c_fc": "up", "mlp.c_proj": "down"},
        biases=(("q k v o up down", "use_bias"),),
        names={"norm_eps": "norm_epsilon"},
        defaults={
            "use_bias": True,
            "hidden_act": "gelu_pytorch_tanh",
            "norm_eps": 1e-5,
            "num_key_value_heads": 2,
            "tie_word_embeddings": True,
        },
        norm="layer",
        windows=layer_variants.one_window,
    ),
    "phi": Family(
        outer={"embed_tokens": "embed", "final_layernorm": "final_norm", "lm_head": "head"},
        layer={
            "input_layernorm": "attn_norm",
            **{f"self_attn.{name}_proj": name for name in "qkv"},
            "self_attn.dense": "o",
            "mlp.fc1": "up",
            "mlp.fc2": "down",
        },
        shared=_ONE_NORM,
        biases=(("q k v o up down head", "always"),),
        names={"norm_eps": "layer_norm_eps"},
        defaults={
            "hidden_act": "gelu_new",
            "norm_eps": 1e-5,
            "partial_rotary_factor": 0.5,
            "use_parallel_residual": True,
        },
        fixed={**_ALWAYS_PARALLEL, "qk_layernorm": (False,), "tie_word_embeddings": (False,)},
        norm="layer",
    ),
    "cohere": _COHERE,
    "cohere2": replace(
        _COHERE,
        defaults={**_COHERE.defaults, "rope_theta": 1e4, "sliding_window": 4096},
        windows=layer_variants.typed_windows(layer_variants.three_of_four),
        ropes=layer_variants.ropes_of_windows,
    ),
    "falcon": replace(_FALCON, variant=_falcon),
    "nemotron": Family(
        layer={**_NORMS, **_ATTENTION, "mlp.up_proj": "up", "mlp.down_proj": "down"},
        biases=(("q k v o", "attention_bias"), ("up down", "mlp_bias")),
        defaults={"hidden_act": "relu2", "norm_eps": 1e-5, "partial_rotary_factor": 0.5},
        norm="layer",
        norm_offset=1.0,
    ),
}

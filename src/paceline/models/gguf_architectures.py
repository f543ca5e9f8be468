"""Architectures of GGUF files as data: their family, tensor names and settings.

An architecture is one row of `ARCHITECTURES`, by `general.architecture`. A row names a family of
`families.py` and what files of this architecture do differently: names of tensors, rows of query
and key matrices in rotary pairs, metadata that only some architectures have. The facts are those
of llama.cpp and its converter.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

Names = Mapping[str, str]

_OUTER = {"token_embd": "embed", "output_norm": "final_norm", "output": "head"}
_NORMS = {"attn_norm": "attn_norm", "ffn_norm": "mlp_norm"}
_ATTENTION = {"attn_q": "q", "attn_k": "k", "attn_v": "v", "attn_output": "o"}
_MLP = {"ffn_gate": "gate", "ffn_up": "up", "ffn_down": "down"}
_PLAIN_MLP = {"ffn_up": "up", "ffn_down": "down"}
_FUSED_MLP = {"ffn_up": "gate up", "ffn_down": "down"}
_QK_NORMS = {"attn_q_norm": "q_norm", "attn_k_norm": "k_norm"}
_POST_NORMS = {"post_attention_norm": "attn_post_norm", "post_ffw_norm": "mlp_post_norm"}
_WINDOW = {"attention.sliding_window": "sliding_window"}
_PARALLEL = {"use_parallel_residual": "use_parallel_residual"}
_CAPS = {name: name for name in ("attn_logit_softcapping", "final_logit_softcapping")}


@dataclass(frozen=True, slots=True)
class Architecture:
    """What files of one architecture hold.

    Attributes:
        family: its family, a key of `FAMILIES`.
        layer: module inside `blk.N.` -> canonical name; several names are fused along the output
            axis.
        outer: the same outside of the layers.
        alternatives: module -> names that take the place of others in `layer` where the first
            layer has that module.
        paired: rows of each head of q and k are stored in rotary pairs: 0, h / 2, 1, h / 2 + 1 ...
        keys: metadata key without the architecture -> setting of the family, besides those that
            every architecture has; 0 stands for none.
        settings: settings of the family that such files need not hold.
        windowed: family of files with a sliding window, if that is another one.
        folded_norms: norm weights hold the 1 that this family adds to them.
        width_scaled: numbers of layers of those models whose queries are scaled by
            `sqrt(hidden / heads)` instead of `sqrt(head_dim)`; no key says so.
    """

    family: str
    layer: Names = field(default_factory=lambda: {**_NORMS, **_ATTENTION, **_MLP})
    outer: Names = field(default_factory=lambda: _OUTER)
    alternatives: Mapping[str, Names] = field(
        default_factory=lambda: {"attn_qkv": {"attn_qkv": "q k v"}}
    )
    paired: bool = False
    keys: Names = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    windowed: str | None = None
    folded_norms: bool = False
    width_scaled: tuple[int, ...] = ()


_LLAMA = Architecture("llama", paired=True, keys=_WINDOW, windowed="mistral")
_PLAIN = {**_NORMS, **_ATTENTION, **_PLAIN_MLP}
_GEMMA = Architecture("gemma", folded_norms=True)
_GEMMA2 = replace(
    _GEMMA,
    family="gemma2",
    layer={**_GEMMA.layer, **_POST_NORMS},
    keys={**_WINDOW, **_CAPS},
    width_scaled=(46,),  # 27B
)
_OLMO2 = Architecture(
    "olmo2",
    layer={**_ATTENTION, **_MLP, **_QK_NORMS, **_POST_NORMS},
    keys=_WINDOW,
    windowed="olmo3",
)
_GLM = Architecture("glm", layer={**_NORMS, **_ATTENTION, **_FUSED_MLP})
_COHERE = Architecture(
    "cohere",
    layer={"attn_norm": "attn_norm", **_ATTENTION, **_MLP},
    keys={"logit_scale": "logit_scale"},
)

ARCHITECTURES: dict[str, Architecture] = {
    "llama": _LLAMA,
    "mistral3": Architecture(
        "ministral3",
        paired=True,
        keys={
            "rope.scaling.yarn_log_multiplier": "mscale_all_dim",
            "attention.temperature_scale": "llama_4_scaling_beta",
            "attention.temperature_length": "query_length",
        },
    ),
    "qwen2": Architecture("qwen2"),
    "qwen3": Architecture("qwen3", layer={**_LLAMA.layer, **_QK_NORMS}),
    "smollm3": Architecture("smollm3", paired=True),
    "phi3": Architecture("phi3", layer={**_NORMS, **_ATTENTION, **_FUSED_MLP}, keys=_WINDOW),
    "bitnet": Architecture(
        "bitnet",
        layer={
            **_LLAMA.layer,
            "attn_sub_norm": "attn_inner_norm",
            "ffn_sub_norm": "mlp_inner_norm",
        },
        settings={"hidden_act": "silu"},
    ),
    "gemma": _GEMMA,
    "gemma2": _GEMMA2,
    "gemma3": replace(
        _GEMMA2,
        family="gemma3_text",
        layer={**_GEMMA2.layer, **_QK_NORMS},
        keys={**_GEMMA2.keys, "rope.freq_base_swa": "rope_local_base_freq"},
        width_scaled=(62,),  # 27B
    ),
    "olmo": Architecture(
        "olmo",
        layer={**_ATTENTION, **_MLP},
        outer={"token_embd": "embed", "output": "head"},
        paired=True,
        keys={"attention.clamp_kqv": "qkv_clip"},
    ),
    "olmo2": _OLMO2,
    "granite": Architecture(
        "granite",
        paired=True,
        keys={
            "attention.scale": "attention_multiplier",
            "embedding_scale": "embedding_multiplier",
            "residual_scale": "residual_multiplier",
            "logit_scale": "logits_scaling",
        },
    ),
    "minicpm": Architecture(
        "minicpm",
        paired=True,
        keys={
            "embedding_scale": "scale_emb",
            "residual_scale": "residual_scale",
            "logit_scale": "logit_scale",
        },
    ),
    "arcee": Architecture("arcee", layer=_PLAIN, paired=True),
    "ernie4_5": Architecture("ernie4_5"),
    "seed_oss": Architecture(
        "seed_oss",
        layer={
            "attn_norm": "attn_norm",
            "post_attention_norm": "mlp_norm",
            **_ATTENTION,
            **_MLP,
        },
    ),
    "exaone": Architecture("exaone"),
    "exaone4": replace(_OLMO2, family="exaone4", windowed=None, settings={"sliding_window": None}),
    "chatglm": _GLM,
    "glm4": replace(_GLM, family="glm4", layer={**_GLM.layer, **_POST_NORMS}),
    "hunyuan-dense": Architecture("hunyuan_v1_dense", layer={**_LLAMA.layer, **_QK_NORMS}),
    "internlm2": Architecture("internlm2", paired=True),
    "gpt2": Architecture("gpt2", layer=_PLAIN, outer={**_OUTER, "position_embd": "positions"}),
    "gptneox": Architecture("gpt_neox", layer=_PLAIN, keys=_PARALLEL),
    "stablelm": Architecture("stablelm", keys=_PARALLEL),
    "starcoder2": Architecture("starcoder2", layer=_PLAIN, settings={"sliding_window": None}),
    "phi2": Architecture("phi", layer={"attn_norm": "attn_norm", **_ATTENTION, **_PLAIN_MLP}),
    "command-r": _COHERE,
    "cohere2": replace(_COHERE, family="cohere2", keys={**_COHERE.keys, **_WINDOW}),
    "falcon": Architecture(
        "falcon",
        layer={"attn_norm": "attn_norm", **_ATTENTION, **_PLAIN_MLP},
        alternatives={
            "attn_qkv": {"attn_qkv": "q k v"},
            "attn_norm_2": {"attn_norm_2": "attn_norm", "attn_norm": "mlp_norm"},
        },
        settings={"new_decoder_architecture": True},
    ),
    "nemotron": Architecture("nemotron", layer=_PLAIN, folded_norms=True),
}

# Keys that change the computation unless they have one of these values; an architecture that
# knows one lists it in `keys`.
NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "attention.causal": (True,),
    **dict.fromkeys(
        (
            *("attention.max_alibi_bias", "attention.clamp_kqv"),
            *("attention.shared_kv_layers", "attention.q_lora_rank", "attention.kv_lora_rank"),
            *("attention.temperature_length", "attention.temperature_scale"),
            *("attn_logit_softcapping", "final_logit_softcapping", "leading_dense_block_count"),
            *("full_attention_interval", "nextn_predict_layers", "pooling_type"),
            *("rope.scaling.yarn_log_multiplier", "shortconv.l_cache"),
            *("ssm.state_size", "embedding_length_per_layer_input", "swin_norm"),
        ),
        (0, False),
    ),
    **dict.fromkeys(
        (
            *("logit_scale", "residual_scale", "embedding_scale", "attention.output_scale"),
            *("rope.scaling.yarn_ext_factor", "rope.scaling.yarn_attn_factor"),
        ),
        (0, 1),
    ),
    "attention.scale": (0,),
}

"""Model families as data: names of settings and tensors for each `model_type`.

A family is one row of `FAMILIES`: names, defaults and settings that have only one supported value.
`layer_variants.py` holds the rest: which layers have a window, and their rotary angles.
The facts are those of the `transformers` implementations.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from paceline.models import layer_variants

Names = Mapping[str, str]

_NORMS = {"input_layernorm": "attn_norm", "post_attention_layernorm": "mlp_norm"}
_ATTENTION = {f"self_attn.{name}_proj": name for name in "qkvo"}
_MLP = {f"mlp.{name}_proj": name for name in ("gate", "up", "down")}
_QK_NORMS = {"self_attn.q_norm": "q_norm", "self_attn.k_norm": "k_norm"}
_GPT_OUTER = {"wte": "embed", "wpe": "positions", "ln_f": "final_norm", "lm_head": "head"}
_GPT_NAMES = {"num_attention_heads": "n_head", "num_hidden_layers": "n_layer"}
_CAUSAL = {"use_bidirectional_attention": (False,)}


@dataclass(frozen=True, slots=True)
class Family:
    """One model family.

    Attributes:
        layer: module of the checkpoint -> canonical name, inside a layer. Several names are fused
            along the output axis.
        outer: the same outside of the layers.
        at: prefix of the tensors of layer i.
        prefixes: removed from the names of tensors, the first that fits; checkpoints saved without
            the head lack them.
        aliases: other names that checkpoints use for a tensor.
        skipped: regular expression of tensors that are no weights of the text model.
        transposed: matrices inside the layers are stored [in, out].
        interleaved: fused q, k, v lie head by head.
        biases: (canonical names, setting that switches their biases on, or `always`).
        names: our name of a setting -> this family's.
        defaults: our name of a setting -> its value when absent.
        fixed: settings that would change the computation -> supported values.
        nested: key of the text model's settings inside config.json.
        windows, ropes: of every layer.
    """

    layer: Names
    outer: Names = field(
        default_factory=lambda: {"embed_tokens": "embed", "norm": "final_norm", "lm_head": "head"}
    )
    at: str = "layers.{i}."
    prefixes: tuple[str, ...] = ("model.",)
    aliases: Names = field(default_factory=dict)
    skipped: str = r"rotary_emb\.inv_freq$"
    transposed: bool = False
    interleaved: bool = False
    biases: tuple[tuple[str, str], ...] = ()
    names: Names = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=dict)
    fixed: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    nested: str | None = None
    windows: layer_variants.Windows = layer_variants.no_windows
    ropes: layer_variants.Ropes = layer_variants.one_rope
    norm: str = "rms"
    norm_offset: float = 0.0
    scaled_embedding: bool = False
    position_offset: int = 0

    @property
    def gated(self) -> bool:
        """Whether the MLP has a gate."""
        return any("gate" in names.split() for names in self.layer.values())


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
    scaled_embedding=True,
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

FAMILIES: dict[str, Family] = {
    "llama": _LLAMA,
    "mistral": replace(
        _LLAMA, biases=(), defaults={"sliding_window": 4096}, windows=layer_variants.one_window
    ),
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
    "gemma3": replace(
        _GEMMA3,
        nested="text_config",
        prefixes=("language_model.model.", "model.language_model.", "language_model.", "model."),
        skipped=r"^(vision_tower|multi_modal_projector)\.",
    ),
    "gpt2": _GPT2,
    "gpt_neo": _GPT_NEO,
    "gpt_neox": _GPT_NEOX,
    "opt": _OPT,
}

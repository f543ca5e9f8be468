"""Converts a Hugging Face config.json to a `ModelConfig`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from paceline.errors import ModelError, unknown
from paceline.models import layer_variants
from paceline.models.config import LayerConfig, ModelConfig
from paceline.models.families import FAMILIES, Family
from paceline.models.fields import Fields
from paceline.models.layer_shapes import read_biases, read_layers

_MOST_LAYERS = 10_000
_ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
    "relu2": "relu2",
}
# Settings that a nested text model takes from the object around it.
_OUTER = (
    *("model_type", "tie_word_embeddings", "quantization_config"),
    *("eos_token_id", "bos_token_id"),
)
# Settings that would change the maths of any family.
_FIXED = {
    "quantization_config": (None,),
    "alibi": (False,),
    "add_cross_attention": (False,),
    "is_encoder_decoder": (False,),
    "use_bidirectional_attention": (False,),
}


def read_config(
    values: Mapping[str, Any], where: str = "config.json"
) -> tuple[ModelConfig, Family, frozenset[str]]:
    """Return the model's shape, its family, and the canonical linear maps that have a bias.

    Args:
        values: the settings.
        where: what holds them, for messages.

    Raises:
        ModelError: an unknown family, or a setting that is missing, absurd or not supported.
    """
    name = values.get("model_type")
    if not isinstance(name, str) or not name:
        raise ModelError("config.json has no model_type; it does not describe a language model")
    family = FAMILIES.get(name)
    if family is None:
        raise ModelError(unknown("architecture", name, FAMILIES))
    if family.variant is not None:
        family = family.variant(values)
    settings = {**flatten(values, family), **family.implied}
    fields = Fields(settings, where, family.names, family.defaults)
    _refuse(fields, _FIXED | dict(family.fixed))
    biased = frozenset(
        name
        for names, setting in family.biases
        if setting == "always" or fields.boolean(setting)
        for name in names.split()
    )
    return _build(family.text or name, family, fields), family, biased | read_biases(fields)


def _build(name: str, family: Family, fields: Fields) -> ModelConfig:
    hidden = fields.integer("hidden_size")
    count = fields.integer("num_hidden_layers", high=_MOST_LAYERS)
    heads = fields.integer("num_attention_heads")
    head_dim = fields.integer("head_dim", 0, low=0) or _head_dim(fields, hidden, heads)
    kv_heads = fields.integer("num_key_value_heads", heads)
    if heads % kv_heads:
        raise fields.fail("num_key_value_heads", f"a divisor of the {heads} attention heads")
    ropes = family.ropes(fields, count, head_dim)
    if family.adjacent_rope:
        ropes = [rope and replace(rope, adjacent=True) for rope in ropes]
    windows = family.windows(fields, count)
    inner = fields.integer("intermediate_size", 4 * hidden if family.norm == "layer" else None)
    if fields.integer("word_embed_proj_dim", hidden) != hidden:
        raise fields.fail("word_embed_proj_dim", f"the hidden size {hidden}, no projection")
    scales = family.scales(fields, head_dim)
    return ModelConfig(
        family=name,
        vocab_size=fields.integer("vocab_size"),
        hidden_size=hidden,
        context=layer_variants.context(fields, ropes),
        layers=read_layers(
            fields,
            [
                LayerConfig(heads, kv_heads, head_dim, inner, window, rope)
                for window, rope in zip(windows, ropes, strict=True)
            ],
        ),
        norm=family.norm,
        norm_eps=_norm_eps(fields),
        norm_offset=family.norm_offset,
        activation=_activation(name, fields),
        gated=family.gated,
        parallel=fields.boolean("use_parallel_residual"),
        pre_norm=family.pre_norm,
        qk_norm=family.qk_norm,
        qkv_clip=_optional(fields, "qkv_clip"),
        attention_scale=scales.attention,
        residual_scale=scales.residual,
        logit_scale=scales.logit,
        attention_softcap=_optional(fields, "attn_logit_softcapping"),
        logit_softcap=_optional(fields, "final_logit_softcapping"),
        embedding_scale=scales.embedding,
        learned_positions="positions" in family.outer.values(),
        position_offset=family.position_offset,
        tied=fields.boolean("tie_word_embeddings"),
        eos=fields.tokens("eos_token_id"),
        bos=next(iter(fields.tokens("bos_token_id")), None),
    )


def flatten(values: Mapping[str, Any], family: Family) -> Mapping[str, Any]:
    """Return the settings of the text model, completed from the outer object."""
    if family.nested is None:
        return values
    inner = Fields(values).table(family.nested)
    outer = {key: values[key] for key in _OUTER if values.get(key) is not None}
    return {**inner, **outer}


def _refuse(fields: Fields, fixed: Mapping[str, tuple[Any, ...]]) -> None:
    for setting, supported in fixed.items():
        if setting in fields and fields.get(setting) not in supported:
            allowed = " or ".join("absent" if item is None else str(item) for item in supported)
            raise ModelError(
                f"{fields.key(setting)} in {fields.where} is {fields.get(setting)!r:.80}, which is "
                f"not supported; expected {allowed}"
            )


def _head_dim(fields: Fields, hidden: int, heads: int) -> int:
    if hidden % heads:
        raise ModelError(
            f"hidden_size {hidden} in {fields.where} is not a multiple of its {heads} attention "
            "heads"
        )
    return hidden // heads


def _norm_eps(fields: Fields) -> float:
    return fields.number("norm_eps", fields.number("rms_norm_eps", 1e-6))


def _activation(family: str, fields: Fields) -> str:
    written = fields.text("hidden_act", "silu")
    if family == "gemma" and written == "gelu":
        written = "gelu_pytorch_tanh"  # what the first Gemma configs mean
    if written not in _ACTIVATIONS:
        raise ModelError(unknown("activation", written, _ACTIVATIONS))
    return _ACTIVATIONS[written]


def _optional(fields: Fields, name: str) -> float | None:
    """Return a number, or None if it is `null` or absent without a default."""
    if fields.has_key(name) and name not in fields:
        return None
    return fields.number(name) if fields.get(name) is not None else None

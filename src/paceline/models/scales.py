"""Factors that differ between families: of embeddings, attention, residual stream and logits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from paceline.models.fields import Fields


@dataclass(frozen=True, slots=True)
class Scales:
    """The scales of a `ModelConfig`, under its names without `_scale`."""

    attention: float
    embedding: float = 1.0
    residual: float = 1.0
    logit: float = 1.0


ReadScales = Callable[[Fields, int], Scales]  # (settings, head_dim)


def plain(fields: Fields, head_dim: int) -> Scales:
    """Return attention by the root of the head size, and no other scale.

    `query_pre_attn_scalar` takes the head size's place; `scale_attn_weights` switches it off.
    """
    scaled = fields.boolean("scale_attn_weights", True)
    return Scales(fields.number("query_pre_attn_scalar", head_dim) ** -0.5 if scaled else 1.0)


def root_of_width(fields: Fields, head_dim: int) -> Scales:
    """Return embeddings times the root of the hidden size, in float32 (Gemma)."""
    root = float(np.float32(fields.integer("hidden_size") ** 0.5))
    return replace(plain(fields, head_dim), embedding=root)


def granite(fields: Fields, head_dim: int) -> Scales:
    """Return the four scales that a Granite config names."""
    return Scales(
        fields.number("attention_multiplier", 1.0),
        fields.number("embedding_multiplier", 1.0),
        fields.number("residual_multiplier", 1.0),
        1 / fields.number("logits_scaling", 1.0, low=1e-6),
    )


def minicpm(fields: Fields, head_dim: int) -> Scales:
    """Return the scales of MiniCPM (arXiv 2404.06395, section 4)."""
    depth = fields.number("scale_depth", 1.0) / fields.integer("num_hidden_layers") ** 0.5
    width = fields.integer("hidden_size") / fields.number("dim_model_base", 1.0, low=1e-3)
    return replace(
        plain(fields, head_dim),
        embedding=fields.number("scale_emb", 1.0),
        residual=depth,
        logit=1 / width,
    )


def cohere(fields: Fields, head_dim: int) -> Scales:
    """Return logits times `logit_scale`."""
    return replace(plain(fields, head_dim), logit=fields.number("logit_scale", 0.0625))

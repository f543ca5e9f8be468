"""One decoder block as plain, differentiable torch functions; `config.py` has the formulas.

The reference engine, calibration, recovery training and adapters all run these functions. They
hold no state: weights come as a mapping, the cache as a function, and whoever wants to see the
input of a matrix passes a tap.

Axes: `...` any leading axes (none in the engine, a batch in training), T positions of a pass,
S positions that keys and values are held of, H query heads, G key/value heads, D head size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from paceline.core import Floats
from paceline.models.config import LayerConfig, ModelConfig

# A matrix [out, in], or a function that stands for its product with x [..., in] -> [..., out].
Matrix = Tensor | Callable[[Tensor], Tensor]
# The tensors of one layer (`q`, `q.bias`, `attn_norm`, ...) or those outside all layers.
LayerWeights = Mapping[str, Matrix]
# Called with the name of a matrix and its input [..., T, in], and as `attention` with the weights
# of the attention [..., H, T, S]. What it returns is ignored.
Tap = Callable[[str, Tensor], object]
# Takes the new keys and values [..., G, T, D]; returns all that are attended to [..., G, S, D].
Cache = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


class LatentCache(NamedTuple):
    """A cache of the latents that keys and values are made of, see the recipe `transmla`.

    Attributes:
        extend: takes the new latents [T, r]; returns all that are attended to, [S, r].
        rotation: of the S positions; None where the layer has no rotary embedding.
    """

    extend: Callable[[Tensor], Tensor]
    rotation: Rotation | None


# Float32 [T, S] or [H, T, S], 0 where a position is seen and -inf elsewhere; or a function of the
# rotated queries [..., H, T, D] and keys [..., G, S, D] that returns such a tensor.
Mask = Tensor | Callable[[Tensor, Tensor], Tensor]


class Rotation(NamedTuple):
    """What the rotary embedding of a layer does at T positions.

    Attributes:
        cos, sin: of the angles, [T, R].
        adjacent: which values of a head turn together, see `rotate`.
        query_scales: factors of the rotated queries, [T, 1]; None without.
    """

    cos: Tensor
    sin: Tensor
    adjacent: bool = False
    query_scales: Tensor | None = None


_PLAIN_NORMS = ("attn_norm", "mlp_norm", "final_norm")  # those that exist without a weight

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
}


def logits(
    tokens: Tensor,
    config: ModelConfig,
    outer: LayerWeights,
    layers: list[LayerWeights],
    tap: Callable[[int, str, Tensor], object] | None = None,
) -> Tensor:
    """Run the whole model over texts without a cache; the naive form that others are tested by.

    Args:
        tokens: int64 [..., T].
        config: the model's shape.
        outer: tensors outside the layers.
        layers: tensors of each layer.
        tap: as `Tap`, with the index of the layer first.

    Returns:
        float32 [..., T, V].
    """
    positions = torch.arange(tokens.shape[-1], device=tokens.device)
    x = embed(tokens, positions, config, outer)
    for index, (layer, weights) in enumerate(zip(config.layers, layers, strict=True)):
        rotation = rotation_of(layer, positions)
        mask = causal_mask(positions, layer)
        own = None if tap is None else lambda name, seen, index=index: tap(index, name, seen)
        x = block(x, config, layer, weights, mask, rotation, tap=own)
    return head(final_state(x, config, outer), config, outer)


def embed(tokens: Tensor, positions: Tensor, config: ModelConfig, outer: LayerWeights) -> Tensor:
    """Return the input of the first layer, [..., T, hidden], for tokens [..., T]."""
    x = F.embedding(tokens, _tensor(outer["embed"])) * config.embedding_scale
    if config.learned_positions:
        x = x + _tensor(outer["positions"])[positions + config.position_offset]
    return x


def block(
    x: Tensor,
    config: ModelConfig,
    layer: LayerConfig,
    weights: LayerWeights,
    mask: Mask,
    rotation: Rotation | None,
    cache: Cache | LatentCache | None = None,
    tap: Tap | None = None,
) -> Tensor:
    """Run one decoder block.

    Args:
        x: [..., T, hidden].
        config: the model's shape.
        layer: the layer's shape.
        weights: the layer's tensors.
        mask: which positions are seen.
        rotation: of the T positions; None where the layer has no rotary embedding.
        cache: gives the keys and values of earlier positions; None where there are none.
        tap: sees the input of every matrix.

    Returns:
        [..., T, hidden].
    """
    after = x
    if layer.heads:
        normed = norm(x, config, weights, "attn_norm")
        attended = attention(normed, config, layer, weights, mask, rotation, cache, tap)
        attended = norm(attended, config, weights, "attn_post_norm")
        after = x + scaled(attended, config.residual_scale)
    if layer.intermediate:
        mlp_input = x if config.parallel else after
        added = mlp(norm(mlp_input, config, weights, "mlp_norm"), config, weights, tap)
        after = after + scaled(added, config.residual_scale)
    return after


def attention(
    x: Tensor,
    config: ModelConfig,
    layer: LayerConfig,
    weights: LayerWeights,
    mask: Mask,
    rotation: Rotation | None,
    cache: Cache | LatentCache | None = None,
    tap: Tap | None = None,
) -> Tensor:
    """Attend from T positions to S; arguments and result as those of `block`."""
    if isinstance(cache, LatentCache):
        q = queries(x, config, layer, weights, rotation, tap)
        latents = cache.extend(project(x, weights, "latent", tap))
        keys, values = keys_values(latents, config, layer, weights, cache.rotation, tap)
    else:
        q, k, v = queries_keys_values(x, config, layer, weights, rotation, tap)
        keys, values = (k, v) if cache is None else cache(k, v)  # [..., G, S, D]
    if not isinstance(mask, Tensor):
        mask = mask(q, keys)
    if tap is not None:
        tap("queries", q)
    groups = layer.heads // layer.kv_heads
    keys, values = keys.repeat_interleave(groups, -3), values.repeat_interleave(groups, -3)
    scores = (q @ keys.transpose(-1, -2)).float() * config.attention_scale  # [..., H, T, S]
    shares = (softcap(scores, config.attention_softcap) + mask).softmax(-1)
    if tap is not None:
        tap("attention", shares)
    mixed = (shares.to(x.dtype) @ values).transpose(-3, -2).flatten(-2)  # [..., T, H * D]
    return project(norm(mixed, config, weights, "attn_inner_norm"), weights, "o", tap)


def queries_keys_values(
    x: Tensor,
    config: ModelConfig,
    layer: LayerConfig,
    weights: LayerWeights,
    rotation: Rotation | None,
    tap: Tap | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return rotated queries [..., H, T, D] and keys, and values [..., G, T, D], of x."""
    q = queries(x, config, layer, weights, rotation, tap)
    return q, *keys_values(x, config, layer, weights, rotation, tap)


def queries(
    x: Tensor,
    config: ModelConfig,
    layer: LayerConfig,
    weights: LayerWeights,
    rotation: Rotation | None,
    tap: Tap | None = None,
) -> Tensor:
    """Return rotated queries [..., H, T, D] of x."""
    q = _rotated_heads(project(x, weights, "q", tap), "q_norm", config, layer, weights, rotation)
    if rotation is not None and rotation.query_scales is not None:
        q = q * rotation.query_scales.to(q.dtype)
    return norm(q, config, weights, "q_norm") if config.qk_norm == "rotated" else q


def keys_values(
    x: Tensor,
    config: ModelConfig,
    layer: LayerConfig,
    weights: LayerWeights,
    rotation: Rotation | None,
    tap: Tap | None = None,
) -> tuple[Tensor, Tensor]:
    """Return rotated keys and values [..., G, T, D] of x, or of the latents in its place."""
    k = _rotated_heads(project(x, weights, "k", tap), "k_norm", config, layer, weights, rotation)
    k = norm(k, config, weights, "k_norm") if config.qk_norm == "rotated" else k
    return k, _heads(_clip(project(x, weights, "v", tap), config), layer)


def _rotated_heads(
    x: Tensor,
    name: str,
    config: ModelConfig,
    layer: LayerConfig,
    weights: LayerWeights,
    rotation: Rotation | None,
) -> Tensor:
    """Return queries or keys [..., T, heads * D] as rotated heads, with the norm called `name`."""
    x = _clip(x, config)
    if config.qk_norm == "width":
        x = norm(x, config, weights, name)
    x = _heads(x, layer)
    if config.qk_norm == "head":
        x = norm(x, config, weights, name)
    return x if rotation is None else rotate(x, *rotation[:3])


def _clip(x: Tensor, config: ModelConfig) -> Tensor:
    return x if config.qkv_clip is None else x.clamp(-config.qkv_clip, config.qkv_clip)


def _heads(x: Tensor, layer: LayerConfig) -> Tensor:
    """Split [..., T, heads * D] into [..., heads, T, D]."""
    return x.view(*x.shape[:-1], -1, layer.head_dim).transpose(-3, -2)


def mlp(x: Tensor, config: ModelConfig, weights: LayerWeights, tap: Tap | None = None) -> Tensor:
    """Run the feed-forward part, its post-norm included, on x [..., T, hidden]."""
    whole = weights.get("mlp")  # a function that stands for matrices, biases and activation
    if whole is not None and not isinstance(whole, Tensor):
        if tap is not None:
            tap("up", x)
        return norm(whole(x), config, weights, "mlp_post_norm")
    act = ACTIVATIONS[config.activation]
    up = project(x, weights, "up", tap)
    hidden = act(project(x, weights, "gate", tap)) * up if config.gated else act(up)
    hidden = norm(hidden, config, weights, "mlp_inner_norm")
    return norm(project(hidden, weights, "down", tap), config, weights, "mlp_post_norm")


def final_state(x: Tensor, config: ModelConfig, outer: LayerWeights) -> Tensor:
    """Return what the head multiplies, [..., T, hidden], of the last layer's output."""
    return scaled(norm(x, config, outer, "final_norm"), config.logit_scale)


def head(
    x: Tensor, config: ModelConfig, outer: LayerWeights, tokens: Tensor | None = None
) -> Tensor:
    """Return the logits of final states x [..., T, hidden], float32 [..., T, V].

    `tokens`, int64, computes those columns only, in their order.
    """
    weight = _tensor(outer["embed" if config.tied else "head"])
    bias = outer.get("head.bias")
    bias = None if bias is None else _tensor(bias)
    if tokens is not None:
        weight, bias = weight[tokens], bias if bias is None else bias[tokens]
    return softcap(F.linear(x, weight, bias).float(), config.logit_softcap)


def norm(x: Tensor, config: ModelConfig, weights: LayerWeights, name: str) -> Tensor:
    """Apply the norm called `name` over the last axis, in float32; return x where there is none."""
    wide = x.float()
    if config.norm == "plain" and name in _PLAIN_NORMS:
        return F.layer_norm(wide, x.shape[-1:], eps=config.norm_eps).to(x.dtype)
    if name not in weights:
        return x
    weight = _tensor(weights[name]).float()
    if config.norm != "rms":
        bias = weights.get(f"{name}.bias")
        bias = None if bias is None else _tensor(bias).float()
        weight = config.norm_offset + weight
        return F.layer_norm(wide, weight.shape, weight, bias, config.norm_eps).to(x.dtype)
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + config.norm_eps)
    return (wide * scale * (config.norm_offset + weight)).to(x.dtype)


def project(x: Tensor, weights: LayerWeights, name: str, tap: Tap | None = None) -> Tensor:
    """Multiply x [..., in] by the matrix called `name` and add its bias, if any: [..., out]."""
    if tap is not None:
        tap(name, x)
    matrix, bias = weights[name], weights.get(f"{name}.bias")
    if isinstance(matrix, Tensor):
        return F.linear(x, matrix, None if bias is None else _tensor(bias))
    return matrix(x) if bias is None else matrix(x) + _tensor(bias)


def rotation_of(layer: LayerConfig, positions: Tensor) -> Rotation | None:
    """Return the rotation of int64 positions [T]; None without rotary embedding."""
    rope = layer.rope
    if rope is None or not len(positions):
        return None
    first, last = int(positions.min()), int(positions.max()) + 1
    at = positions - first

    def select(table: Floats) -> Tensor:
        return torch.from_numpy(table).to(at.device)[at]

    cos, sin = (select(table) for table in rope.table(first, last))
    scales = select(rope.query_scales(first, last))[:, None] if rope.query_growth else None
    return Rotation(cos, sin, rope.adjacent, scales)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, adjacent: bool = False) -> Tensor:
    """Rotate the first 2R values of each head [..., T, D] by angles [T, R]; keep the others.

    Values i and i + R turn together; if `adjacent`, values 2i and 2i + 1.
    """
    half = cos.shape[-1]
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    turned, rest = x[..., : 2 * half], x[..., 2 * half :]
    if adjacent:
        a, b = turned[..., ::2], turned[..., 1::2]
        pairs = torch.stack((a * cos - b * sin, b * cos + a * sin), -1)
        return torch.cat((pairs.flatten(-2), rest), -1)
    a, b = turned[..., :half], turned[..., half:]
    return torch.cat((a * cos - b * sin, b * cos + a * sin, rest), -1)


def causal_mask(positions: Tensor, layer: LayerConfig) -> Tensor:
    """Return the float32 mask [T, T] of a text: each position sees itself and those before it.

    Where the layer has a window, it sees of those what is near, and the sinks.
    """
    distance = positions[:, None] - positions
    seen = (distance >= 0) & layer.near(distance, positions)
    hidden = torch.full(seen.shape, -torch.inf, device=positions.device)
    return hidden.masked_fill(seen, 0.0)


def scaled(x: Tensor, scale: float) -> Tensor:
    """Return x times `scale`; x itself for 1."""
    return x if scale == 1.0 else x * scale


def softcap(x: Tensor, cap: float | None) -> Tensor:
    """Bound x smoothly to (-cap, cap): cap * tanh(x / cap)."""
    return x if cap is None else cap * torch.tanh(x / cap)


def _tensor(matrix: Matrix) -> Tensor:
    """Narrow the type of a weight that is never a function: norms, biases, embeddings, heads."""
    if not isinstance(matrix, Tensor):
        raise TypeError("norms, biases, embeddings and heads are tensors, not functions")
    return matrix

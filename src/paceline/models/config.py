"""The shape of a decoder as data. Every family is one `ModelConfig`; engines know no families.

One layer, in the notation of the fields below (`[]` marks what only some families have):

    a = attn_norm(x)                                   norm "rms": x / rms(x) * (norm_offset + w)
    q, k, v = a @ q.T [+b], a @ k.T [+b], a @ v.T [+b] [clipped to -qkv_clip .. qkv_clip]
    [q, k = q_norm(q), k_norm(k)]                      per head, or over all heads: `qk_norm`
    q, k = rope(q), rope(k)                            first `rope.dim` of a head [q * growth]
    s = q @ k.T * attention_scale                      [softcap: c * tanh(s / c)], causal, [window]
    o = softmax(s) @ v                                 [o = attn_inner_norm(o)]
    y = o @ o.T [+b]                                   [y = attn_post_norm(y)]
    x = x + y * residual_scale
    m = mlp_norm(x)                                    (parallel: m = mlp_norm(the layer's input))
    h = act(m @ gate.T) * (m @ up.T), or act(m @ up.T) [h = mlp_inner_norm(h)]
    y = h @ down.T [+b]                                [y = mlp_post_norm(y)]
    x = x + y * residual_scale

A layer without heads has no attention, with its norms, and one with `intermediate` 0 no MLP.
Without `pre_norm`, a = x and m = x. A norm "layer" subtracts the mean; "plain" does, too, has no
weights, and stands only for attn_norm, mlp_norm and final_norm.
Before the layers: x = embed[token] * embedding_scale [+ positions[position + position_offset]].
After: logits = (final_norm(x) * logit_scale) @ head.T [+ head_bias], [softcap]. The scale comes
before the product, so that hidden states times the head are the logits in every family.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

from paceline.errors import ModelError, unknown
from paceline.models.rope import Rope

NORMS = ("rms", "layer", "plain")
QK_NORMS = ("head", "width", "rotated")
ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu", "relu2")
_LARGEST = 2**31  # of any size


def _check_size(name: str, value: object, low: int = 1) -> None:
    """Raise ModelError unless `value` is a whole number from `low` to 2^31."""
    whole = isinstance(value, Integral) and not isinstance(value, bool)
    if not (whole and low <= int(value) <= _LARGEST):  # type: ignore[call-overload]
        raise ModelError(f"{name} is {value!r:.80}, expected a whole number from {low} to 2^31")


def _check_number(name: str, value: object, low: float = -math.inf) -> None:
    """Raise ModelError unless `value` is a finite number of at least `low`."""
    if not (isinstance(value, Real) and math.isfinite(value) and float(value) >= low):
        expected = "a finite number" + ("" if low == -math.inf else f" of at least {low:g}")
        raise ModelError(f"{name} is {value!r:.80}, expected {expected}")


@dataclass(frozen=True, slots=True)
class LayerConfig:
    """One decoder layer; layers may differ. Sizes that no decoder has raise `ModelError`.

    Attributes:
        heads, kv_heads: query heads, and key/value heads shared by groups of them; both 0 where
            the layer has no attention.
        head_dim: size of a head.
        intermediate: width of the MLP; 0 where the layer has none.
        window: a position sees the last `window` positions, itself included; None sees all.
        rope: rotary embedding, or None if positions are learned or absent.
        sinks: first positions of the text that are seen in spite of the window.
    """

    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    window: int | None = None
    rope: Rope | None = None
    sinks: int = 0

    def __post_init__(self) -> None:
        sizes = (("heads", 0), ("kv_heads", 0), ("head_dim", 1), ("intermediate", 0), ("sinks", 0))
        for name, low in sizes:
            _check_size(name, getattr(self, name), low)
        if bool(self.heads) != bool(self.kv_heads) or self.heads % max(self.kv_heads, 1):
            raise ModelError(
                f"kv_heads is {self.kv_heads}, expected a divisor of {self.heads} heads"
            )
        if self.window is not None:
            _check_size("window", self.window)
        elif self.sinks:
            raise ModelError(f"sinks is {self.sinks} without a window, expected 0")
        if self.rope is None:
            return
        _check_size("dim of a rope", self.rope.dim, low=2)
        if self.rope.dim % 2 or self.rope.dim > self.head_dim:
            raise ModelError(
                f"dim of a rope is {self.rope.dim}, expected an even number up to head_dim "
                f"{self.head_dim}"
            )

    def near(self, distance: Any, positions: Any) -> Any:
        """Return which positions the window shows, sinks among them; all where there is none.

        Args:
            distance: of each position from the one that sees it, an array of numpy or torch.
            positions: of what is seen, of a shape that goes with it.
        """
        if self.window is None:
            return positions < _LARGEST
        return (distance < self.window) | (positions < self.sinks)


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """A decoder. See the module's text for what the fields do.

    Values that no decoder has raise `ModelError`: engines rely on what is checked here.

    Attributes:
        family: `model_type` of the config.json it was read from, of the text model there.
        context: largest number of positions.
        norm: `rms`, `layer`, or `plain`: a layer norm without weights (OLMo).
        activation: `silu`, `gelu` (erf), `gelu_tanh`, `relu` or `relu2`.
        gated: the MLP has a gate.
        parallel: attention and MLP read the same input (GPT-NeoX).
        pre_norm: there are norms before attention and MLP; OLMo 2 has those behind them only.
        qk_norm: where q_norm and k_norm apply, if the model has them: to each `head`, to all heads
            at once (`width`, OLMo 2), or to each head behind the rotary embedding (`rotated`,
            HunYuan).
        qkv_clip: bound of queries, keys and values, or None (OLMo).
        attention_scale: factor of q @ k.
        residual_scale: factor of what a layer adds to the residual stream (Granite).
        logit_scale: factor of the logits (Granite, Cohere).
        tied: the head is the embedding.
        eos: tokens that end the text by config.json; generation_config.json may say more.
    """

    family: str
    vocab_size: int
    hidden_size: int
    context: int
    layers: tuple[LayerConfig, ...]
    norm: str
    norm_eps: float
    activation: str
    gated: bool
    attention_scale: float
    tied: bool
    norm_offset: float = 0.0
    parallel: bool = False
    pre_norm: bool = True
    qk_norm: str = "head"
    qkv_clip: float | None = None
    embedding_scale: float = 1.0
    residual_scale: float = 1.0
    logit_scale: float = 1.0
    learned_positions: bool = False
    position_offset: int = 0
    attention_softcap: float | None = None
    logit_softcap: float | None = None
    eos: tuple[int, ...] = ()
    bos: int | None = None

    def __post_init__(self) -> None:
        for name in ("vocab_size", "hidden_size", "context"):
            _check_size(name, getattr(self, name))
        _check_size("position_offset", self.position_offset, low=0)
        if not isinstance(self.layers, tuple) or not self.layers:
            raise ModelError(
                f"layers is {self.layers!r:.80}, expected a tuple with a LayerConfig each"
            )
        for layer in self.layers:
            if not isinstance(layer, LayerConfig):
                raise ModelError(f"layers holds {layer!r:.80}, expected a LayerConfig")
        if not any(layer.heads for layer in self.layers):
            raise ModelError("no layer has attention, expected heads in at least one")
        if self.norm not in NORMS:
            raise ModelError(unknown("norm", str(self.norm), NORMS))
        if self.qk_norm not in QK_NORMS:
            raise ModelError(unknown("qk_norm", str(self.qk_norm), QK_NORMS))
        if self.activation not in ACTIVATIONS:
            raise ModelError(unknown("activation", str(self.activation), ACTIVATIONS))
        _check_number("norm_eps", self.norm_eps, low=0.0)
        scales = ("attention_scale", "embedding_scale", "residual_scale", "logit_scale")
        for name in ("norm_offset", *scales):
            _check_number(name, getattr(self, name))
        for name in ("attention_softcap", "logit_softcap", "qkv_clip"):
            if (cap := getattr(self, name)) is not None:
                _check_number(name, cap, low=1e-6)

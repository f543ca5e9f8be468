"""The shape of a decoder as data. Every family is one `ModelConfig`; engines know no families.

One layer, in the notation of the fields below (`[]` marks what only some families have):

    a = attn_norm(x)                                   norm "rms": x / rms(x) * (norm_offset + w)
    q, k, v = a @ q.T [+b], a @ k.T [+b], a @ v.T [+b]
    [q, k = q_norm(q), k_norm(k)]                      per head, over head_dim
    q, k = rope(q), rope(k)                            first `rope.dim` of a head, rotate-half
    s = q @ k.T * attention_scale                      [softcap: c * tanh(s / c)], causal, [window]
    o = softmax(s) @ v                                 [o = attn_inner_norm(o)]
    y = o @ o.T [+b]                                   [y = attn_post_norm(y)]
    x = x + y
    m = mlp_norm(x)                                    (parallel: m = mlp_norm(the layer's input))
    h = act(m @ gate.T) * (m @ up.T), or act(m @ up.T) [h = mlp_inner_norm(h)]
    x = x + h @ down.T [+b]                            [mlp_post_norm before the sum]

Before the layers: x = embed[token] * embedding_scale [+ positions[position + position_offset]].
After: logits = final_norm(x) @ head.T [+ head_bias], [softcap].
"""

from __future__ import annotations

from dataclasses import dataclass

from paceline.models.rope import Rope


@dataclass(frozen=True, slots=True)
class LayerConfig:
    """One decoder layer; layers may differ.

    Attributes:
        heads, kv_heads: query heads, and key/value heads shared by groups of them.
        head_dim: size of a head.
        intermediate: width of the MLP.
        window: a position sees the last `window` positions, itself included; None sees all.
        rope: rotary embedding, or None where positions are learnt or absent.
    """

    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    window: int | None = None
    rope: Rope | None = None


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """A decoder. See the module's text for what the fields do.

    Attributes:
        family: `model_type` of the config.json it was read from.
        context: most positions the model may see.
        norm: `rms` or `layer`.
        activation: `silu`, `gelu` (erf), `gelu_tanh`, `relu` or `relu2`.
        gated: the MLP has a gate.
        parallel: attention and MLP read the same input (GPT-NeoX).
        attention_scale: factor of q @ k.
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
    embedding_scale: float = 1.0
    learned_positions: bool = False
    position_offset: int = 0
    attention_softcap: float | None = None
    logit_softcap: float | None = None
    eos: tuple[int, ...] = ()
    bos: int | None = None

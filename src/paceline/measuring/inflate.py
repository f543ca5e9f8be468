"""Make a small model cost what a large one costs, without changing what it computes.

Real acceptance rates need a real model, real speed needs a large one. Where there is no large one,
a small one is widened with zeros and deepened with layers that add nothing. Its outputs stay the
same (up to the rounding of a few rescaled norms); its time is that of the larger shape.

- Hidden size: new columns and rows are zero. The mean square over d of D values is d / D of what
  it was, so norms take eps * d / D and their gain is multiplied by sqrt(d / D). BitNet's inner
  norms share that eps over axes of another ratio: their inputs (v, up) are scaled to match.
- Head size: value i of each half goes to place i * r, where the wider head has the same angle;
  q is scaled so that the new attention scale changes nothing.
- Heads: groups keep their key/value head; new heads write to zero columns of o. An inner norm
  would see them, so there the groups must keep their size: new heads then have zero values.
- Layers: new ones are spread between the old; their o and down are zero.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from paceline.core import Floats
from paceline.errors import ModelError
from paceline.models import Model
from paceline.models.config import LayerConfig, ModelConfig
from paceline.models.formats.writer import Pending, write_json, write_safetensors

_NAMES = {
    "attn_norm": "input_layernorm",
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "o": "self_attn.o_proj",
    "attn_inner_norm": "self_attn.attn_sub_norm",
    "mlp_norm": "post_attention_layernorm",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "mlp_inner_norm": "mlp.ffn_sub_norm",
    "down": "mlp.down_proj",
}
_COPIED = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")


@dataclass(frozen=True)
class TargetShape:
    """The shape to grow to, in the words of `ModelConfig`."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    intermediate: int

    @property
    def head_dim(self) -> int:
        """Size of a head."""
        return self.hidden // self.heads


def inflate(model: Model, out: Path, shape: TargetShape) -> None:
    """Write `model`, grown to `shape`, to the folder `out`.

    Raises:
        ModelError: it is a GGUF file, the family is not a plain Llama or BitNet, or the shape
            cannot hold the model.
    """
    config = model.config
    if model.gguf is not None:  # a folder needs tokenizer.json, which a GGUF file does not have
        raise ModelError(f"{model.path} is a GGUF file, expected a folder with config.json")
    _check(config, shape)
    small = config.layers[0]
    old = np.linspace(0, shape.layers - 1, len(config.layers)).round().astype(int)
    source = {int(place): i for i, place in enumerate(old)}
    tensors: dict[str, Pending] = {}

    def put(
        name: str, weight: str, rows: GrownAxis, columns: GrownAxis | None, scale: float = 1.0
    ) -> None:
        size = (rows.size,) if columns is None else (rows.size, columns.size)
        tensors[name] = Pending(
            size, lambda: _spread(model.weights.dense(weight) * np.float32(scale), rows, columns)
        )

    axes = _axes(config, small, shape)
    inner_norms = config.family == "bitnet"
    put("model.embed_tokens.weight", "embed", GrownAxis.whole(config.vocab_size), axes["hidden"])
    for place in range(shape.layers):
        old_layer = source.get(place)
        for name, module in _NAMES.items():
            weight = f"layers.{old_layer or 0}.{name}"
            if weight not in model.weights:
                continue
            target = f"model.layers.{place}.{module}.weight"
            rows, columns, scale = _plan(name, axes, inner_norms)
            if old_layer is None:
                size = (rows.size,) if columns is None else (rows.size, columns.size)
                tensors[target] = Pending(size, _Idle(name, size, place))
            else:
                put(target, weight, rows, columns, scale)
    put("model.norm.weight", "final_norm", axes["hidden"], None, axes["hidden"].gain)
    if not config.tied:
        put("lm_head.weight", "head", GrownAxis.whole(config.vocab_size), axes["hidden"])
    write_safetensors(out / "model.safetensors", tensors)
    for name in _COPIED:
        if (model.path / name).exists():
            shutil.copyfile(model.path / name, out / name)
    # Last: a folder with a config is a complete checkpoint.
    write_json(out / "config.json", _settings(config, shape))


@dataclass(frozen=True)
class GrownAxis:
    """Where the old indices of an axis go: `places` [old size], in an axis of `size`."""

    size: int
    places: NDArray[np.int64]

    @classmethod
    def whole(cls, size: int) -> GrownAxis:
        """Return an axis that stays as it is."""
        return cls(size, np.arange(size))

    @property
    def gain(self) -> float:
        """Factor of the root mean square over the axis, sqrt(d / D)."""
        return float(np.sqrt(len(self.places) / self.size))


@dataclass(frozen=True)
class _Idle:
    """A weight of a layer that adds nothing; its norms are like the others'."""

    name: str
    shape: tuple[int, ...]
    seed: int

    def __call__(self) -> Floats:
        if self.name in ("o", "down"):
            return np.zeros(self.shape, np.float32)
        if len(self.shape) == 1:
            return np.ones(self.shape, np.float32)
        noise = np.random.default_rng(self.seed).standard_normal(self.shape, np.float32)
        noise *= np.float32(self.shape[1] ** -0.5)
        return noise


def _spread(weight: Floats, rows: GrownAxis, columns: GrownAxis | None) -> Floats:
    if columns is None:
        grown = np.zeros(rows.size, np.float32)
        grown[rows.places] = weight
        return grown
    grown = np.zeros((rows.size, columns.size), np.float32)
    grown[np.ix_(rows.places, columns.places)] = weight
    return grown


def _axes(config: ModelConfig, small: LayerConfig, shape: TargetShape) -> dict[str, GrownAxis]:
    stretch = shape.head_dim // small.head_dim
    half = np.arange(small.head_dim // 2) * stretch
    inside = np.concatenate([half, half + shape.head_dim // 2])
    group, new_group = small.heads // small.kv_heads, shape.heads // shape.kv_heads
    head = np.arange(small.heads)
    queries = head // group * new_group + head % group

    def heads(places: NDArray[np.int64], count: int) -> GrownAxis:
        grid = places[:, None] * shape.head_dim + inside
        return GrownAxis(count * shape.head_dim, grid.ravel())

    return {
        "hidden": GrownAxis(shape.hidden, np.arange(config.hidden_size)),
        "inner": GrownAxis(shape.intermediate, np.arange(small.intermediate)),
        "queries": heads(queries, shape.heads),
        "head": GrownAxis(shape.head_dim, inside),
        "keys": heads(np.arange(small.kv_heads), shape.kv_heads),
    }


def _plan(
    name: str, axes: dict[str, GrownAxis], inner_norms: bool
) -> tuple[GrownAxis, GrownAxis | None, float]:
    """Return the axes of the rows and columns of a weight, and its scale."""
    hidden, inner, queries = axes["hidden"], axes["inner"], axes["queries"]
    norms = {"attn_norm": hidden, "mlp_norm": hidden}
    norms |= {"attn_inner_norm": queries, "mlp_inner_norm": inner}
    if name in norms:
        return norms[name], None, norms[name].gain
    scale = 1.0
    if name == "q":
        scale = axes["head"].gain ** -1
    elif inner_norms and name in ("v", "up"):
        scale = hidden.gain / (queries if name == "v" else inner).gain
    rows = {"q": queries, "k": axes["keys"], "v": axes["keys"], "o": hidden, "down": hidden}
    columns = {"o": queries, "down": inner}
    return rows.get(name, inner), columns.get(name, hidden), scale


def _settings(config: ModelConfig, shape: TargetShape) -> dict[str, object]:
    rope = config.layers[0].rope
    inner = config.family == "bitnet"
    return {
        "model_type": "bitnet" if inner else "llama",
        "architectures": ["BitNetForCausalLM" if inner else "LlamaForCausalLM"],
        "vocab_size": config.vocab_size,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "hidden_act": config.activation,
        "rms_norm_eps": config.norm_eps * config.hidden_size / shape.hidden,
        "rope_theta": rope.theta if rope else 10000.0,
        "max_position_embeddings": config.context,
        "tie_word_embeddings": config.tied,
        "bos_token_id": config.bos,
        "eos_token_id": list(config.eos) or None,
    }


def _check(config: ModelConfig, shape: TargetShape) -> None:
    small = config.layers[0]
    plain = (
        config.family in ("llama", "bitnet")
        and len(set(config.layers)) == 1
        and small.rope is not None
        and small.rope.scaling == "default"
    )
    if not plain:
        raise ModelError(f"only plain Llama and BitNet models can be inflated, not {config.family}")
    if shape.hidden % shape.heads or shape.heads % shape.kv_heads:
        raise ModelError("the new hidden size must be a multiple of its heads, heads of KV heads")
    if shape.head_dim % small.head_dim:
        raise ModelError(f"the new head size {shape.head_dim} is no multiple of {small.head_dim}")
    groups = small.heads // small.kv_heads
    if config.family == "bitnet" and shape.heads // shape.kv_heads != groups:
        raise ModelError(f"a BitNet model keeps its {groups} query heads to each KV head")
    fits = (
        shape.hidden >= config.hidden_size
        and shape.layers >= len(config.layers)
        and shape.kv_heads >= small.kv_heads
        and shape.heads // shape.kv_heads >= groups
        and shape.intermediate >= small.intermediate
    )
    if not fits:
        raise ModelError(f"{shape} cannot hold the model: every size must be at least the model's")

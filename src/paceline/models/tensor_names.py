"""Maps canonical tensor names to tensors of a checkpoint, with their shapes.

Canonical names: `embed`, `positions`, `final_norm`, `head`, and in `layers.{i}.`: `attn_norm`,
`q`, `k`, `v`, `o`, `q_norm`, `k_norm`, `attn_inner_norm`, `attn_post_norm`, `mlp_norm`, `gate`,
`up`, `down`, `mlp_inner_norm`, `mlp_post_norm`; each with `.bias` where the model has one.
Matrices are [out, in]. Parts that a model, or one of its layers, lacks have no name.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from paceline.models.config import LayerConfig, ModelConfig
from paceline.models.family import Family

Shape = tuple[int, ...]
_OF_ATTENTION = frozenset(
    ("q", "k", "v", "o", "q_norm", "k_norm", "attn_norm", "attn_inner_norm", "attn_post_norm")
)


@dataclass(frozen=True, slots=True)
class Place:
    """Location of a canonical tensor.

    Attributes:
        tensor: name in the checkpoint, without its prefix.
        stored: shape of that tensor.
        shape: shape of the canonical one.
        rows: its rows in the stored tensor (after transposition), or None for all.
        groups: where heads of q, k and v are interleaved: the number of key/value heads, the heads
            that lie together for each of them, and those among them that this tensor has.
        turned: the stored matrix is [in, out].
        paired: (rows of a head, how many of them are rotated) where these lie in rotary pairs,
            0, r / 2, 1, r / 2 + 1 ...; or None.
        base: where the matrix is that this one, of low rank, is added to; or None.
    """

    tensor: str
    stored: Shape
    shape: Shape
    rows: slice | None = None
    groups: tuple[int, int, slice] | None = None
    turned: bool = False
    paired: tuple[int, int] | None = None
    base: Place | None = None


def places(config: ModelConfig, family: Family, biased: frozenset[str]) -> dict[str, Place]:
    """Return the location of every tensor of the model, by canonical name."""
    located: dict[str, Place] = {}
    outer = _outer_shapes(config)
    for module, name in family.outer.items():
        located |= _entries("", module, name, outer, family, biased, config.layers[0])
    for i, layer in enumerate(config.layers):
        shapes = _layer_shapes(config, layer)
        at = family.at.format(i=i)
        for module, names in family.layer.items():
            entries = _entries(at, module, names, shapes, family, biased, layer)
            located |= {f"layers.{i}.{name}": place for name, place in entries.items()}
        for name, source in family.shared.items():
            for suffix in ("", ".bias"):
                if place := located.get(f"layers.{i}.{source}{suffix}"):
                    located[f"layers.{i}.{name}{suffix}"] = place
        if family.paired:
            dim = layer.rope.dim if layer.rope else layer.head_dim // 2 * 2
            for name in (f"layers.{i}.{part}" for part in ("q", "k", "q.bias", "k.bias")):
                if name in located:
                    located[name] = replace(located[name], paired=(layer.head_dim, dim))
    return {name: place for name, place in located.items() if _is_there(config, name)}


def has_part(layer: LayerConfig, name: str) -> bool:
    """Return whether a layer has the part that a tensor `q`, `mlp_norm.bias` ... belongs to."""
    attends = name.removesuffix(".bias") in _OF_ATTENTION
    return bool(layer.heads if attends else layer.intermediate)


def _is_there(config: ModelConfig, name: str) -> bool:
    prefix, _, rest = name.partition(".")
    if prefix != "layers":
        return True
    index, _, part = rest.partition(".")
    return has_part(config.layers[int(index)], part)


def _outer_shapes(config: ModelConfig) -> dict[str, Shape]:
    hidden = config.hidden_size
    return {
        "embed": (config.vocab_size, hidden),
        "positions": (config.context + config.position_offset, hidden),
        "final_norm": (hidden,),
        "head": (config.vocab_size, hidden),
    }


def _layer_shapes(config: ModelConfig, layer: LayerConfig) -> dict[str, Shape]:
    hidden, inner = config.hidden_size, layer.intermediate
    queries, keys = layer.heads * layer.head_dim, layer.kv_heads * layer.head_dim
    width = config.qk_norm == "width"
    return {
        "q": (queries, hidden),
        "k": (keys, hidden),
        "v": (keys, hidden),
        "o": (hidden, queries),
        "gate": (inner, hidden),
        "up": (inner, hidden),
        "down": (hidden, inner),
        "q_norm": (queries if width else layer.head_dim,),
        "k_norm": (keys if width else layer.head_dim,),
        "attn_norm": (hidden,),
        "attn_inner_norm": (queries,),
        "attn_post_norm": (hidden,),
        "mlp_norm": (hidden,),
        "mlp_inner_norm": (inner,),
        "mlp_post_norm": (hidden,),
    }


def _entries(
    at: str,
    module: str,
    names: str,
    shapes: dict[str, Shape],
    family: Family,
    biased: frozenset[str],
    layer: LayerConfig,
) -> dict[str, Place]:
    """Return the weights and biases that one module of the checkpoint holds."""
    group = layer.heads // max(layer.kv_heads, 1)
    interleaved = {"q": slice(0, group), "k": slice(group, group + 1), "v": slice(group + 1, None)}
    parts = names.split()
    total = sum(shapes[name][0] for name in parts)
    entries: dict[str, Place] = {}
    start = 0
    for name in parts:
        shape = shapes[name]
        rows = slice(start, start + shape[0]) if len(parts) > 1 else None
        start += shape[0]
        stored = (total, *shape[1:])
        groups = None
        if family.interleaved and rows:
            groups = (layer.kv_heads, group + 2, interleaved[name])
        turned = family.transposed and bool(at) and len(shape) == 2
        weight = Place(
            f"{at}{module}.weight", stored[::-1] if turned else stored, shape, rows, groups, turned
        )
        entries[name] = weight
        if name in biased or (len(shape) == 1 and family.norm == "layer" and family.norm_bias):
            tensor = f"{at}{module}.bias"
            entries[f"{name}.bias"] = Place(tensor, stored[:1], shape[:1], rows, groups)
    return entries

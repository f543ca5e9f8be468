"""Settings that differ between layers: attention windows and rotary angles."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from paceline.errors import ModelError, unknown
from paceline.models.fields import LARGEST, Fields
from paceline.models.rope import SCALINGS, Rope

Windows = Callable[[Fields, int], list[int | None]]  # (settings, layers)
Ropes = Callable[[Fields, int, int], list[Rope | None]]  # (settings, layers, head_dim)

_SLIDING, _FULL = "sliding_attention", "full_attention"

_SANE = (1e-3, 1e4)  # what a rope setting may be; beyond it float32 angles overflow

# Settings a scaling cannot do without, and those it may have.
_NEEDED = {
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "yarn": ("factor",),
}
_OPTIONAL = {
    "yarn": ("attention_factor", "mscale", "mscale_all_dim"),
    "longrope": ("attention_factor",),
}
_KNOWN = {
    *("rope_type", "type", "rope_theta", "partial_rotary_factor", "factor"),
    *("original_max_position_embeddings", "attention_factor", "low_freq_factor"),
    *("high_freq_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"),
    *("short_factor", "long_factor", "short_mscale", "long_mscale"),
}


def no_windows(fields: Fields, count: int) -> list[int | None]:
    """Return no window for any layer; refuse a config that asks for one."""
    if "layer_types" in fields and set(fields.strings("layer_types", count)) != {_FULL}:
        raise fields.fail("layer_types", f"{_FULL} for every layer of this family")
    return [None] * count


def one_window(fields: Fields, count: int) -> list[int | None]:
    """Return `sliding_window` for every layer; `null` means none."""
    if "layer_types" in fields and len(set(fields.strings("layer_types", count))) > 1:
        raise fields.fail("layer_types", "the same for every layer of this family")
    if not has_window(fields) or fields.get("sliding_window") is None:
        return [None] * count
    return [fields.integer("sliding_window")] * count


def attention_only(fields: Fields, count: int) -> list[int | None]:
    """Return no window for any layer; refuse layers that are recurrent (Granite 4)."""
    kinds = fields.strings("layer_types", count)
    if not set(kinds) <= {_FULL, "attention"}:
        raise fields.fail("layer_types", "attention in every layer; recurrent ones do not run")
    return [None] * count


def typed_windows(sliding: Callable[[Fields, int], bool]) -> Windows:
    """Return windows by `layer_types`, or if absent, for the layers of `sliding(fields, i)`."""

    def windows(fields: Fields, count: int) -> list[int | None]:
        kinds = layer_types(fields, count, sliding)
        if _SLIDING in kinds and not has_window(fields):
            raise fields.fail("sliding_window", "a number of positions")
        return [fields.integer("sliding_window") if kind == _SLIDING else None for kind in kinds]

    return windows


def layer_types(fields: Fields, count: int, sliding: Callable[[Fields, int], bool]) -> list[str]:
    """Return the kind of every layer, `sliding_attention` or `full_attention`."""
    if "layer_types" not in fields:
        return [_SLIDING if sliding(fields, i) else _FULL for i in range(count)]
    kinds = fields.strings("layer_types", count)
    for kind in kinds:
        if kind not in (_SLIDING, _FULL):
            raise ModelError(f"{unknown('layer type', kind, (_SLIDING, _FULL))}")
    return kinds


def after_first_layers(fields: Fields, layer: int) -> bool:
    """Select the layers from `max_window_layers` on, if windows are switched on (Qwen)."""
    if not fields.boolean("use_sliding_window"):
        return False
    return layer >= fields.integer("max_window_layers", 28, low=0)


def every_other(fields: Fields, layer: int) -> bool:
    """Select layers 0, 2, 4 ... (Gemma 2)."""
    return layer % 2 == 0


def five_of_six(fields: Fields, layer: int) -> bool:
    """Select all but every sixth layer (Gemma 3)."""
    return (layer + 1) % fields.integer("sliding_window_pattern", 6) != 0


def three_of_four(fields: Fields, layer: int) -> bool:
    """Select all but every fourth layer, none where `sliding_window` is null (OLMo 3, Cohere 2)."""
    return has_window(fields) and (layer + 1) % fields.integer("sliding_window_pattern", 4) != 0


def all_with_window(fields: Fields, layer: int) -> bool:
    """Select all layers, none where `sliding_window` is null (Ministral)."""
    return has_window(fields)


def has_window(fields: Fields) -> bool:
    """Return whether `sliding_window` is anything but a written null."""
    return fields.values.get("sliding_window", 0) is not None


def without_rope(fields: Fields, layer: int) -> bool:
    """Select the layers without rotary embedding, if windows are switched on (SmolLM 3)."""
    switched_on = fields.boolean("use_sliding_window") and "sliding_window" in fields
    return switched_on and not _rotates(fields, layer)


def gpt_neo_windows(fields: Fields, count: int) -> list[int | None]:
    """Read windows from `attention_types`: [[["global", "local"], 4]] is four times the pair."""
    kinds: list[Any] = []
    try:
        for pattern, times in fields.get("attention_types", [[["global", "local"], 12]]):
            if len(kinds) <= count:
                kinds += list(pattern) * min(times, count + 1)
    except (TypeError, ValueError):
        raise fields.fail("attention_types", "a list of [pattern, times]") from None
    if len(kinds) != count or any(kind not in ("global", "local") for kind in kinds):
        raise fields.fail("attention_types", f"{count} times global or local")
    return [fields.integer("window_size", 256) if kind == "local" else None for kind in kinds]


def no_rope(fields: Fields, count: int, head_dim: int) -> list[Rope | None]:
    """Return no rotary embedding: positions are learned."""
    return [None] * count


def one_rope(fields: Fields, count: int, head_dim: int) -> list[Rope | None]:
    """Return the same rotary embedding for every layer."""
    return [read_rope(fields, _scaling(fields), head_dim)] * count


def rope_if_named(fields: Fields, count: int, head_dim: int) -> list[Rope | None]:
    """Return the same rotary embedding, if `position_embedding_type` asks for one (Granite 4)."""
    kind = fields.get("position_embedding_type", "nope")
    if kind not in ("rope", "nope"):
        raise fields.fail("position_embedding_type", "rope or nope")
    return one_rope(fields, count, head_dim) if kind == "rope" else [None] * count


def smollm3_ropes(fields: Fields, count: int, head_dim: int) -> list[Rope | None]:
    """Return no rotary embedding for every `no_rope_layer_interval`-th layer."""
    rope = read_rope(fields, _scaling(fields), head_dim)
    return [rope if _rotates(fields, i) else None for i in range(count)]


def ropes_of_windows(fields: Fields, count: int, head_dim: int) -> list[Rope | None]:
    """Return a rotary embedding for layers with a window, none for the others (Cohere 2)."""
    rope = read_rope(fields, _scaling(fields), head_dim)
    kinds = layer_types(fields, count, three_of_four)
    return [rope if kind == _SLIDING else None for kind in kinds]


def exaone4_ropes(fields: Fields, count: int, head_dim: int) -> list[Rope | None]:
    """Return a rotary embedding for layers with a window, for all where there are no windows."""
    ropes = ropes_of_windows if has_window(fields) else one_rope
    return ropes(fields, count, head_dim)


def hunyuan_ropes(fields: Fields, count: int, head_dim: int) -> list[Rope | None]:
    """Return one embedding; a fixed NTK `alpha` stretches its base, and the other settings rest."""
    scaling = _scaling(fields)
    own = Fields(scaling, f"the rope settings of {fields.where}")
    if "alpha" not in own or own.text("rope_type", own.text("type", "default")) != "dynamic":
        return one_rope(fields, count, head_dim)
    if head_dim < 4:
        raise fields.fail("head_dim", "at least 4 for this rotary embedding")
    theta = own.number("rope_theta", fields.number("rope_theta", 1e4))
    stretched = theta * own.number("alpha", None, *_SANE) ** (head_dim / (head_dim - 2))
    return [read_rope(fields, {"rope_theta": stretched}, head_dim)] * count


def ministral3_ropes(fields: Fields, count: int, head_dim: int) -> list[Rope | None]:
    """Return one embedding whose queries grow with the position (Ministral 3)."""
    scaling = _scaling(fields)
    if not scaling:
        raise fields.fail("rope_parameters", "the settings of a rotary embedding")
    own = Fields(scaling, "the rope settings of config.json")
    growth = own.number("llama_4_scaling_beta", 0.0, low=-1.0, high=_SANE[1])
    ours = ("llama_4_scaling_beta", "max_position_embeddings")
    rest = {name: value for name, value in scaling.items() if name not in ours}
    rope = read_rope(fields, rest, head_dim)
    if growth == 0:
        return [rope] * count
    length = own.integer("original_max_position_embeddings")
    return [replace(rope, query_growth=growth, query_length=length)] * count


def gemma3_ropes(fields: Fields, count: int, head_dim: int) -> list[Rope | None]:
    """Return a separate base without scaling for layers with a window."""
    bases = fields.number("rope_theta", 1e6), fields.number("rope_local_base_freq", 1e4)
    return _typed_ropes(fields, layer_types(fields, count, five_of_six), bases, head_dim)


def olmo3_ropes(fields: Fields, count: int, head_dim: int) -> list[Rope | None]:
    """Return the same base for all layers; those with a window have no scaling."""
    bases = fields.number("rope_theta", 5e5), fields.number("rope_theta", 5e5)
    return _typed_ropes(fields, layer_types(fields, count, three_of_four), bases, head_dim)


def _typed_ropes(
    fields: Fields, kinds: list[str], bases: tuple[float, float], head_dim: int
) -> list[Rope | None]:
    """Return the embeddings of full and of sliding layers, which have separate settings.

    `bases` are those of full and sliding layers, if the settings of that kind name none.
    """
    both = fields.table("rope_parameters")
    for key in both:
        if key not in (_SLIDING, _FULL):
            raise ModelError(unknown("entry of rope_parameters", key, (_SLIDING, _FULL)))
    parts = Fields(both, f"rope_parameters of {fields.where}")
    old = fields.table("rope_scaling")
    full, local = parts.table(_FULL) | old, parts.table(_SLIDING)
    full, local = {"rope_theta": bases[0]} | full, {"rope_theta": bases[1]} | local
    ropes = {
        _FULL: read_rope(fields, full, head_dim),
        _SLIDING: read_rope(fields, local, head_dim),
    }
    return [ropes[kind] for kind in kinds]


def read_rope(fields: Fields, scaling: dict[str, Any], head_dim: int) -> Rope:
    """Return the rotary embedding of `scaling` (`rope_parameters`, or the older `rope_scaling`).

    Raises:
        ModelError: an unknown scaling or setting, or a value out of range.
    """
    for key in scaling:
        if key not in _KNOWN:
            raise ModelError(unknown("rope setting", key, _KNOWN))
    own = Fields(scaling, f"the rope settings of {fields.where}")
    kind = own.text("rope_type", own.text("type", "default"))
    if kind == "su" or (kind == "yarn" and fields.get("model_type") == "phi3"):
        kind = "longrope"  # its names in early Phi-3 checkpoints
    if kind not in SCALINGS:
        raise ModelError(unknown("rope scaling", kind, SCALINGS))
    theta = own.number("rope_theta", fields.number("rope_theta", 1e4))
    share = own.number("partial_rotary_factor", fields.number("partial_rotary_factor", 1.0))
    dim = int(head_dim * share)
    if theta <= 1 or dim % 2 or not 2 <= dim <= head_dim or (kind == "dynamic" and dim < 4):
        raise ModelError(
            f"rope of base {theta} over {dim} of {head_dim} values of a head is not possible, "
            "expected a base above 1 and an even number of values"
        )
    keys = (*_NEEDED.get(kind, ()), *(key for key in _OPTIONAL.get(kind, ()) if key in own))
    settings = {key: own.number(key, None, *_SANE) for key in keys}
    divisors: tuple[float, ...] = ()
    if kind in ("dynamic", "llama3", "yarn", "longrope"):
        settings["original_max_position_embeddings"] = _original(fields, own, kind)
    if kind == "llama3" and settings["low_freq_factor"] >= settings["high_freq_factor"]:
        raise own.fail("low_freq_factor", "less than high_freq_factor")
    if kind == "yarn":
        settings["beta_fast"] = own.number("beta_fast", 32, *_SANE)
        settings["beta_slow"] = own.number("beta_slow", 1, *_SANE)
        settings["truncate"] = float(own.boolean("truncate", True))
    if kind == "longrope":
        context = fields.integer("max_position_embeddings")
        stretch = context / settings["original_max_position_embeddings"]
        settings["factor"] = own.number("factor", stretch, *_SANE)
        divisors = _divisors(own, dim // 2)
    return Rope(theta, dim, kind, tuple(sorted(settings.items())), divisors)


def context(fields: Fields, ropes: list[Rope | None]) -> int:
    """Return the largest number of positions that the scalings allow.

    `linear` and `dynamic` multiply `max_position_embeddings`, except in Gemma 3, whose configs give
    the extended one; `yarn` multiplies the original one. `longrope` would need other angles for
    all positions once the original context is exceeded, so the model stops there.
    """
    written = fields.integer("max_position_embeddings")
    extended = written
    for rope in set(ropes) - {None}:
        settings = dict(rope.parameters) if rope else {}
        original = int(settings.get("original_max_position_embeddings", written))
        if rope and rope.scaling == "longrope":
            return min(written, original)
        if rope and rope.scaling in ("linear", "dynamic", "yarn"):
            if fields.get("model_type") in ("gemma3", "gemma3_text"):
                continue
            extended = max(extended, int(original * settings["factor"]))
    return min(extended, LARGEST)


def _scaling(fields: Fields) -> dict[str, Any]:
    return fields.table("rope_scaling") or fields.table("rope_parameters")


def _original(fields: Fields, own: Fields, kind: str) -> int:
    """Return the context that the model was trained with before it was extended."""
    written = fields.integer("max_position_embeddings")
    if kind == "dynamic":
        return written
    name = "original_max_position_embeddings"
    low = 2 if kind == "longrope" else 1
    return fields.integer(name, own.integer(name, written, low), low)


def _divisors(own: Fields, count: int) -> tuple[float, ...]:
    values = own.get("short_factor")
    if not isinstance(values, list) or len(values) != count:
        raise own.fail("short_factor", f"a list of {count} numbers")
    items = Fields({str(i): value for i, value in enumerate(values)}, "short_factor")
    return tuple(items.number(str(i), None, *_SANE) for i in range(count))


def _rotates(fields: Fields, layer: int) -> bool:
    rotating = fields.get("no_rope_layers")
    if rotating is None:
        return (layer + 1) % fields.integer("no_rope_layer_interval", 4) != 0
    if not isinstance(rotating, list) or layer >= len(rotating) or rotating[layer] not in (0, 1):
        raise fields.fail("no_rope_layers", "a list of 0 or 1, one for each layer")
    return bool(rotating[layer])

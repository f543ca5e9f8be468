"""Extends the context of a model when it is opened: other angles of its rotary embedding."""

from __future__ import annotations

from dataclasses import replace

from paceline.errors import ModelError, RequestError, unknown
from paceline.method_spec import parse_spec
from paceline.models.config import LayerConfig, ModelConfig
from paceline.models.rope import DUAL_CHUNK, Rope

SCALINGS = ("linear", "dynamic", "yarn", DUAL_CHUNK)
_LARGEST = 64.0
_SHORTEST = 64  # trained positions that dual chunks can be made of
_YARN = {"beta_fast": 32.0, "beta_slow": 1.0, "truncate": 1.0}


def extend_context(config: ModelConfig, text: str) -> ModelConfig:
    """Return a model's shape with a longer context.

    `linear` divides positions by the factor (position interpolation, arXiv 2306.15595); `yarn`
    does so for slow frequencies only and scales attention (arXiv 2309.00071); `dynamic` raises the
    base with the position, and leaves the original context as it is (NTK). `dual_chunk` lets no
    distance exceed those of the first `length` positions, by default of the whole context: chunks
    are three quarters of it (`models.dual_chunk`). Layers with a sliding window never see far and
    stay as they are. No weights change; quality beyond the original context is the model's luck,
    so measure it (`paceline eval --suite long`).

    Args:
        config: of a model whose rotary embedding is not scaled.
        text: `linear`, `dynamic`, `yarn` or `dual_chunk`, with `:factor=` above 1 and up to 64;
            of `dual_chunk` also `length=`, 64 up to the context.

    Raises:
        RequestError: the text names no such scaling, or a factor that is out of range.
        ModelError: the model's positions are learned, or are scaled already.
    """
    spec = parse_spec(text)
    if spec.name not in SCALINGS:
        raise RequestError(unknown("scaling of positions", spec.name, SCALINGS))
    allowed = {"factor", "length"} if spec.name == DUAL_CHUNK else {"factor"}
    if "factor" not in spec.settings or not set(spec.settings) <= allowed:
        raise RequestError(
            f"the scaling {text!a:.80} needs {' and takes '.join(sorted(allowed))}, e.g. "
            f"{spec.name}:factor=2"
        )
    factor = _factor(spec.settings["factor"])
    length = _length(spec.settings.get("length"), config.context)
    far = [layer.rope for layer in config.layers if layer.window is None]
    if not any(far):
        raise ModelError(
            "no layer of the model turns positions it sees from afar; leave --rope out"
        )
    for rope in far:
        if rope is not None and rope.scaling != "default":
            raise ModelError(
                f"the model's positions are scaled already ({rope.scaling}); leave --rope out"
            )
    if spec.name == DUAL_CHUNK and config.qk_norm == "rotated":
        raise ModelError(
            "the model norms queries behind their rotation, which dual_chunk adds to; take --rope "
            f"yarn:factor={factor:g}"
        )
    layers = tuple(_stretched(layer, spec.name, factor, length) for layer in config.layers)
    return replace(config, layers=layers, context=int(config.context * factor))


def _factor(text: str) -> float:
    try:
        factor = float(text)
    except ValueError:
        factor = 0.0
    if not 1 < factor <= _LARGEST:
        raise RequestError(f"the factor of --rope is {text!a:.40}, expected above 1, up to 64")
    return factor


def _length(text: str | None, context: int) -> int:
    if text is None:
        return context
    length = int(text) if text.isdecimal() and len(text) < 9 else 0
    if not _SHORTEST <= length <= context:
        raise RequestError(
            f"the length of --rope is {text!a:.40}, expected {_SHORTEST} up to the context, "
            f"{context}"
        )
    return length


def _stretched(layer: LayerConfig, scaling: str, factor: float, length: int) -> LayerConfig:
    rope: Rope | None = layer.rope
    if rope is None or layer.window is not None:
        return layer
    parameters = {"factor": factor}
    if scaling == DUAL_CHUNK:
        parameters |= {"length": float(length), "chunk": float(max(1, length * 3 // 4))}
    elif scaling != "linear":
        parameters["original_max_position_embeddings"] = float(length)
    if scaling == "yarn":
        parameters |= _YARN
    scaled = replace(rope, scaling=scaling, parameters=tuple(sorted(parameters.items())))
    return replace(layer, rope=scaled)

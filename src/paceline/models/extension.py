"""Extends the context of a model when it is opened: other angles of its rotary embedding."""

from __future__ import annotations

from dataclasses import replace

from paceline.errors import ModelError, RequestError, unknown
from paceline.method_spec import parse_spec
from paceline.models.config import LayerConfig, ModelConfig
from paceline.models.rope import Rope

SCALINGS = ("linear", "dynamic", "yarn")
_LARGEST = 64.0
_YARN = {"beta_fast": 32.0, "beta_slow": 1.0, "truncate": 1.0}


def extend_context(config: ModelConfig, text: str) -> ModelConfig:
    """Return a model's shape with a longer context.

    `linear` divides positions by the factor (position interpolation, arXiv 2306.15595); `yarn`
    does so for slow frequencies only and scales attention (arXiv 2309.00071); `dynamic` raises the
    base with the position, and leaves the original context as it is (NTK). Layers with a sliding
    window never see far and stay as they are. No weights change; quality beyond the original
    context is the model's luck, so measure it (`paceline eval --suite long`).

    Args:
        config: of a model whose rotary embedding is not scaled.
        text: `linear`, `dynamic` or `yarn`, with `:factor=` above 1 and up to 64.

    Raises:
        RequestError: the text names no such scaling, or a factor that is out of range.
        ModelError: the model's positions are learned, or are scaled already.
    """
    spec = parse_spec(text)
    if spec.name not in SCALINGS:
        raise RequestError(unknown("scaling of positions", spec.name, SCALINGS))
    if set(spec.settings) != {"factor"}:
        raise RequestError(f"the scaling {text!a:.80} needs one setting, e.g. {spec.name}:factor=2")
    factor = _factor(spec.settings["factor"])
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
    layers = tuple(_stretched(layer, spec.name, factor, config.context) for layer in config.layers)
    return replace(config, layers=layers, context=int(config.context * factor))


def _factor(text: str) -> float:
    try:
        factor = float(text)
    except ValueError:
        factor = 0.0
    if not 1 < factor <= _LARGEST:
        raise RequestError(f"the factor of --rope is {text!a:.40}, expected above 1, up to 64")
    return factor


def _stretched(layer: LayerConfig, scaling: str, factor: float, context: int) -> LayerConfig:
    rope: Rope | None = layer.rope
    if rope is None or layer.window is not None:
        return layer
    parameters = {"factor": factor}
    if scaling != "linear":
        parameters["original_max_position_embeddings"] = float(context)
    if scaling == "yarn":
        parameters |= _YARN
    scaled = replace(rope, scaling=scaling, parameters=tuple(sorted(parameters.items())))
    return replace(layer, rope=scaled)

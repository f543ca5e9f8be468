"""Metadata of a GGUF file for a model: the inverse of `gguf_config.py`, by the same table.

What was written is read again before a tensor is converted: a model whose file would be another one
is refused, with what differs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from paceline.core import Floats
from paceline.errors import ModelError
from paceline.models.config import ModelConfig
from paceline.models.export.comparison import differences
from paceline.models.fields import Fields
from paceline.models.formats.gguf import GGUFFile, GGUFTensor
from paceline.models.formats.gguf_writer import Value
from paceline.models.gguf_architectures import ARCHITECTURES, Architecture
from paceline.models.gguf_config import read_gguf_config
from paceline.models.rope import Rope

# Families whose text model is another family's, or is one without windows.
SAME_AS = {"gemma3": "gemma3_text"}
WITHOUT_WINDOWS = {"mistral": "llama", "ministral": "llama"}


def find_architecture(config: ModelConfig) -> tuple[str, Architecture]:
    """Return the architecture of files of this family.

    Raises:
        ModelError: GGUF has none.
    """
    family = SAME_AS.get(config.family, config.family)
    if not any(layer.window for layer in config.layers):
        family = WITHOUT_WINDOWS.get(family, family)
    for name, arch in ARCHITECTURES.items():
        if family in (arch.family, arch.windowed):
            return name, arch
    known = sorted({arch.family for arch in ARCHITECTURES.values()})
    raise ModelError(
        f"{config.family} models have no GGUF architecture, expected one of {', '.join(known)}; "
        "write a safetensors folder instead"
    )


def gguf_settings(
    config: ModelConfig, settings: Fields, name: str, arch: Architecture
) -> dict[str, Value]:
    """Return the keys `{architecture}.*` of a model.

    Args:
        config: of the model.
        settings: of its config.json, which holds what `config` has worked out already.
        name: of the architecture.
        arch: its row of the table.
    """
    layer = config.layers[0]
    if len({(each.heads, each.kv_heads, each.intermediate) for each in config.layers}) > 1:
        raise ModelError(
            "GGUF files give all layers one shape, and parts of some layers were left out of this "
            "model; Paceline runs its folder as it is"
        )
    norm = "layer_norm_rms_epsilon" if config.norm == "rms" else "layer_norm_epsilon"
    own: dict[str, Value] = {
        "vocab_size": config.vocab_size,
        "context_length": settings.integer("max_position_embeddings", config.context),
        "embedding_length": config.hidden_size,
        "block_count": len(config.layers),
        "feed_forward_length": layer.intermediate,
        "attention.head_count": layer.heads,
        "attention.head_count_kv": layer.kv_heads,
        "attention.key_length": layer.head_dim,
        "attention.value_length": layer.head_dim,
        f"attention.{norm}": config.norm_eps,
    }
    full = next((each for each in config.layers if each.rope and not each.window), None)
    rope = full.rope if full else next((each.rope for each in config.layers if each.rope), None)
    if rope is not None:
        own |= _rope(rope, settings)
    windows = "attention.sliding_window" in arch.keys
    window = next((each.window for each in config.layers if each.window), 0) if windows else 0
    local = next((each.rope for each in config.layers if each.rope and each.window), rope)
    special: dict[str, Value | None] = {
        "attn_logit_softcapping": config.attention_softcap,
        "final_logit_softcapping": config.logit_softcap,
        "use_parallel_residual": config.parallel,
        "attention.sliding_window": window,
        "rope.freq_base_swa": local.theta if local else None,
        "rope.scaling.yarn_log_multiplier": None,  # `rope.scaling.attn_factor` says it
        "attention.temperature_scale": rope.query_growth if rope and rope.query_growth else None,
        "attention.temperature_length": rope.query_length if rope and rope.query_growth else None,
    }
    for key in arch.keys:
        if (value := special.get(key, settings.get(arch.keys[key]))) is not None:
            own[key] = value
    if window and len({each.window for each in config.layers}) > 1:
        pattern = np.array([each.window is not None for each in config.layers])
        own["attention.sliding_window_pattern"] = pattern
    return {f"{name}.{key}": value for key, value in own.items()}


def _rope(rope: Rope, settings: Fields) -> dict[str, Value]:
    own: dict[str, Value] = {"rope.dimension_count": rope.dim, "rope.freq_base": rope.theta}
    numbers = dict(rope.parameters)
    if rope.scaling in ("linear", "yarn"):
        own |= {"rope.scaling.type": rope.scaling, "rope.scaling.factor": numbers["factor"]}
    if rope.scaling == "yarn":
        original = int(numbers["original_max_position_embeddings"])
        own["rope.scaling.original_context_length"] = original
        for key in ("beta_fast", "beta_slow"):
            own[f"rope.scaling.yarn_{key}"] = float(numbers[key])
        usual = 0.1 * math.log(max(numbers["factor"], 1.0)) + 1
        if not math.isclose(rope.amplitude, usual):
            own["rope.scaling.attn_factor"] = rope.amplitude / usual
    if rope.scaling == "longrope" and "long_factor" in _scaling(settings):
        original = int(numbers["original_max_position_embeddings"])
        own["rope.scaling.original_context_length"] = original
        own["rope.scaling.attn_factor"] = rope.amplitude
    return own


def _scaling(settings: Fields) -> dict[str, Any]:
    return settings.table("rope_scaling") or settings.table("rope_parameters")


def rope_tensors(config: ModelConfig, settings: Fields) -> dict[str, Floats]:
    """Return the divisors of frequencies that files hold as tensors, [dim / 2] each."""
    rope = next((each.rope for each in config.layers if each.rope), None)
    if rope is None or rope.scaling not in ("llama3", "longrope"):
        return {}
    if rope.scaling == "llama3":
        plain = replace(rope, scaling="default", parameters=())
        return {"rope_freqs.weight": (plain.frequencies / rope.frequencies).astype(np.float32)}
    short = np.array(rope.divisors, np.float32)
    if "long_factor" not in _scaling(settings):  # of a GGUF file, what Llama 3 scales by
        return {"rope_freqs.weight": short}
    long = np.array(_scaling(settings)["long_factor"], np.float32)
    return {"rope_factors_short.weight": short, "rope_factors_long.weight": long}


def check_same(
    config: ModelConfig,
    metadata: Mapping[str, Value],
    tensors: Mapping[str, tuple[int, ...]],
    divisors: Mapping[str, Floats],
) -> None:
    """Refuse metadata from which another model than `config` would be read.

    Args:
        config: of the model.
        metadata: to write.
        tensors: names and shapes to write.
        divisors: those tensors of them that say how to rotate.

    Raises:
        ModelError: what the file would lose.
    """
    empty = np.empty((0, 0), np.uint8)
    held = {name: GGUFTensor(name, "F32", shape, empty) for name, shape in tensors.items()}
    for name, values in divisors.items():
        held[name] = GGUFTensor(name, "F32", values.shape, values.view(np.uint8)[None])
    seen = {key: as_read(value) for key, value in metadata.items()}
    try:
        found, _, _ = read_gguf_config(GGUFFile(Path("the file"), seen, held, ()))
    except ModelError as error:
        raise ModelError(f"this model cannot be a GGUF file: {error}") from None
    if lost := differences(config, found):
        raise ModelError(
            f"GGUF's architecture {metadata['general.architecture']} cannot describe this model: "
            f"{', '.join(lost)} would be lost; write a safetensors folder instead"
        )


def as_read(value: Value) -> Any:
    """Return a value as the reader gives it."""
    if isinstance(value, float):
        return float(str(np.float32(value)))
    if isinstance(value, list | tuple):
        if value and isinstance(value[0], str | bytes):
            return [each.encode() if isinstance(each, str) else each for each in value]
        return np.array(value)
    return value

"""The config.json of a model for transformers, from another one or from GGUF metadata."""

from __future__ import annotations

from typing import Any

import numpy as np

from paceline.errors import ModelError
from paceline.models.export.gguf_metadata import SAME_AS
from paceline.models.export.settings import family_of, model_settings
from paceline.models.layer_shapes import BIASES, SHAPES, plain_settings
from paceline.models.model import Model
from paceline.models.rope import Rope

_DROPPED = ("quantization_config", "torch_dtype", "dtype", "_name_or_path", "auto_map")
_CLASSES = {  # families whose classes are not called like them
    **{"gpt2": "GPT2LMHeadModel", "gpt_neox": "GPTNeoXForCausalLM", "olmo": "OlmoForCausalLM"},
    **{"smollm3": "SmolLM3ForCausalLM", "bitnet": "BitNetForCausalLM"},
    **{"gemma3_text": "Gemma3ForCausalLM", "stablelm": "StableLmForCausalLM"},
    **{"hunyuan_v1_dense": "HunYuanDenseV1ForCausalLM", "internlm2": "InternLM2ForCausalLM"},
    **{"ernie4_5": "Ernie4_5ForCausalLM", "minicpm": "MiniCPMForCausalLM"},
    **{"seed_oss": "SeedOssForCausalLM", "vaultgemma": "VaultGemmaForCausalLM"},
    **{"granitemoehybrid": "GraniteMoeHybridForCausalLM"},
}
_ACTIVATIONS = {"gelu_tanh": "gelu_pytorch_tanh"}  # our name -> that of config.json
_LLAMA3_CONTEXTS = range(4, 18)  # powers of two; 2^13 in published models


def hf_settings(model: Model) -> dict[str, Any]:
    """Return the settings of a folder in which tensors are floating-point numbers.

    Raises:
        ModelError: config.json has no words for what a GGUF file says.
    """
    values = model_settings(model)
    for key in _DROPPED:
        values.pop(key, None)
    family = SAME_AS.get(model.config.family, model.config.family)
    values["model_type"] = family
    values["tie_word_embeddings"] = model.config.tied
    if family != model.config.family or "architectures" not in values:
        usual = f"{family.capitalize()}ForCausalLM"
        values["architectures"] = [_CLASSES.get(family, usual)]
    return values if model.gguf is None else _from_gguf(model, values)


def transformers_settings(model: Model) -> dict[str, Any]:
    """Return the settings of a folder that transformers can load.

    Raises:
        ModelError: as `hf_settings`, or layers differ in their shapes.
    """
    values = plain_settings(hf_settings(model))
    if SHAPES in values or BIASES in values:
        raise ModelError(
            "transformers gives all layers one shape, and parts of some layers were left out of "
            "this model; Paceline runs the folder as it is"
        )
    return values


def _from_gguf(model: Model, values: dict[str, Any]) -> dict[str, Any]:
    """Complete the settings that GGUF files leave to the architecture."""
    config, family_name = model.config, model.config.family
    family = family_of(model, values)
    if "norm_eps" in values:
        values["rms_norm_eps"] = values.pop("norm_eps")
    activation = _ACTIVATIONS.get(config.activation, config.activation)
    values[family.names.get("hidden_act", "hidden_act")] = activation
    for names, setting in family.biases:
        if setting != "always":
            key = family.names.get(setting, setting)
            values[key] = any(f"layers.0.{name}.bias" in model.weights for name in names.split())
    layer = config.layers[0]
    if layer.head_dim * layer.heads == config.hidden_size and "head_dim" not in family.defaults:
        values.pop("head_dim", None)  # some families do not take what they work out themselves
    if family_name == "exaone4" and not any(each.window for each in config.layers):
        values |= {
            "sliding_window_pattern": 0,
            "layer_types": ["full_attention"] * len(config.layers),
        }
    if family_name == "olmo3" and (scaling := values.pop("rope_scaling", None)):
        theta = {"rope_theta": values["rope_theta"]}
        values["rope_parameters"] = {
            "full_attention": {**theta, **scaling},
            "sliding_attention": {**theta, "rope_type": "default"},
        }
    if family_name == "ministral3" and (scaling := values.pop("rope_scaling", None)):
        values["rope_parameters"] = {"rope_theta": values["rope_theta"], **scaling}
    stops = sorted(model.defaults.stop_tokens)
    values["pad_token_id"] = None  # not needed, and families differ in its default
    values["eos_token_id"] = stops[0] if len(stops) == 1 else stops or None
    rope = next((layer.rope for layer in config.layers if layer.rope), None)
    if rope is not None and rope.scaling == "longrope" and "long_factor" not in _scaling(values):
        _write_llama3(values, rope)
    return values


def _scaling(values: dict[str, Any]) -> dict[str, Any]:
    scaling: dict[str, Any] = values.get("rope_scaling") or {}
    return scaling


def _write_llama3(values: dict[str, Any], rope: Rope) -> None:
    """Write the setting of Llama 3 whose frequencies a file holds, worked out.

    Files have a divisor for each frequency: 1 for fast ones, the factor for slow ones.

    Raises:
        ModelError: no setting gives these frequencies.
    """
    for power in _LLAMA3_CONTEXTS:
        scaling = {
            "factor": float(max(rope.divisors)),
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 1 << power,
        }
        candidate = Rope(rope.theta, rope.dim, "llama3", tuple(sorted(scaling.items())))
        if np.allclose(candidate.frequencies, rope.frequencies, rtol=1e-4, atol=0):
            values["rope_scaling"] = {"rope_type": "llama3", **scaling}
            values.pop("original_max_position_embeddings", None)
            return
    raise ModelError(
        "this file scales its rotary frequencies by numbers that config.json has no words for; "
        "write a GGUF file instead"
    )

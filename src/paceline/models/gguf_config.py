"""Converts the metadata of a GGUF file to a `ModelConfig`, by way of the family's own settings."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from paceline.errors import ModelError, unknown
from paceline.models.config import ModelConfig
from paceline.models.families import FAMILIES
from paceline.models.family import Family
from paceline.models.fields import Fields
from paceline.models.formats.gguf import GGUFFile
from paceline.models.formats.gguf_types import dequantize
from paceline.models.gguf_architectures import ARCHITECTURES, NEUTRAL, Architecture
from paceline.models.hf_config import read_config

# Frequencies that `rope.*` settings describe, stored as divisors; no weights.
_ROPE_TENSORS = r"(^|\.)(rope_freqs|rope_factors_long|rope_factors_short|attn_rot_embd)\b"
_LARGEST_DIVISORS = 1 << 16  # of frequencies; heads are far smaller


def read_gguf_config(file: GGUFFile) -> tuple[ModelConfig, Family, frozenset[str]]:
    """Return the model's shape, where its tensors lie, and the linear maps that have a bias.

    The config equals that of the same model's config.json, except that norms of Gemma models have
    no offset: the file's weights hold it.

    Raises:
        ModelError: an unknown architecture, or a setting that is missing, absurd or not supported.
    """
    arch, values = _read(file)
    config, family, _ = read_config(values, f"the metadata of {file.path.name}")
    if arch.folded_norms:
        config = replace(config, norm_offset=0.0)
    family = located_family(family, arch, _modules(file, arch))
    return config, family, _biased(file, family)


def read_gguf_settings(file: GGUFFile) -> dict[str, Any]:
    """Return what config.json would hold of the metadata, by the names of the family.

    Raises:
        ModelError: as `read_gguf_config`.
    """
    return _read(file)[1]


def _read(file: GGUFFile) -> tuple[Architecture, dict[str, Any]]:
    """Return the architecture and the settings by the names of its family."""
    meta = Fields(file.metadata, f"the metadata of {file.path.name}")
    name = meta.text("general.architecture")
    arch = ARCHITECTURES.get(name)
    if arch is None:
        raise ModelError(
            f"{file.path} is a model of the architecture {name!r:.40}, which Paceline does not "
            f"run; expected one of {', '.join(sorted(ARCHITECTURES))}"
        )
    keys = {
        key.removeprefix(f"{name}."): key for key in file.metadata if key.startswith(f"{name}.")
    }
    meta = Fields(file.metadata, meta.where, keys)
    _refuse(meta, name, arch)
    kind = arch.family
    if arch.windowed and meta.get("attention.sliding_window"):
        kind = arch.windowed
    settings = _Settings(file, meta, arch).read()
    names = FAMILIES[kind].names
    values = {names.get(setting, setting): value for setting, value in settings.items()}
    return arch, {"model_type": kind, **values}


def _refuse(meta: Fields, name: str, arch: Architecture) -> None:
    """Refuse settings that would change the computation of an architecture that lacks them."""
    if experts := meta.integer("expert_count", 0, low=0):
        raise ModelError(
            f"this {name} model is a mixture of {experts} experts, which Paceline does not run; "
            "expected a dense one"
        )
    for key, neutral in NEUTRAL.items():
        value = meta.get(key)
        if value is None or key in arch.keys:
            continue
        if isinstance(value, np.ndarray | list) or value not in neutral:
            raise meta.fail(key, f"{neutral[0]} for the architecture {name}")
    window = meta.integer("attention.sliding_window", 0, low=0)
    known = "attention.sliding_window" in arch.keys
    if window and not known and window < meta.integer("context_length"):
        raise meta.fail("attention.sliding_window", f"none for the architecture {name}")


class _Settings:
    """Settings of a family, by our names, from the metadata of a file."""

    def __init__(self, file: GGUFFile, meta: Fields, arch: Architecture) -> None:
        self._file = file
        self._meta = meta
        self._arch = arch

    def read(self) -> dict[str, Any]:
        """Return all settings."""
        meta = self._meta
        hidden, heads = meta.integer("embedding_length"), self._uniform("attention.head_count")
        head_dim = meta.integer("attention.key_length", hidden // max(heads, 1))
        if meta.integer("attention.value_length", head_dim) != head_dim:
            raise meta.fail("attention.value_length", f"the length of keys, {head_dim}")
        layers = meta.integer("block_count")
        settings = {
            "vocab_size": self._vocab_size(),
            "hidden_size": hidden,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": self._uniform("attention.head_count_kv", heads),
            "head_dim": head_dim,
            "intermediate_size": self._uniform("feed_forward_length"),
            "max_position_embeddings": meta.integer("context_length"),
            "norm_eps": self._norm_eps(),
            "tie_word_embeddings": "output.weight" not in self._file.tensors,
            "eos_token_id": self._token("eos"),
            "bos_token_id": self._token("bos"),
            **self._rope(head_dim),
            **self._arch.settings,
        }
        for key, setting in self._arch.keys.items():
            if key in meta:
                settings[setting] = self._value(key)
        if self._arch.width_scaled:
            wide = layers in self._arch.width_scaled
            settings["query_pre_attn_scalar"] = hidden / heads if wide else head_dim
        if self._arch.family == "minicpm":
            settings |= self._minicpm(settings)
        if self._arch.family == "falcon":
            norms = 1 + ("blk.0.attn_norm_2.weight" in self._file.tensors)
            settings["num_ln_in_parallel_attn"] = norms
        return settings | self._windows(layers)

    def _value(self, key: str) -> str | bool | float | None:
        """Return a single value; 0 stands for none."""
        value = self._meta.get(key)
        if isinstance(value, np.ndarray | list):
            raise self._meta.fail(key, "a single value")
        return None if value == 0 and value is not False else value

    def _minicpm(self, settings: dict[str, Any]) -> dict[str, Any]:
        """Return the scales as that family's config has them; early files hold none of them."""
        meta, hidden, depth = self._meta, settings["hidden_size"], settings["num_hidden_layers"]
        root = math.sqrt(depth)
        return {
            "scale_emb": meta.number("embedding_scale", 12.0),
            "scale_depth": meta.number("residual_scale", 1.4 / root) * root,
            "dim_model_base": hidden / meta.number("logit_scale", hidden / 256, low=1e-6),
        }

    def _uniform(self, key: str, default: int | None = None) -> int:
        """Return a number that may be given for each layer, if all are alike."""
        value = self._meta.get(key)
        if not isinstance(value, np.ndarray):
            return self._meta.integer(key, default)
        if not value.size or value.dtype.kind not in "iu" or (value != value[0]).any():
            raise self._meta.fail(key, "the same whole number for every layer")
        return int(value[0])

    def _vocab_size(self) -> int:
        """Return the rows of the embedding, at least as many as there are tokens."""
        tokens = self._meta.get("tokenizer.ggml.tokens", [])
        embedding = self._file.tensors.get("token_embd.weight")
        if embedding is None:
            raise ModelError(f"{self._file.path} lacks tensor token_embd.weight; download it again")
        rows = embedding.shape[0]
        if not isinstance(tokens, list) or len(tokens) > rows:
            raise ModelError(
                f"{self._file.path} has {len(tokens)} tokens and {rows} rows of its embedding; it "
                "is damaged, download it again"
            )
        return rows

    def _norm_eps(self) -> float:
        rms = self._meta.get("attention.layer_norm_rms_epsilon")
        if rms is not None:
            return self._meta.number("attention.layer_norm_rms_epsilon")
        return self._meta.number("attention.layer_norm_epsilon")

    def _token(self, role: str) -> int | None:
        """Return a special token's id; None where the file names none of its vocabulary."""
        value = self._meta.integer(f"tokenizer.ggml.{role}_token_id", -1, -1, 2**32 - 1)
        return value if 0 <= value < self._vocab_size() else None

    def _windows(self, layers: int) -> dict[str, Any]:
        """Return the windows of the layers, where the file has a period or a list of them."""
        if not self._meta.get("attention.sliding_window"):
            return {}
        key = "attention.sliding_window_pattern"
        pattern = self._meta.get(key)
        if not isinstance(pattern, np.ndarray):
            return {} if pattern is None else {"sliding_window_pattern": pattern}
        if len(pattern) != layers or pattern.dtype != np.bool_:
            raise self._meta.fail(key, f"true or false for each of {layers} layers")
        kinds = ("full_attention", "sliding_attention")
        return {"layer_types": [kinds[int(each)] for each in pattern]}

    def _rope(self, head_dim: int) -> dict[str, Any]:
        meta = self._meta
        dim = meta.integer("rope.dimension_count", head_dim)
        settings: dict[str, Any] = {"rope_theta": meta.number("rope.freq_base", 1e4)}
        if dim != head_dim:  # half a value more, so that the product is not rounded down below it
            settings["partial_rotary_factor"] = (dim + 0.5) / head_dim
        if short := self._divisors("rope_factors_short.weight"):
            scaling = self._longrope(short, settings)
        else:
            scaling = self._scaling()
        if divisors := self._divisors("rope_freqs.weight"):  # what Llama 3 scales by, worked out
            if scaling:
                raise meta.fail("rope.scaling.type", "none, as the file has frequencies of its own")
            scaling = {"rope_type": "longrope", "short_factor": divisors, "attention_factor": 1.0}
            settings["original_max_position_embeddings"] = meta.integer("context_length")
        return settings | ({"rope_scaling": scaling} if scaling else {})

    def _scaling(self) -> dict[str, Any]:
        """Return the scaling by a factor that the metadata asks for; empty without one."""
        meta = self._meta
        kind = meta.text("rope.scaling.type", "linear")
        more = meta.number("rope.scaling.attn_factor", 1.0)
        if kind in ("none", "linear"):
            if more != 1:
                raise meta.fail("rope.scaling.attn_factor", f"1 for the scaling {kind}")
            factor = meta.number("rope.scaling.factor", meta.get("rope.scale_linear", 1), -1)
            plain = kind == "none" or factor in (0, 1)
            return {} if plain else {"rope_type": "linear", "factor": factor}
        if kind != "yarn":
            raise ModelError(unknown("rope.scaling.type", kind, ("none", "linear", "yarn")))
        factor = meta.number("rope.scaling.factor")
        scaling: dict[str, Any] = {"rope_type": "yarn", "factor": factor}
        if "rope.scaling.original_context_length" in meta:
            original = meta.integer("rope.scaling.original_context_length")
            scaling["original_max_position_embeddings"] = original
        for ours in ("beta_fast", "beta_slow"):
            if f"rope.scaling.yarn_{ours}" in meta:
                scaling[ours] = meta.number(f"rope.scaling.yarn_{ours}")
        if more != 1:
            scaling["attention_factor"] = more * (0.1 * math.log(max(factor, 1.0)) + 1)
        return scaling | self._growth(scaling, more)

    def _growth(self, scaling: dict[str, Any], more: float) -> dict[str, Any]:
        """Return what Ministral 3 adds to YaRN: its amplitude, and queries that grow."""
        meta = self._meta
        added: dict[str, Any] = {}
        if log := meta.number("rope.scaling.yarn_log_multiplier", 0.0, -1):
            if more != 1:
                raise meta.fail("rope.scaling.attn_factor", "1 beside a yarn_log_multiplier")
            added |= {"mscale": 1.0, "mscale_all_dim": log}
        if growth := meta.number("attention.temperature_scale", 0.0, -1):
            original = scaling.get("original_max_position_embeddings")
            if meta.integer("attention.temperature_length", original) != original:
                raise meta.fail("attention.temperature_length", f"the original context {original}")
            added["llama_4_scaling_beta"] = growth
        return added

    def _longrope(self, short: list[float], settings: dict[str, Any]) -> dict[str, Any]:
        """Return the scaling of Phi 3; put the original context into `settings`."""
        meta = self._meta
        context = meta.integer("context_length")
        original = meta.integer("rope.scaling.original_context_length", context, 2)
        settings["original_max_position_embeddings"] = original
        scaling: dict[str, Any] = {"rope_type": "longrope", "short_factor": short}
        if long := self._divisors("rope_factors_long.weight"):
            scaling["long_factor"] = long
        stretch = math.log(max(context / original, 1.0))
        expected = math.sqrt(1 + stretch / math.log(original))
        factor = meta.number("rope.scaling.attn_factor", 1.0)
        if not math.isclose(factor, expected, rel_tol=1e-6):
            scaling["attention_factor"] = factor
        return scaling

    def _divisors(self, name: str) -> list[float]:
        """Return the divisors of frequencies in a tensor; empty without it."""
        tensor = self._file.tensors.get(name)
        if tensor is None:
            return []
        if len(tensor.shape) != 1 or tensor.type != "F32" or tensor.shape[0] > _LARGEST_DIVISORS:
            raise ModelError(
                f"{name} of {self._file.path} is {tensor.type} {list(tensor.shape)}, expected F32 "
                "and one axis"
            )
        # The shortest decimals, which config.json has.
        return [float(str(value)) for value in dequantize(tensor.type, tensor.data)[0]]


def _modules(file: GGUFFile, arch: Architecture) -> dict[str, str]:
    """Return the modules of a layer in this file, with their canonical names."""
    alternatives = {name for name in arch.alternatives if f"blk.0.{name}.weight" in file.tensors}
    return layer_modules(arch, alternatives)


def layer_modules(arch: Architecture, alternatives: Collection[str]) -> dict[str, str]:
    """Return the modules of a layer, with their canonical names.

    Args:
        arch: of the file.
        alternatives: modules whose alternative names are used.
    """
    layer = dict(arch.layer)
    for module, names in arch.alternatives.items():
        if module in alternatives:
            replaced = {name for value in names.values() for name in value.split()}
            kept = {key: name for key, name in layer.items() if name not in replaced}
            layer = {**kept, **names}
    return layer


def located_family(family: Family, arch: Architecture, layer: Mapping[str, str]) -> Family:
    """Return the family with tensors where GGUF files have them."""
    return replace(
        family,
        layer=layer,
        outer=arch.outer,
        at="blk.{i}.",
        prefixes=(),
        aliases={},
        skipped=_ROPE_TENSORS,
        transposed=False,
        interleaved=False,
        paired=arch.paired,
    )


def _biased(file: GGUFFile, family: Family) -> frozenset[str]:
    """Return the linear maps whose bias is in the file, by the first layer."""
    layer = {f"blk.0.{module}": names for module, names in family.layer.items()}
    return frozenset(
        name
        for module, names in {**layer, **family.outer}.items()
        if f"{module}.bias" in file.tensors and not names.endswith("norm")
        for name in names.split()
    )

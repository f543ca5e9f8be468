"""Sampling defaults of a checkpoint, from generation_config.json or the metadata of a GGUF file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from paceline.models.config import ModelConfig
from paceline.models.fields import Fields, read_json
from paceline.models.formats.gguf import GGUFFile
from paceline.models.gguf_vocabulary import find_stop_tokens


@dataclass(frozen=True, slots=True)
class Defaults:
    """Sampling settings that apply unless a request overrides them.

    Attributes:
        stop_tokens: tokens that end the output, including those of config.json.
        temperature: 0 unless the checkpoint asks for sampling.
        top_k, top_p, min_p, repetition_penalty: None where the checkpoint says nothing.
    """

    stop_tokens: frozenset[int]
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None

    def samplers(self) -> dict[str, float]:
        """Map each control besides temperature that the checkpoint sets to its value."""
        wanted = {
            "top_k": self.top_k,
            "top_p": self.top_p,
            "min_p": self.min_p,
            "repetition_penalty": self.repetition_penalty,
        }
        return {name: value for name, value in wanted.items() if value is not None}


def read_defaults(folder: Path, config: ModelConfig) -> Defaults:
    """Read the defaults of a checkpoint; greedy if it has no generation_config.json.

    Raises:
        ModelError: the file is invalid.
    """
    path = folder / "generation_config.json"
    values = Fields(read_json(path) if path.exists() else {}, "generation_config.json")
    stops = frozenset(config.eos) | frozenset(values.tokens("eos_token_id"))
    return _defaults(stops, values, values.boolean("do_sample"))


def read_gguf_defaults(file: GGUFFile, config: ModelConfig) -> Defaults:
    """Read the defaults of a GGUF file; greedy unless it names a temperature.

    Raises:
        ModelError: a value is invalid.
    """
    names = {
        **{key: f"general.sampling.{key}" for key in ("top_k", "top_p", "min_p")},
        "temperature": "general.sampling.temp",
        "repetition_penalty": "general.sampling.penalty_repeat",
    }
    values = Fields(file.metadata, f"the metadata of {file.path.name}", names)
    stops = frozenset(config.eos)
    if "tokenizer.ggml.tokens" in file.metadata:
        stops |= find_stop_tokens(file.metadata, str(file.path))
    return _defaults(
        frozenset(token for token in stops if token < config.vocab_size),
        values,
        "temperature" in values,
    )


def _defaults(stops: frozenset[int], values: Fields, sampled: bool) -> Defaults:
    penalty = values.number("repetition_penalty", 1.0)
    if not sampled:
        return Defaults(stops, repetition_penalty=penalty if penalty != 1 else None)
    top_k = values.integer("top_k", 0, low=0)
    top_p = values.share("top_p", 1.0)
    min_p = values.share("min_p", 0.0)
    return Defaults(
        stop_tokens=stops,
        temperature=values.number("temperature", 1.0, low=-1e-9),
        top_k=top_k or None,
        top_p=top_p if top_p < 1 else None,
        min_p=min_p if min_p > 0 else None,
        repetition_penalty=penalty if penalty != 1 else None,
    )

"""Settings of a model in the words of its config.json, whatever it was read from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from paceline.models.families import FAMILIES
from paceline.models.family import Family
from paceline.models.fields import Fields, read_json
from paceline.models.gguf_config import read_gguf_settings
from paceline.models.hf_config import flatten
from paceline.models.model import Model


def model_settings(model: Model) -> dict[str, Any]:
    """Return the settings of the text model, by the names of its family.

    A model that was made in memory has none: its shape must say all.
    """
    if model.gguf is not None:
        return read_gguf_settings(model.gguf)
    path = model.path / "config.json"
    if not path.exists():
        return {}
    values = read_json(path)
    family = FAMILIES[values["model_type"]]  # of the file; that of its text model may be another
    return dict(flatten(values, family.variant(values) if family.variant else family))


def as_fields(model: Model, settings: Mapping[str, Any]) -> Fields:
    """Return settings that answer to our names, with the family's defaults."""
    family = family_of(model, settings)
    return Fields(settings, "config.json", family.names, family.defaults)


def family_of(model: Model, settings: Mapping[str, Any]) -> Family:
    """Return the model's family, in the layout that its settings choose."""
    family = FAMILIES[model.config.family]
    return family.variant(settings) if family.variant else family

"""All model families by the `model_type` of their config.json.

A family is one row of data: names, defaults and settings that have only one supported value.
`layer_variants.py` holds which layers have a window, and their rotary angles; `scales.py` the
factors that a family multiplies with. Engines know no families, only what `config.py` describes.
"""

from __future__ import annotations

from paceline.models.family import Family
from paceline.models.layer_norm_families import LAYER_NORM_FAMILIES
from paceline.models.rms_families import RMS_FAMILIES

__all__ = ["FAMILIES", "Family"]

FAMILIES: dict[str, Family] = {**RMS_FAMILIES, **LAYER_NORM_FAMILIES}

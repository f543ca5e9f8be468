"""Formats of cached keys and values that round several positions together."""

from __future__ import annotations

from paceline.abilities import Ability

# Their names and bits. Keys are rounded for each channel over 32 positions, values for each
# position over 32 channels, once all 32 positions are committed.
GROUPED_KV = {"int4": 4, "int3": 3}

# What an engine cannot do with such a cache: single rows cannot be chosen, come or leave.
NO_GROUPED_KV = frozenset(
    {Ability.POSITIONS, Ability.EVICT, Ability.ATTENTION_MASS, Ability.APPEND_ROWS}
)

"""What an opened engine brings to a combination; see `paceline.compatibility`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from paceline.compatibility import Side
from paceline.engines.kv_formats import GROUPED_KV

if TYPE_CHECKING:
    from paceline.engines.base import Engine


def engine_sides(engine: Engine) -> dict[Side, str]:
    """Return the attention pattern, exit policy and grouped cache that an engine has."""
    sides: dict[Side, str] = {}
    if engine.pattern is not None:
        sides[Side.PATTERN] = f"the attention pattern {engine.pattern.name}"
    if engine.exits is not None:
        sides[Side.EXITS] = f"the exit policy {engine.exits.name}"
    if engine.kv_format in GROUPED_KV:
        sides[Side.GROUPED_KV] = f"kv_format={engine.kv_format}"
    return sides

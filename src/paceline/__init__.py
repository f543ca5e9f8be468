"""Paceline: faster generation from open-weight language models, with proof that nothing changed."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from paceline.lm import LM as LM

__version__ = "0.1.0"
__all__ = ["LM"]


def __getattr__(name: str) -> object:
    # Loaded when first used, so that `import paceline` stays light.
    if name == "LM":
        from paceline.lm import LM

        return LM
    raise AttributeError(f"module 'paceline' has no attribute {name!r}")

"""Reading models: shape, weights, tokenizer."""

from paceline.models.model import Model, load

__all__ = ["Model", "load"]

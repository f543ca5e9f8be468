"""Readers of checkpoints: configuration, weights and tokenizer."""

from paceline.models.model import Model, load

__all__ = ["Model", "load"]

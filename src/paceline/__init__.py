"""Paceline: faster generation from open-weight language models, with proof that nothing changed."""

__version__ = "0.1.0"

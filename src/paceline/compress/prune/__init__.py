"""Pruners, one a file: each scores weights, and `base.py` selects those that stay."""

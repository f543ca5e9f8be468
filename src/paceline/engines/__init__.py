"""Engines run a model over token trees. `base.py` is the contract."""

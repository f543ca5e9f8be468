"""Engines run a model over token trees. `base.py` is the contract, `factory.py` opens them."""

from paceline.engines.factory import open_engine, open_like

__all__ = ["open_engine", "open_like"]

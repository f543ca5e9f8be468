"""Drafters, one file each. `base.py` is the contract; `registry.drafters` finds them by name."""

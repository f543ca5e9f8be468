"""Policies that bound the cache of keys and values; `base.py` is the contract."""

"""Quantisers, one a file: each chooses integers and scales, and `base.py` has grids and packing."""

"""Trained heads, one architecture a file; `drafters/head.py` grows trees with any of them."""

"""Tuners, one a file: each trains the stored matrices of a block on the block's outputs."""

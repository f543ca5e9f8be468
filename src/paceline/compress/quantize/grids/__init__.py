"""Grids: the values that the groups of a matrix can take, how they are chosen and stored."""

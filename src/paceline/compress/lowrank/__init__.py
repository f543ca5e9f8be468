"""Factorisations, one a file: each replaces a matrix by a product of thin ones."""

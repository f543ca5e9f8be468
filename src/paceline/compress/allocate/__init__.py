"""Allocators, one a file: each divides a budget of bytes among the matrices of a model."""

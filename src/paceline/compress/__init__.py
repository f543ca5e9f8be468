"""Compressors: methods that make a smaller stored form of a model's matrices."""

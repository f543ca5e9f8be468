"""Measuring speed and proving exactness."""

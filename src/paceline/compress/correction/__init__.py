"""Corrections, one a file: each makes up for what the compression of a matrix lost."""

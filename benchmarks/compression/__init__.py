"""Compression on a base that no format was made for."""

"""Attention patterns, one a file: which cached positions a query reads."""

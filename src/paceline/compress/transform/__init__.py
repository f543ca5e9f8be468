"""Transforms, one a file: each rewrites a block so that it compresses better."""

"""Guides: controls that run a model of their own, one file each."""

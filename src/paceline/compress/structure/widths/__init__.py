"""Narrower layers: which MLP channels and groups of heads they keep, and what makes up for it."""

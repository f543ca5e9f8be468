"""Levels of compression that a search mixes: their recipes, what they store, and what they lose."""

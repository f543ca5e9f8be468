"""Draft, forward, walk, commit."""

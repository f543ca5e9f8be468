"""Search for the best settings among measured ones."""

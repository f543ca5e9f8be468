"""Other people's clients, each in its own file, against a server process with SmolLM2."""

# The reason of a skip that tests/skips.txt names.
NOT_HERE = "the client packages are not installed: pip install 'paceline[clients]'"

"""Automata and dictionaries that the lexical controls share."""

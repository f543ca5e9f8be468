"""Watermarks: text that a key can recognise, with every drafter and every control."""

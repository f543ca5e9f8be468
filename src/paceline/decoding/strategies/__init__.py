"""Searches: other ways through the model's distribution than drawing one token after another."""
